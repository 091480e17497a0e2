"""Hugging Face Hub: the grammar of sources, requests with a time limit, and a repository read at one commit.

This room imports `featurizers.format` and the rooms below it.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
