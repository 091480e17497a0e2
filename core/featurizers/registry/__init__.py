"""Plugins: hook specifications, discovery and import, and the tables of kinds and activation rules.

This room imports `featurizers.features` and the rooms below it. Listing plugins imports neither torch nor a plugin.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
