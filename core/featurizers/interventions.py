"""The intervention classes that a file may name: what is asked of each, and where its name is looked up."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Self

from pydantic import BaseModel
from torch import nn

from featurizers.errors import PluginError, UnknownKindError, UsageError, shown
from featurizers.featurizer import Featurizer
from featurizers.plugins import KIND, checked_class, host, install_command, kinds


class SavedIntervention(ABC):
    """A pyvene intervention that `save_intervenable` writes and `load_intervenable` makes again.

    It is a featurizer, a config, and tensors of its own: the parameters and persistent buffers that are not the
    featurizer's. A plugin's class derives from this one beside pyvene's, and is registered by its
    ``featurizers_interventions``; one that derives from a class of `featurizers.pyvene` too gives a kind and, if it has
    more arguments than that, a ``Config``, a `get_config` and a `set_config`.

    Attributes:
        kind: registered name, stored in files: the plugin's name, or that, a dot and a word.
        Config: pydantic model of the arguments; strict, unknown keys forbidden.
        part: name of the child module that several interventions may share, the featurizer as a rule.
    """

    kind: ClassVar[str]
    Config: ClassVar[type[BaseModel]]
    part: ClassVar[str] = "featurizer"

    @abstractmethod
    def get_config(self) -> BaseModel:
        """The arguments as they are now."""

    @classmethod
    @abstractmethod
    def from_config(cls, config: Any, part: Any) -> Self:
        """The intervention of a ``Config``, around a featurizer that others may share.

        It is called under ``torch.device("meta")``: its own tensors have names and shapes, and get their values from
        the file afterwards. A tensor that is no parameter and no persistent buffer names its device.
        """

    def check(self) -> None:  # noqa: B027  # most have nothing to check
        """Raise a `FeaturizerError` if the config or the tensors do not fit the featurizer; called after loading."""

    @staticmethod
    def to_featurizer(part: Any) -> Featurizer[Any]:
        """The featurizer to store for the part that is shared: the part itself, unless a class replaces this."""
        return part  # type: ignore[no-any-return]

    @staticmethod
    def of_featurizer(featurizer: Featurizer[Any]) -> nn.Module:
        """The part that is shared, of the featurizer that was stored; called once for each."""
        return featurizer


def intervention_class(kind: str) -> type[SavedIntervention]:
    """The class that is registered under a name, by the core or by the one plugin that owns the name.

    Raises:
        UnknownKindError: no installed plugin registers it, or it is no such name at all.
        PluginError: the plugin that owns it cannot be used.
        MissingDependencyError: pyvene is not installed.
    """
    from featurizers.pyvene import INTERVENTIONS

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
    from featurizers.pyvene import unbound

    cls = unbound(type(intervention))
    kind = getattr(cls, "kind", None)
    if not (isinstance(kind, str) and issubclass(cls, SavedIntervention) and intervention_class(kind) is cls):
        raise UsageError(
            f"the intervention {shown(name)} is a {cls.__name__}, which no file may name. Those of the featurizers' "
            "get_..._intervention() are saved, and those that a plugin registers in its featurizers_interventions"
        )
    return cls
