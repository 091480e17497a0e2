"""Hooks that a plugin may implement, and the marker for its implementations.

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

    from featurizers.features.feature_space import FeatureSpace
    from featurizers.features.rules import Rule
    from featurizers.format.external_files import ExternalFiles
    from featurizers.format.sites import Blocks

PROJECT = "featurizers"
"""Name of the entry-point group and of the pluggy project."""

hookspec: pluggy.HookspecMarker = pluggy.HookspecMarker(PROJECT)
hookimpl: pluggy.HookimplMarker = pluggy.HookimplMarker(PROJECT)
"""Mark a function of a plugin as the implementation of a hook."""


@hookspec
def featurizers_register(register: Callable[[type[FeatureSpace[Any]]], None]) -> None:
    """Register the kinds of this plugin: ``register(MyFeaturizer)`` for each class.

    Called once, when the plugin is loaded.
    """


@hookspec(firstresult=True)
def featurizers_anatomy(model: nn.Module) -> Blocks | None:
    """Return where a model keeps its blocks if generic detection gets that wrong; ``None`` for any other model.

    Called in the loaded plugins before the generic detection, and in all other plugins if that fails.
    """


@hookspec(firstresult=True)
def featurizers_backend(model: object, part: nn.Module | None) -> Any:
    """Return how the library of this plugin holds a model, a `featurizers.models.Backend`; ``None`` for any other.

    Called whenever a model is given to `featurizers.intervene` and its like, in the plugin that is named after the
    package of the model's class or of one of its bases (``my_library`` belongs to the plugin ``my-library``), and then
    in the plugins that are loaded. ``part`` is None then. If the model's blocks are of a class of another package, its
    plugin is called with the first block as ``part``, to refuse the model if need be. Raise a `FeaturizerError` to
    refuse a model. The library is imported already if the model is of it.
    """


@hookspec
def featurizers_rules(register: Callable[[Rule], None]) -> None:
    """Register the activation rules of this plugin: ``register(rule)`` for each; see `featurizers.activation_rule`.

    Called once, when the plugin is loaded. The name of a rule is the plugin's name, alone or with a dot and a word.
    """


@hookspec
def featurizers_interventions(register: Callable[[type], None]) -> None:
    """Register the pyvene interventions of this plugin: ``register(MyIntervention)`` for each `SavedIntervention`.

    Called in the plugin that an intervenable names when it is saved or loaded, so that pyvene is not imported earlier.
    The name of an intervention is the plugin's name, alone or with a dot and a word.
    """


@hookspec(firstresult=True)
def featurizers_read(source: ExternalFiles) -> FeatureSpace[Any] | None:
    """Read a featurizer from files of another library; return ``None`` if they have a format that is not this plugin's.

    Called in every plugin when a source has no ``config.json`` of featurizers. Read the files as data, and run none.
    """


@hookspec(firstresult=True)
def featurizers_resolve(reference: str, repository: Callable[..., ExternalFiles]) -> FeatureSpace[Any] | None:
    """Read the featurizer of an entry of this plugin's catalogue: of ``reference`` in ``plugin:reference``.

    Called in the plugin that the source names. ``repository(repo_id, subfolder=None, revision=None)`` returns the files
    of a repository on the Hub.
    """


@hookspec(firstresult=True)
def featurizers_suggest(reference: str) -> str | None:
    """Return the entry ``plugin:reference`` that a text without the plugin's name may mean; ``None`` if there is none.

    Called in every plugin when `load` finds that a source names nothing. Look at the plugin's own tables alone, not at
    the network.
    """


@hookspec(firstresult=True)
def featurizers_write(featurizer: FeatureSpace[Any], folder: Path) -> list[str] | None:
    """Write a featurizer into an empty folder in this plugin's own format; return a sentence for each thing lost.

    Called by ``featurizers convert --to`` in the plugin that it names. Raise `featurizers.errors.ConversionError` if
    the format cannot hold the map itself.
    """
