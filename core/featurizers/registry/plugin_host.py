"""`PluginHost`: a loader of plugins that also keeps the kinds and the activation rules that they register."""

from __future__ import annotations

import contextlib
import functools
from typing import TYPE_CHECKING, Any

from featurizers.errors import (
    ConfigError,
    MissingDependencyError,
    PluginError,
    UnknownKindError,
    UsageError,
    did_you_mean,
    explain,
    shown,
)
from featurizers.names import FIRST_PARTY, HOLDERS, KIND, KINDS, NAME, OWNERS, install_command, install_hint
from featurizers.registry.loader import PluginInfo, PluginLoader

if TYPE_CHECKING:  # listing the plugins must not import torch
    from collections.abc import Callable, Mapping

    from torch import nn

    from featurizers.features.feature_space import FeatureSpace
    from featurizers.features.rules import Rule
    from featurizers.format.sites import Blocks

__all__ = ["FIRST_PARTY", "KIND", "NAME", "OWNERS", "PluginHost", "PluginInfo", "build", "check_plugins"]
__all__ += ["checked_class", "host", "install_command", "kinds", "plugins"]

RULES_OWNER = "dictionary"  # the plugin of the core that registers the activation rules without a prefix


class PluginHost(PluginLoader):
    """Installed plugins of one process with their kinds and rules; `host` returns the only instance of a program."""

    def __init__(self) -> None:
        self._classes: dict[str, type[FeatureSpace[Any]]] = {}
        self._rules: dict[str, Rule] = {}
        self._owned_rules: dict[str, set[str]] = {}
        super().__init__()

    def featurizer_class(self, kind: str) -> type[FeatureSpace[Any]]:
        """Return the class of a kind; import the plugin that owns it and no other.

        Raises:
            UnknownKindError: no plugin registers the kind, or no kind can have this name.
            PluginError: the plugin that owns it cannot be used.
        """
        if kind not in self._classes:
            if not KIND.fullmatch(kind):
                hint = "A kind is lower-case words joined by '-', never an import path."
                raise UnknownKindError(kind, self.known_kinds(), hint)
            self.load(kind.partition(".")[0])
        if kind not in self._classes:
            hint = f"The plugin {kind!r} provides no kind of that name; see its README."
            raise UnknownKindError(kind, self.known_kinds(), hint if self.is_loaded(kind) else install_hint(kind))
        return self._classes[kind]

    def known_kinds(self) -> list[str]:
        """Return the kinds of installed plugins as far as they are known without an import.

        Those of this project's plugins are in a table. Of any other plugin that is not loaded yet, the one kind of its
        own name is assumed.
        """
        known = set(self._classes)
        for name in self._entries:
            if not self.is_loaded(name):
                known.update(KINDS.get(name, ()) if name in OWNERS else [name])
        return sorted(known)

    def kinds(self) -> list[str]:
        """Return the kinds of installed plugins; import those plugins that are not of this project."""
        for name in self._entries:
            if name not in OWNERS:
                with contextlib.suppress(PluginError):
                    self.load(name)
        failed = {name for name in self._entries if name not in OWNERS and not self.is_loaded(name)}
        return [kind for kind in self.known_kinds() if kind not in failed]

    def rule(self, name: str) -> Rule:
        """Return the activation rule of a name; import the plugin that owns it and no other.

        Raises:
            ConfigError: no installed plugin registers it.
            PluginError: the plugin that owns it cannot be used.
        """
        self.load(RULES_OWNER)
        if name not in self._rules and KIND.fullmatch(name) and (owner := name.partition(".")[0]) in self._entries:
            self.load(owner)
        if name not in self._rules:
            raise ConfigError(
                f"no installed plugin has the activation rule {shown(name)}. {did_you_mean(name, self._rules)}"
            )
        return self._rules[name]

    def anatomy(self, model: nn.Module) -> Blocks | None:
        """Ask the loaded plugins where a model keeps its blocks; return None if none knows it. Errors as in `ask`."""
        blocks: Blocks | None = self._first("featurizers_anatomy", None, {"model": model})
        return blocks

    def backend(self, model: object, part: nn.Module | None = None) -> Any:
        """Ask the plugin of a model's library, and the loaded plugins, how the model is held.

        Args:
            model: given by the user.
            part: module of the model whose library to ask; None for that of the model itself.

        Returns:
            What the first plugin returns that knows the model; None if none does. Plugins are not asked about classes
            of torch and `transformers`.

        Raises:
            MissingDependencyError: the plugin of this project for the library is not installed.
            PluginError: a plugin cannot be used, or fails.
        """
        cls, arguments = type(model if part is None else part), {"model": model, "part": part}
        packages = _packages(cls)  # type: ignore[arg-type]  # a class is hashable
        for name in packages:
            if name in FIRST_PARTY and name not in HOLDERS:
                continue  # it holds no models
            if name in self._entries or name in self._refused:
                if (found := self.ask("featurizers_backend", name, **arguments)) is not None:
                    return found
            elif name in FIRST_PARTY:
                purpose = f"a model with a {cls.__name__} of {shown(cls.__module__.partition('.')[0])}"
                raise MissingDependencyError(purpose, FIRST_PARTY[name], f"pip install {FIRST_PARTY[name]}")
        return self._first("featurizers_backend", None, arguments) if packages else None

    def _collect(self, name: str) -> None:
        classes: dict[str, type[FeatureSpace[Any]]] = {}
        rules: dict[str, Rule] = {}
        for hook in self._hooks("featurizers_register", name):
            hook.function(*(functools.partial(_add, classes, _checked_kind, name) for _ in hook.argnames))
        for hook in self._hooks("featurizers_rules", name):
            hook.function(*(functools.partial(_add, rules, _checked_rule, name) for _ in hook.argnames))
        if rules and name != RULES_OWNER:
            self.load(RULES_OWNER)
            if taken := self._rules.keys() & rules:
                raise PluginError(f"it registers the rule {shown(taken.pop())}, which is the core's")
        self._classes.update(classes)
        self._rules.update(rules)
        self._owned_rules[name] = set(rules)

    def _forget(self, name: str) -> None:
        super()._forget(name)
        self._classes = {kind: cls for kind, cls in self._classes.items() if kind.partition(".")[0] != name}
        owned = self._owned_rules.pop(name, set())  # the names of the core's rules do not tell their plugin
        self._rules = {title: rule for title, rule in self._rules.items() if title not in owned}


@functools.cache
def _packages(cls: type) -> tuple[str, ...]:
    """Return the plugins that may belong to the packages of a class and its bases; none for torch's and transformers'.

    Args:
        cls: class of a model.
    """
    packages = dict.fromkeys(base.__module__.partition(".")[0] for base in cls.__mro__)
    return tuple(name.replace("_", "-") for name in packages if name not in _ASKED_NOBODY)


_ASKED_NOBODY = frozenset({"abc", "builtins", "peft", "torch", "transformers", "typing"})
"""Packages whose classes are modules of torch, or bases of any class."""


@functools.cache
def host() -> PluginHost:
    """Return the plugin host of this process."""
    return PluginHost()


def plugins() -> list[PluginInfo]:
    """List every installed plugin with its state; import none of them."""
    return host().plugins()


def check_plugins() -> list[PluginInfo]:
    """Import every installed plugin and list them, for the CI of a program that needs them all.

    Raises:
        PluginError: some plugins cannot be used; the message names each of them.
    """
    host().load_all()
    if errors := [str(info.error) for info in plugins() if info.state != "loaded"]:
        raise PluginError("; ".join(errors))
    return plugins()


def kinds() -> list[str]:
    """Return the names of the installed kinds, which `create` and `load` know.

    The kinds of this project's plugins are known without importing these; other plugins are imported.
    """
    return host().kinds()


def create(kind: str, **config: Any) -> Any:
    """Build a new featurizer or site map of a kind, from the keyword arguments of its config.

    ``featurizers kinds`` lists the kinds, and ``featurizers kinds KIND`` the arguments of one with their types and
    defaults: they are the fields of the kind's ``Config``. Most kinds take ``d_in``, the width of the activations, and
    ``n_features``. The classes of kinds have further constructors, such as
    ``featurizers_subspace.SubspaceFeaturizer.from_basis``, which a type checker knows.

    Args:
        kind: such as ``"subspace"``.
        **config: arguments of the kind.

    Raises:
        UnknownKindError: no installed plugin provides the kind.
        ConfigError: the kind refuses the arguments; the message lists those that it takes.
        UsageError: the kind is not a string.

    Examples:
        >>> create("subspace", d_in=768, n_features=16, seed=0).n_features
        16
    """
    if not isinstance(kind, str):
        raise UsageError(f"a kind is a string such as 'subspace', not {shown(kind)}")
    return build(host().featurizer_class(kind), config)


def build(cls: type[FeatureSpace[Any]], config: Mapping[str, Any]) -> Any:
    """Build a new featurizer or site map of a class, from the keyword arguments of its config.

    Raises:
        ConfigError: the kind refuses them.
    """
    from pydantic import ValidationError

    try:
        validated = cls.Config.model_validate(dict(config))
    except ValidationError as error:
        raise ConfigError(f"{cls.kind}: {explain(error)}. {_takes(cls, config)}") from error
    return cls(validated)


def _takes(cls: type[FeatureSpace[Any]], config: Mapping[str, Any]) -> str:
    """Return a sentence on the arguments of a class, or on the one that a misspelt argument may mean."""
    from featurizers.registry.kind_arguments import arguments

    known = arguments(cls.Config)
    listed = f"The arguments of {cls.kind!r}: {', '.join(map(str, known))}"
    unknown = [name for name in config if name not in cls.Config.model_fields]
    return did_you_mean(unknown[0], (each.name for each in known), listed) if unknown else listed


def _add(registered: dict[str, Any], check: Callable[[str, Any], str], plugin: str, item: Any) -> None:
    if (name := check(plugin, item)) in registered:
        raise PluginError(f"it registers {shown(name)} twice")
    registered[name] = item


def _checked_kind(plugin: str, cls: Any) -> str:
    from featurizers.features.featurizer import Featurizer
    from featurizers.features.site_map import SiteMap

    is_map = isinstance(cls, type) and issubclass(cls, SiteMap)
    return checked_class(SiteMap if is_map else Featurizer, plugin, cls)


def checked_class(base: type, plugin: str, cls: Any) -> str:
    """Check a class that a plugin registers, and return its kind.

    Args:
        base: class that it must derive from.
        plugin: name that its kind must be, or must begin with.
        cls: the class.

    Raises:
        PluginError: the class, its ``kind`` or its ``Config`` is not as the registry requires.
    """
    from pydantic import BaseModel

    if not (isinstance(cls, type) and issubclass(cls, base)):
        raise PluginError(f"it registers {shown(cls)}, which is not a subclass of featurizers.{base.__name__}")
    kind, config = getattr(cls, "kind", None), getattr(cls, "Config", None)
    if not (isinstance(kind, str) and KIND.fullmatch(kind) and kind.partition(".")[0] == plugin):
        raise PluginError(f"{cls.__name__}.kind is {shown(kind)}; it must be {plugin!r} or start with '{plugin}.'")
    if not (isinstance(config, type) and issubclass(config, BaseModel)):
        raise PluginError(f"{cls.__name__}.Config is {shown(config)}; it must be a pydantic model")
    if not (config.model_config.get("strict") and config.model_config.get("extra") == "forbid"):
        raise PluginError(f'{cls.__name__}.Config needs model_config = ConfigDict(strict=True, extra="forbid")')
    return kind


def _checked_rule(plugin: str, rule: Any) -> str:
    from featurizers.features.rules import Rule

    if not isinstance(rule, Rule):
        raise PluginError(f"it registers {shown(rule)}, which is not made by featurizers.activation_rule")
    if plugin != RULES_OWNER and not (KIND.fullmatch(rule.name) and rule.name.partition(".")[0] == plugin):
        raise PluginError(f"its rule is named {shown(rule.name)}; it must be {plugin!r} or start with '{plugin}.'")
    return rule.name
