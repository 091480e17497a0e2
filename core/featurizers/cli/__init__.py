"""The `featurizers` command, and what the commands of plugins share: options, tables and progress bars."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
