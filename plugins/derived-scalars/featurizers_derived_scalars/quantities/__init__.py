"""Quantities: what is measured of nodes. Each function returns a `Deriver`, and derivers combine into others.

This room imports every room below it: circuit, capturing, nodes, results and featurize.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
