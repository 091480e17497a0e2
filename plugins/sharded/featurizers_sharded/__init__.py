"""Dictionaries and maps that are larger than one device, divided by features over the processes of a mesh.

`featurizers.load(…, mesh=mesh)` is the entry. The files, lowest first: `ranks` (the processes, and what they tell each
other before each call), `collectives` (sums and gathers with gradients), `selection` (which features of a token may
fire, chosen over all processes), `divided` (features that are shared out among processes), `share` (the rows of one
process), `saving`, `dictionary` (`ShardedDictionary`), `site_map` (`ShardedMap`, whose formulas are those of
featurizers-transcoder), `leading` (`led`: one process uses them, the others follow), `loading`.

``__init__.pyi`` lists the public names. A name is imported when it is first used. This module has no ``__dir__``,
because pluggy would get each name that it lists.
"""

import lazy_loader

__getattr__, _, __all__ = lazy_loader.attach_stub(__name__, __file__)
