"""Featurizers on disk and on the Hub: save, load, push and convert.

This room imports every room below it; only the command line and the conformance suite stand above it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import lazy_loader

if TYPE_CHECKING:
    from pathlib import Path

    from featurizers.features.feature_space import FeatureSpace

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def save(
    featurizer: FeatureSpace[Any], folder: str | Path, *, model: object | None = None, metrics: object | None = None
) -> Path:
    """Write a featurizer as an artefact and return its folder: `featurizers.store.artefact.save`.

    It is a function here because nnsight gives every object, also this module, a method ``save``, which Python finds
    before it asks ``__getattr__``.
    """
    module = importlib.import_module("featurizers.store.artefact")
    path: Path = module.save(featurizer, folder, model=model, metrics=metrics)
    return path
