"""Exact activation patching: the effect of each edit of a grid, a whole sweep in a few forward passes.

`patch` is the entry. The files, lowest first: `engine` (runs of many edits at once), `pairs`, `positions` and `sites`
(the axes of a grid), `operations` and `metrics`, `answers` of several tokens, `grid` with its files and pictures,
`request` (the arguments of a call), `group` (pairs that share a clean run), `estimates` (by gradients), `grid_run`,
`patching`, `command`. `additions` runs edits that add vectors.

``__init__.pyi`` lists the public names. A name is imported when it is first used. This module has no ``__dir__``,
because pluggy would get each name that it lists, and so import the engine and `transformers`.
"""

import lazy_loader

__getattr__, _, __all__ = lazy_loader.attach_stub(__name__, __file__)
