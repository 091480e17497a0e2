"""Language models: sites and positions, operations on activations, hooks, and surgery on decoders.

This room imports `featurizers.registry`, `featurizers.features` and the rooms below them. It reads and writes no files.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
