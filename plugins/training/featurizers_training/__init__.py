"""Find features by training interventions on counterfactual pairs: DAS, DBM, both, and boundless DAS.

The rooms, lowest first: `statistics` (intervals and tests), `pairs` (data), `runs` (the model's runs with and without
edits), `methods` (what is trained) and `evaluation` (accuracy), `search` (the training loop), `sweeps` (sites,
positions and methods), `demo`, `command`.

``__init__.pyi`` lists the public names. A name is imported when it is first used. This module has no ``__dir__``,
because pluggy would get each name that it lists.
"""

import lazy_loader

__getattr__, _, __all__ = lazy_loader.attach_stub(__name__, __file__)
