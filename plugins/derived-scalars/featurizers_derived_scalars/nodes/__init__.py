"""Nodes: what quantities are measured of. Units of a place or features of a featurizer, and which feeds which.

This room imports `featurizers_derived_scalars.circuit` and `featurizers_derived_scalars.capturing`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
