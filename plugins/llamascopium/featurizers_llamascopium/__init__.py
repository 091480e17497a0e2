"""Autoencoders, transcoders, crosscoders and sparse attention of llamascopium, read without its package."""

from __future__ import annotations

from typing import Any

from featurizers import hookimpl
from featurizers.features import FeatureSpace
from featurizers.format import ExternalFiles

from featurizers_llamascopium import reading, rules
from featurizers_llamascopium.glu import GluConfig, GluMap
from featurizers_llamascopium.lorsa import LorsaConfig, LorsaMap

__all__ = ["GluConfig", "GluMap", "LorsaConfig", "LorsaMap"]


@hookimpl
def featurizers_register(register: Any) -> None:
    """Register the kinds that are neither dictionaries nor linear maps."""
    register(GluMap)
    register(LorsaMap)


@hookimpl
def featurizers_rules(register: Any) -> None:
    """Register the rule of top k by the norms of decoder rows."""
    register(rules.topk)


@hookimpl
def featurizers_read(source: ExternalFiles) -> FeatureSpace[Any] | None:
    """Read the folder of a model of llamascopium."""
    return reading.read(source)
