"""Language models: finding sites and positions, describing an edit, and running the model with it.

This room imports `featurizers.registry`, `featurizers.features` and the rooms below them. It knows no files.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
