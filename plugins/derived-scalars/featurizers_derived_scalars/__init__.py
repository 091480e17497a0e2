"""Scalars derived from a decoder's activations and gradients, in the basis of any featurizer.

Rooms, lowest first: `circuit` reads a decoder, `capturing` runs it, `nodes` says what is measured of, `results` holds
numbers, `featurize` turns scalars into featurizers, `quantities` derives them, `command` is ``featurizers scalars``.
Public are the names here and the names of each room.

``__init__.pyi`` lists the public names and where each is defined. A name is imported when it is first used, so that
looking for a command does not import torch.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
