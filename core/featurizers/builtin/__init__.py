"""Kinds that ship with the core: compositions (`a >> b`) and dictionaries (sparse autoencoders).

They register through the same hooks as the kinds of any plugin. For plugins there is also `LinearDecoderFeaturizer`, a
base of other kinds of autoencoders, and helpers that write a dictionary in another library's format. This room imports
`featurizers.registry` and the rooms below it.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
