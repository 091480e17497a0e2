"""Files from outside, opened safely: regular files within the named folder, folders replaced whole, bounded readers.

Safe readers of zip archives, of `torch.save` files and of numpy files check their size before they allocate memory.
This room imports `featurizers.errors` and nothing else of the package.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
