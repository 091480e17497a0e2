"""Features or activations of a corpus in Parquet files, one row a token: exactly once, and resumable.

`harvest` is the entry. The files, lowest first: `sources` (documents that can be read from any shard on), `plan`,
`folders` (files that are replaced as a whole), `tables` of rows, `targets` (what is harvested), `parts` (the files of a
shard), `rows` (what was harvested, as the model read it), `shards` (computes and commits one), `engines`, `job` (what a
worker begins from), `known` (checksums of before), `prepared` (arguments that were checked), `reading` (what was
harvested), `index` by feature, `exports`, `harvesting`, `command` and `harvested`, the commands.

``__init__.pyi`` lists the public names. A name is imported when it is first used. This module has no ``__dir__``,
because pluggy would get each name that it lists.
"""

import lazy_loader

__getattr__, _, __all__ = lazy_loader.attach_stub(__name__, __file__)
