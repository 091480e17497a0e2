"""Where the name of an intervention is looked up: among the core's own, and those of the plugin that owns it."""

from __future__ import annotations

from typing import Any

from featurizers.errors import PluginError, UnknownKindError, UsageError, shown
from featurizers.registry import KIND, checked_class, host, install_command, kinds

from featurizers_pyvene.interventions import INTERVENTIONS, unbound
from featurizers_pyvene.saved_intervention import SavedIntervention


def intervention_class(kind: str) -> type[SavedIntervention]:
    """The class that is registered under a name, by the core or by the one plugin that owns the name.

    Raises:
        UnknownKindError: no installed plugin registers it, or it is no such name at all.
        PluginError: the plugin that owns it cannot be used.
        MissingDependencyError: pyvene is not installed.
    """
    if kind in INTERVENTIONS:
        return INTERVENTIONS[kind]
    plugin, found = kind.partition(".")[0], dict[str, type[SavedIntervention]]()

    def register(cls: type[SavedIntervention]) -> None:
        try:
            name = checked_class(SavedIntervention, plugin, cls)
        except PluginError as error:
            raise PluginError(f"the plugin {plugin!r} cannot be used: {error}") from error
        if found.setdefault(name, cls) is not cls or name in INTERVENTIONS:
            raise PluginError(f"the plugin {plugin!r} cannot be used: the intervention {name!r} is there already")

    hint = "The name of an intervention is lower-case words joined by '-', never an import path."
    if KIND.fullmatch(kind):
        command = install_command(plugin)
        hint = f"Install it with: {command}." if command else "Install the package of its author."
        if plugin in kinds():
            host().ask("featurizers_interventions", plugin, register=register)
            hint = f"The plugin {plugin!r} registers no intervention of that name."
    if kind not in found:
        raise UnknownKindError(kind, {*INTERVENTIONS, *found}, hint, what="intervention")
    return found[kind]


def class_of(intervention: Any, name: str) -> type[SavedIntervention]:
    """The registered class that an intervention is of, and not of a subclass, whose arithmetic may be another.

    Args:
        intervention: of a pyvene model.
        name: what to call it in an error.

    Raises:
        UsageError: its class is not registered.
    """
    cls = unbound(type(intervention))
    kind = getattr(cls, "kind", None)
    if not (isinstance(kind, str) and issubclass(cls, SavedIntervention) and intervention_class(kind) is cls):
        raise UsageError(
            f"the intervention {shown(name)} is a {cls.__name__}, which no file may name. Those of the featurizers' "
            "get_..._intervention() are saved, and those that a plugin registers in its featurizers_interventions"
        )
    return cls
