"""Featurizers of derived scalars: the kind ``derived-scalars.diagonal``, and scalars that are invertible maps.

This room imports `featurizers_derived_scalars.nodes` and the rooms below it, and knows nothing of quantities.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
