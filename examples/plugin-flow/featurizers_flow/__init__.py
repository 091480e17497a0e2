"""The featurizer kind ``flow``."""

from collections.abc import Callable
from typing import Any

from featurizers import Featurizer, hookimpl

from featurizers_flow.featurizer import FlowConfig, FlowFeaturizer

__all__ = ["FlowConfig", "FlowFeaturizer"]


@hookimpl
def featurizers_register(register: Callable[[type[Featurizer[Any]]], None]) -> None:
    """Register the kinds of this package."""
    register(FlowFeaturizer)
