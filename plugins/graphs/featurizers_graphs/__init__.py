"""Attribution graphs: which features of transcoders, on which tokens, bring about the next token of a prompt.

`graph` is the entry. The files, lowest first: `influence` (scores and pruning), `graph_data` (nodes and edges),
`graph_files` and `page` (stores and shows them), `uploading` and `neuronpedia` (sends them to Neuronpedia), `result` (a
graph), `circuit_tracer` and `loading` (reads graphs), `collection` (where maps belong in a model), `local_model` (a
prompt's frozen model), `sources` (its features and errors), `targets`, `sweep`, `attention`, `graphing`, `validation`,
`command`.

``__init__.pyi`` lists the public names. A name is imported when it is first used. This module has no ``__dir__``,
because pluggy would get each name that it lists, and so import `transformers`.
"""

import lazy_loader

__getattr__, _, __all__ = lazy_loader.attach_stub(__name__, __file__)
