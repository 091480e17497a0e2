"""Sparse autoencoders and transcoders of SAELens, and of the formats in its catalogue."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from featurizers import FeatureSpace, hookimpl
from featurizers.format import ExternalFiles

from featurizers_sae_lens import catalogue, formats, writing
from featurizers_sae_lens.matching_pursuit import MatchingPursuitConfig, MatchingPursuitFeaturizer
from featurizers_sae_lens.temporal import TemporalConfig, TemporalMap
from featurizers_sae_lens.wrapping import wrap

__all__ = ["MatchingPursuitConfig", "MatchingPursuitFeaturizer", "TemporalConfig", "TemporalMap", "wrap"]


@hookimpl
def featurizers_register(register: Any) -> None:
    """Register the kinds of architectures that are neither dictionaries nor transcoders."""
    register(MatchingPursuitFeaturizer)
    register(TemporalMap)


@hookimpl
def featurizers_read(source: ExternalFiles) -> FeatureSpace[Any] | None:
    """Read the featurizer in a folder of SAELens, or in the format of a release in its catalogue."""
    return formats.read(source)


@hookimpl
def featurizers_resolve(reference: str, repository: Callable[..., ExternalFiles]) -> FeatureSpace[Any] | None:
    """Read the featurizer of ``release/id`` in SAELens' catalogue."""
    return catalogue.resolve(reference, repository)


@hookimpl
def featurizers_suggest(reference: str) -> str | None:
    """Return the entry of SAELens' catalogue that is meant by its release and its id alone."""
    return catalogue.suggest(reference)


@hookimpl
def featurizers_write(featurizer: FeatureSpace[Any], folder: Path) -> list[str] | None:
    """Write ``cfg.json`` and ``sae_weights.safetensors``."""
    return writing.write(featurizer, folder)
