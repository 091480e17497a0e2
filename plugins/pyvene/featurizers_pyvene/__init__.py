"""Featurizers as pyvene interventions, and whole pyvene models saved as JSON and safetensors.

`featurizers.pyvene`, `featurizers.save_intervenable` and their siblings are the names of this package. It imports
pyvene only when an intervention class is asked for.
"""

from __future__ import annotations

import importlib
from typing import Any

import lazy_loader

_public, _, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> Any:
    """Return a public name, or the intervention class that pyvene's own files name, such as ``…Intervention_7f3c``.

    There is no ``__dir__``: pluggy looks at each name that it lists, which would import pyvene.
    """
    if name in __all__ or "Intervention_" not in name:
        return _public(name)
    return getattr(importlib.import_module("featurizers_pyvene.interventions"), name)
