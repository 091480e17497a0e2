"""Transcoders, cross-layer transcoders and crosscoders: maps whose encoders and decoders are linear."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
