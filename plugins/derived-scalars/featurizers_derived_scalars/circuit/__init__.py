"""Reading a decoder: which modules read and write its residual stream, its norms and attention, and its places.

This room imports only `featurizers`: no other room of this package.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
