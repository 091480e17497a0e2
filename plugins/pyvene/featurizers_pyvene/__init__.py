"""Featurizers as pyvene interventions, and whole pyvene models saved as JSON and safetensors.

`featurizers.pyvene` has the names of this package, and `featurizers` has `save_intervenable`, `load_intervenable` and
`push_intervenable`. pyvene is imported when an intervention class is first used.
"""

from __future__ import annotations

import importlib
from typing import Any

import lazy_loader

_public, _, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> Any:
    """Return a public name, or a bound intervention class such as ``…Intervention_7f3c``, which pyvene's files name.

    This module has no ``__dir__``, because pluggy would get each name that it lists and so import pyvene.
    """
    if name in __all__ or "Intervention_" not in name:
        return _public(name)
    return getattr(importlib.import_module("featurizers_pyvene.interventions"), name)
