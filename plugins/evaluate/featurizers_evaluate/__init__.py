"""Measure any featurizer on a language model: reconstruction, sparsity, effect on the model; and report its features.

`evaluate` and `report` are the entries. The files, lowest first: `definitions` of the metrics, `documents` (the data),
`labels` (of other programs), `sums` over tokens, with resamples of documents, `subjects` (what is measured), `options`,
`runs` of the model, `harvests` (what is read in the place of runs), `measuring` (one reading of the data), `result`,
`summary` (metrics from sums), `of_plugins` (metrics that other plugins measure), `pictures`, `comparison`,
`evaluating`, `reporting` (what each feature does, and a page of it), `command`.

``__init__.pyi`` lists the public names. A name is imported when it is first used. This module has no ``__dir__``,
because pluggy would get each name that it lists.
"""

import lazy_loader

__getattr__, _, __all__ = lazy_loader.attach_stub(__name__, __file__)
