"""Capturing: running a decoder on prompts, and keeping the activations and gradients that were asked for.

This room imports `featurizers_derived_scalars.circuit`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
