"""Finds plugins without importing them, and imports the one that owns a kind when it is asked for.

Discovery reads `importlib.metadata` only. It is our own and not pluggy's, because pluggy's drops the second of
two distributions that use one entry-point name without a word.
"""

from __future__ import annotations

import contextlib
import functools
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from featurizers.errors import ConfigError, PluginConflictError, PluginError, PluginLoadError, UnknownKindError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

    from torch import nn

    from featurizers.anatomy import Blocks
    from featurizers.featurizer import Featurizer
    from featurizers.rules import Rule

GROUP = "featurizers"
RULES = "dictionary"
"""The plugin of the core that registers the activation rules without a prefix."""
KIND = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*(\.[a-z0-9]+(-[a-z0-9]+)*)?")

# A pip command is printed only for what this project publishes itself, never for a name that a file gives.
FIRST_PARTY = {
    "autoencoder": "featurizers-autoencoder",
    "dictionary-learning": "featurizers-dictionary-learning",
    "identity": "featurizers-identity",
    "sae-lens": "featurizers-sae-lens",
    "sparsify": "featurizers-sparsify",
    "standardize": "featurizers-subspace",
    "subspace": "featurizers-subspace",
}


@dataclass(frozen=True)
class PluginInfo:
    """One installed plugin, as `plugins` lists it.

    Attributes:
        name: entry-point name, which is also the kind it provides.
        distribution: name of the distribution, or of all that claim the name.
        version: version of the distribution.
        state: ``available`` (not imported yet), ``loaded``, ``failed`` or ``conflict``.
        error: why it cannot be used, else None.
    """

    name: str
    distribution: str
    version: str
    state: Literal["available", "loaded", "failed", "conflict"]
    error: str | None = None


class PluginHost:
    """The installed plugins of one process; `host` gives the only one that programs need."""

    def __init__(self) -> None:
        from importlib.metadata import entry_points

        import pluggy

        from featurizers import hookspecs

        self._manager = pluggy.PluginManager(GROUP)
        self._manager.add_hookspecs(hookspecs)
        self._entries: dict[str, list[EntryPoint]] = {}
        self._classes: dict[str, type[Featurizer[Any]]] = {}
        self._rules: dict[str, Rule] = {}
        self._failures: dict[str, PluginLoadError] = {}
        seen = set()
        for entry in entry_points(group=GROUP):
            # One distribution may be listed twice, once a path; the first on the path is the one imported.
            if (key := (entry.name, entry.value, _distribution(entry))) not in seen:
                seen.add(key)
                self._entries.setdefault(entry.name, []).append(entry)

    def plugins(self) -> list[PluginInfo]:
        """Every installed plugin, by name; imports none."""
        return [self._info(name, entries) for name, entries in sorted(self._entries.items())]

    def _info(self, name: str, entries: list[EntryPoint]) -> PluginInfo:
        distributions = " and ".join(entry.dist.name if entry.dist else "?" for entry in entries)
        version = " and ".join(entry.dist.version if entry.dist else "?" for entry in entries)
        if len(entries) > 1:
            error = PluginConflictError(name, map(_distribution, entries))
            return PluginInfo(name, distributions, version, "conflict", str(error))
        if name in self._failures:
            return PluginInfo(name, distributions, version, "failed", str(self._failures[name]))
        return PluginInfo(name, distributions, version, "loaded" if self.is_loaded(name) else "available")

    def is_loaded(self, name: str) -> bool:
        """Whether the plugin of that name has been imported and registered."""
        return self._manager.has_plugin(name)

    def load(self, name: str) -> None:
        """Import one plugin and register its kinds; does nothing the second time.

        Raises:
            UnknownKindError: no distribution has an entry point of that name.
            PluginConflictError: several do.
            PluginLoadError: it fails.
        """
        if self.is_loaded(name):
            return
        if name in self._failures:
            raise self._failures[name]
        entries = self._entries.get(name, [])
        if not entries:
            raise UnknownKindError(name, self._entries, _hint(name))
        if len(entries) > 1:
            raise PluginConflictError(name, map(_distribution, entries))
        try:
            self._register(name, entries[0].load())
        except Exception as error:
            if self.is_loaded(name):
                self._manager.unregister(name=name)
            reason = str(error) if isinstance(error, PluginError) else f"{type(error).__name__}: {error}"
            self._failures[name] = PluginLoadError(name, _distribution(entries[0]), reason)
            raise self._failures[name] from error

    def _register(self, name: str, module: object) -> None:
        self._manager.register(module, name)
        self._manager.check_pending()
        others = [plugin for other, plugin in self._manager.list_name_plugin() if other != name]
        classes: dict[str, type[Featurizer[Any]]] = {}

        def register(cls: type[Featurizer[Any]]) -> None:
            kind = _checked_kind(name, cls)
            if kind in classes:
                raise PluginError(f"it registers the kind {kind!r} twice")
            classes[kind] = cls

        rules: dict[str, Rule] = {}

        def register_rule(rule: Rule) -> None:
            if (title := _checked_rule(name, rule)) in rules:
                raise PluginError(f"it registers the rule {title!r} twice")
            rules[title] = rule

        self._manager.subset_hook_caller("featurizers_register", others)(register=register)
        self._manager.subset_hook_caller("featurizers_rules", others)(register=register_rule)
        self._classes.update(classes)
        self._rules.update(rules)

    def featurizer_class(self, kind: str) -> type[Featurizer[Any]]:
        """The class that is registered for a kind; imports the plugin that owns it and no other.

        Raises:
            UnknownKindError: it is not registered, or not a kind's name at all.
            PluginError: the plugin that owns it cannot be used.
        """
        if kind not in self._classes:
            if not KIND.fullmatch(kind):
                raise UnknownKindError(
                    kind, self._entries, "A kind is lower-case words joined by '-', never an import path."
                )
            self.load(kind.partition(".")[0])
        try:
            return self._classes[kind]
        except KeyError:
            hint = (
                f"The plugin {kind!r} provides no kind of that name; its README says what it does."
                if self.is_loaded(kind)
                else ""
            )
            raise UnknownKindError(kind, {*self._entries, *self._classes}, hint or _hint(kind)) from None

    def rule(self, name: str) -> Rule:
        """The activation rule of a name; imports the plugin that owns it and no other.

        Raises:
            ConfigError: no installed plugin registers it.
            PluginError: the plugin that owns it cannot be used.
        """
        self.load(RULES)
        if name not in self._rules and KIND.fullmatch(name) and (owner := name.partition(".")[0]) in self._entries:
            self.load(owner)
        if name not in self._rules:
            raise ConfigError(
                f"no installed plugin has the activation rule {name!r}; known rules: {', '.join(sorted(self._rules))}"
            )
        return self._rules[name]

    def ask(self, hook: str, plugin: str | None = None, **arguments: Any) -> Any:
        """What a plugin answers to a hook, or the first of all plugins that answers.

        Raises:
            PluginError: the plugin cannot be used.
        """
        if plugin is None:
            self.load_all()
            return getattr(self._manager.hook, hook)(**arguments)
        self.load(plugin)
        others = [module for name, module in self._manager.list_name_plugin() if name != plugin]
        return self._manager.subset_hook_caller(hook, others)(**arguments)

    def anatomy(self, model: nn.Module) -> Blocks | None:
        """What the ``featurizers_anatomy`` hooks of the plugins loaded so far say of a model."""
        found: Blocks | None = self._manager.hook.featurizers_anatomy(model=model)
        return found

    def load_all(self) -> None:
        """Import every plugin that can be imported; `plugins` shows those that cannot, and why."""
        for info in self.plugins():
            if info.state == "available":
                with contextlib.suppress(PluginError):
                    self.load(info.name)


@functools.cache
def host() -> PluginHost:
    """The plugin host of this process."""
    return PluginHost()


def plugins() -> list[PluginInfo]:
    """Every installed plugin with its state; imports none of them."""
    return host().plugins()


def kinds() -> list[str]:
    """Names of the installed kinds, by their entry points; imports none of them."""
    return [info.name for info in plugins()]


def install_command(kind: str) -> str | None:
    """The pip command for a first-party kind, None for any other."""
    distribution = FIRST_PARTY.get(kind.partition(".")[0])
    return distribution and f"pip install {distribution}"


def _distribution(entry: EntryPoint) -> str:
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else repr(entry.value)


def _hint(kind: str) -> str:
    command = install_command(kind)
    return f"Install it with: {command}." if command else "Install the package of its author."


def _checked_kind(plugin: str, cls: Any) -> str:
    from pydantic import BaseModel

    from featurizers.featurizer import Featurizer

    if not (isinstance(cls, type) and issubclass(cls, Featurizer)):
        raise PluginError(f"it registers {cls!r}, which is not a subclass of featurizers.Featurizer")
    kind, config = getattr(cls, "kind", None), getattr(cls, "Config", None)
    if not (isinstance(kind, str) and KIND.fullmatch(kind) and kind.partition(".")[0] == plugin):
        raise PluginError(f"{cls.__name__}.kind is {kind!r}; it must be {plugin!r} or start with '{plugin}.'")
    if not (isinstance(config, type) and issubclass(config, BaseModel)):
        raise PluginError(f"{cls.__name__}.Config is {config!r}; it must be a pydantic model")
    if not (config.model_config.get("strict") and config.model_config.get("extra") == "forbid"):
        raise PluginError(f'{cls.__name__}.Config needs model_config = ConfigDict(strict=True, extra="forbid")')
    return kind


def _checked_rule(plugin: str, rule: Any) -> str:
    from featurizers.rules import Rule

    if not isinstance(rule, Rule):
        raise PluginError(f"it registers {rule!r}, which is not made by featurizers.activation_rule")
    if plugin != RULES and not (KIND.fullmatch(rule.name) and rule.name.partition(".")[0] == plugin):
        raise PluginError(f"its rule is named {rule.name!r}; it must be {plugin!r} or start with '{plugin}.'")
    return rule.name
