"""The two kinds that ship with the core: compositions (`a >> b`) and dictionaries (sparse autoencoders).

They register through the same hooks as the kinds of any plugin. `LinearDecoderFeaturizer` is a base for other kinds of
autoencoders. This room imports `featurizers.registry` and the rooms below it.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
