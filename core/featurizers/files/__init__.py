"""Safe access to untrusted files: regular files within a folder, folders replaced atomically, bounded readers.

The readers of zip archives, `torch.save` files and numpy files check sizes before they allocate memory.
This room imports `featurizers.errors` and nothing else of the package.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
