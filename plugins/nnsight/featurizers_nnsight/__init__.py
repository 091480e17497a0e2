"""Edits of features inside the traces of nnsight: `edit` here and now, `remote_edit` for a server.

`featurizers.intervene`, `collect` and `attach` take a model of nnsight as well; `plugin` says how it holds a model.
"""

import lazy_loader

# nnsight changes torch when it is imported, and so is not imported with the plugin
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
