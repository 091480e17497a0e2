"""The hooks that a plugin may implement, and the marker that it puts on them.

A plugin is a distribution with an entry point in the group ``featurizers`` whose name is the kind it provides
(or the part of the kind before the first dot). The entry point names a module; its functions marked with
`hookimpl` are called as described here.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from torch import nn
    from typer import Typer

    from featurizers.features.featurizer import Featurizer
    from featurizers.features.rules import Rule
    from featurizers.format.external_files import ExternalFiles
    from featurizers.format.sites import Blocks

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


@hookspec
def featurizers_rules(register: Callable[[Rule], None]) -> None:
    """Register the activation rules of this plugin: ``register(rule)`` for each; see `featurizers.activation_rule`.

    Called once, when the plugin is loaded. A rule is named as a kind is: the plugin's name, or that, a dot and a word.
    """


@hookspec
def featurizers_interventions(register: Callable[[type], None]) -> None:
    """Register the pyvene interventions of this plugin: ``register(MyIntervention)`` for each `SavedIntervention`.

    Asked of the plugin that is named, when an intervenable is saved or loaded, so that pyvene is imported then and not
    before. An intervention is named as a kind is: the plugin's name, or that, a dot and a word.
    """


@hookspec(firstresult=True)
def featurizers_read(source: ExternalFiles) -> Featurizer[Any] | None:
    """The featurizer in a folder or a repository that another library wrote; ``None`` if the format is not this one.

    Asked of every plugin when what is loaded has no ``config.json`` of ours. It reads data and runs none of it.
    """


@hookspec(firstresult=True)
def featurizers_resolve(reference: str, repository: Callable[..., ExternalFiles]) -> Featurizer[Any] | None:
    """The featurizer of an entry of this plugin's catalogue: of ``reference`` in ``plugin:reference``.

    Asked of the plugin that is named. ``repository(repo_id, subfolder=None, revision=None)`` opens one of the Hub.
    """


@hookspec(firstresult=True)
def featurizers_write(featurizer: Featurizer[Any], folder: Path) -> list[str] | None:
    """Write a featurizer into an empty folder in this plugin's own format, and say what could not be kept.

    Asked of the plugin that is named, by ``featurizers convert --to``. One sentence for each thing that is lost; it
    raises `featurizers.errors.ConversionError` if the format cannot hold the map itself.
    """


@hookspec
def featurizers_commands(app: Typer) -> None:
    """Add this plugin's commands to the ``featurizers`` command: to an empty `typer.Typer`, as to any other.

    Asked once, when a command is called that is not the core's, or when all are listed. A sub-application added by
    ``app.add_typer(typer.Typer(), name="fit")`` joins those that other plugins give that name. A function imports
    what is heavy itself, and its errors are ``FeaturizerError``.
    """
