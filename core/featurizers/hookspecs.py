"""The hooks that a plugin may implement, and the marker that it puts on them.

A plugin is a distribution with an entry point in the group ``featurizers`` whose name is the kind it provides
(or the part of the kind before the first dot). The entry point names a module; its functions marked with
`hookimpl` are called as described here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from torch import nn

    from featurizers.anatomy import Blocks
    from featurizers.featurizer import Featurizer

PROJECT = "featurizers"
"""Name of the entry-point group and of the pluggy project."""

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)
"""Marks a plugin's function as the implementation of a hook."""


@hookspec
def featurizers_register(register: Callable[[type[Featurizer[Any]]], None]) -> None:
    """Register the kinds of this plugin: ``register(MyFeaturizer)`` for each class."""


@hookspec(firstresult=True)
def featurizers_anatomy(model: nn.Module) -> Blocks | None:
    """Where a model keeps its blocks, for a model that generic detection gets wrong; ``None`` for any other.

    Asked of the plugins that are loaded already, before the generic detection, and of all others after it has failed.
    """
