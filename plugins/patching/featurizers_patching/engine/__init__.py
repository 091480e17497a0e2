"""The engine: many edits of a decoder's activations, each run only where it has an effect.

An edit of token p in block l changes tokens from p on in blocks from l on, and nothing else. All cells (one cell is one
set of edits and one result) advance together: block l runs once on a packed batch ``(1, rows, d)`` of the tokens that
some cell has changed, whatever their prompts, sites and positions. Norms, projections, rotary embeddings and MLPs act
on each token alone. Attention is the one part in which tokens meet: a function that is registered with `transformers`
gives each cell the clean keys and values of its prompt with its own written over them, under the model's own mask.

The files, lowest first: `scope` (which run is active in a thread, and stand-ins for ``forward``), `spots` (where in
the model a site is), `cells` (the table of edits), `attention`, `clean` (the clean run), `frozen`, `editing` (hooks
that edit packed rows), `ending` (from the last block to the logits), `advance` (the run of a chunk of cells),
`reference` (the same cells through `featurizers.intervene`), `sweep` (chunks, memory, verification), `receiving` (path
patching). `reading` reads activations and `gradients` takes gradients at sites in whole runs without edits.
``__init__.pyi`` lists the names for other plugins.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
