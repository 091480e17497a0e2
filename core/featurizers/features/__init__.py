"""Feature spaces: `Featurizer` and its laws, indices, derivatives, gates and activation rules.

This room imports `featurizers.format` (for sites) and the top of the package. It knows neither plugins nor models.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
