"""Featurizers on disk and on the Hub: save, load, push and convert.

This room imports every room below it; only the command line and the conformance suite stand above it.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
