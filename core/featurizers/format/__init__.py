"""Files of an artefact: `config.json`, weights and card; sites as data; files of other libraries as data.

This room imports `featurizers.files` and the top of the package. Nothing here builds a featurizer.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
