"""Command line `featurizers`, and what plugins share for their commands: options, JSON output and progress bars."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
