"""Transcoders of circuit-tracer: its folders as maps between sites, and back, without its package."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from featurizers import hookimpl
from featurizers.features import FeatureSpace
from featurizers.format import ExternalFiles

from featurizers_circuit_tracer import reading, writing
from featurizers_circuit_tracer.config import CircuitTracerConfig

__all__ = ["CircuitTracerConfig"]


@hookimpl
def featurizers_read(source: ExternalFiles) -> FeatureSpace[Any] | None:
    """Read the transcoders in a folder with ``config.yaml``."""
    return reading.read(source)


@hookimpl
def featurizers_resolve(reference: str, repository: Callable[..., ExternalFiles]) -> FeatureSpace[Any] | None:
    """Read ``owner/name``, ``owner/name/folder`` or one layer of it, as ``owner/name/folder/layer-5``."""
    return reading.resolve(reference, repository)


@hookimpl
def featurizers_write(featurizer: FeatureSpace[Any], folder: Path) -> list[str] | None:
    """Write ``config.yaml`` and the files of each layer."""
    return writing.write(featurizer, folder)
