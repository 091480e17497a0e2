"""Look up an intervention class by its kind: in this package, or in the plugin that owns the name."""

from __future__ import annotations

from typing import Any

from featurizers.errors import PluginError, UnknownKindError, UsageError, shown
from featurizers.registry import KIND, checked_class, host, install_command

from featurizers_pyvene.interventions import INTERVENTIONS, unbound
from featurizers_pyvene.saved_intervention import SavedIntervention


def intervention_class(kind: str) -> type[SavedIntervention]:
    """Return the class that is registered under a kind, by this package or by the plugin that owns the name.

    Raises:
        UnknownKindError: no installed plugin registers the kind, or it is not a valid name.
        PluginError: the plugin that owns the name cannot be used.
        MissingDependencyError: pyvene is not installed.
    """
    if kind in INTERVENTIONS:
        return INTERVENTIONS[kind]
    plugin, registered = kind.partition(".")[0], dict[str, type[SavedIntervention]]()

    def register(cls: type[SavedIntervention]) -> None:
        try:
            name = checked_class(SavedIntervention, plugin, cls)
        except PluginError as error:
            raise PluginError(f"the plugin {plugin!r} cannot be used: {error}") from error
        if registered.setdefault(name, cls) is not cls or name in INTERVENTIONS:
            raise PluginError(f"the plugin {plugin!r} cannot be used: the intervention {name!r} is registered already")

    hint = "The name of an intervention is lower-case words joined by '-', never an import path."
    if KIND.fullmatch(kind):
        command = install_command(plugin)
        hint = f"Install it with: {command}." if command else "Install the package of its author."
        if plugin in host().names():
            host().ask("featurizers_interventions", plugin, register=register)
            hint = f"The plugin {plugin!r} registers no intervention of that name."
    if kind not in registered:
        raise UnknownKindError(kind, {*INTERVENTIONS, *registered}, hint, what="intervention")
    return registered[kind]


def class_of(intervention: Any, name: str) -> type[SavedIntervention]:
    """Return the registered class of an intervention.

    A subclass of a registered class is refused, because its arithmetic may differ.

    Args:
        intervention: an intervention of a pyvene model.
        name: names it in an error.

    Raises:
        UsageError: its class is not registered.
    """
    cls = unbound(type(intervention))
    kind = getattr(cls, "kind", None)
    if not (isinstance(kind, str) and issubclass(cls, SavedIntervention) and intervention_class(kind) is cls):
        raise UsageError(
            f"the intervention {shown(name)} is a {cls.__name__}, which no file may name. Use one of a featurizer's "
            "get_..._intervention() methods, or register the class in a plugin's featurizers_interventions hook"
        )
    return cls
