"""Finds plugins without importing them, and imports the one that owns a kind when it is asked for.

Discovery reads `importlib.metadata` only. It is our own and not pluggy's, because pluggy's drops the second of
two distributions that use one entry-point name without a word. One that is unfit is named, and the others go on.
"""

from __future__ import annotations

import contextlib
import functools
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from featurizers.errors import (
    ConfigError,
    FeaturizerError,
    PluginConflictError,
    PluginError,
    PluginLoadError,
    UnknownKindError,
    one_line,
    shown,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from importlib.metadata import EntryPoint

    from pluggy import HookImpl
    from torch import nn

    from featurizers.anatomy import Blocks
    from featurizers.featurizer import Featurizer
    from featurizers.rules import Rule

GROUP = "featurizers"
RULES = "dictionary"  # the plugin of the core that registers the activation rules without a prefix
NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
KIND = re.compile(rf"{NAME.pattern}(\.{NAME.pattern})?")

# A pip command is printed only for what this project publishes itself, never for a name that a file gives.
FIRST_PARTY = {
    "autoencoder": "featurizers-autoencoder",
    "causal-basis": "featurizers-causal-basis",
    "causalab": "featurizers-causalab",
    "derived-scalars": "featurizers-derived-scalars",
    "dictionary-learning": "featurizers-dictionary-learning",
    "identity": "featurizers-identity",
    "sae-lens": "featurizers-sae-lens",
    "sparsify": "featurizers-sparsify",
    "standardize": "featurizers-subspace",
    "subspace": "featurizers-subspace",
    "training": "featurizers-training",
}
OWNERS = {**FIRST_PARTY, "composition": "featurizers", "dictionary": "featurizers"}  # no other may provide these


@dataclass(frozen=True)
class PluginInfo:
    """One installed plugin, as `plugins` lists it.

    Attributes:
        name: entry-point name, which is also the kind it provides; its `repr` if it cannot be a kind's name.
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
        import pluggy

        from featurizers import hookspecs

        self._manager = pluggy.PluginManager(GROUP)
        self._manager.add_hookspecs(hookspecs)
        self._entries: dict[str, list[EntryPoint]] = {}
        self._refused: dict[str, list[PluginInfo]] = {}
        self._classes: dict[str, type[Featurizer[Any]]] = {}
        self._rules: dict[str, Rule] = {}
        self._owned_rules: dict[str, set[str]] = {}
        self._failures: dict[str, PluginLoadError] = {}
        # One distribution may be listed twice, once a path; the first on the path is the one imported.
        entries = {(entry.name, entry.value, _distribution(entry)): entry for entry in reversed(_discovered())}
        for entry in reversed(entries.values()):
            if refused := _refused(entry):
                self._refused.setdefault(entry.name, []).append(refused)
            else:
                self._entries.setdefault(entry.name, []).append(entry)

    def plugins(self) -> list[PluginInfo]:
        """Every installed plugin, by name; imports none."""
        rows = [self._info(name, entries) for name, entries in self._entries.items()]
        rows += (row for refused in self._refused.values() for row in refused)
        return sorted(rows, key=lambda info: (info.name, info.distribution))

    def _info(self, name: str, entries: list[EntryPoint]) -> PluginInfo:
        distributions, versions = map(" and ".join, zip(*map(_claimant, entries), strict=True))
        info = PluginInfo(name, distributions, versions, "loaded" if self.is_loaded(name) else "available")
        if len(entries) > 1:
            return replace(info, state="conflict", error=str(PluginConflictError(name, map(_distribution, entries))))
        if info.state == "available" and (failure := self._failure(name, entries[0])):
            return replace(info, state="failed", error=str(failure))
        return info

    def _failure(self, name: str, entry: EntryPoint) -> PluginLoadError | None:
        """Why a plugin cannot be imported, as far as is known without importing it."""
        if name not in self._failures and (reason := _unmet(entry)):
            self._failures[name] = PluginLoadError(name, _distribution(entry), reason)
        return self._failures.get(name)

    def is_loaded(self, name: str) -> bool:
        """Whether the plugin of that name has been imported and registered."""
        return self._manager.has_plugin(name)

    def load(self, name: str) -> None:
        """Import one plugin and register its kinds; does nothing the second time.

        Raises:
            UnknownKindError: no distribution has an entry point of that name.
            PluginConflictError: several do.
            PluginLoadError: it fails, or it is made for another version of the core.
            PluginError: the only one that does is refused.
        """
        if self.is_loaded(name):
            return
        entries = self._entries.get(name, [])
        if not entries:
            if name in self._refused:
                hint = f" {_hint(name)}" if install_command(name) else ""
                raise PluginError(f"{'; '.join(str(row.error) for row in self._refused[name])}.{hint}")
            raise UnknownKindError(name, self._entries, _hint(name))
        if len(entries) > 1:
            raise PluginConflictError(name, map(_distribution, entries))
        if failure := self._failure(name, entries[0]):
            raise failure
        try:
            module = entries[0].load()
            self._forget(name)  # it may have asked for itself while it was imported, before all its hooks were there
            self._register(name, module)
        except BaseException as error:  # a plugin may call sys.exit()
            self._forget(name)
            if isinstance(error, (KeyboardInterrupt, GeneratorExit)):
                raise
            self._failures[name] = PluginLoadError(name, _distribution(entries[0]), _reason(error))
            raise self._failures[name] from error

    def _forget(self, name: str) -> None:
        if self.is_loaded(name):
            self._manager.unregister(name=name)
        self._classes = {kind: cls for kind, cls in self._classes.items() if kind.partition(".")[0] != name}
        owned = self._owned_rules.pop(name, set())  # the core's own are named like no plugin, or like any
        self._rules = {title: rule for title, rule in self._rules.items() if title not in owned}

    def _register(self, name: str, module: object) -> None:
        if module is None or self._manager.register(module, name) is None:
            raise PluginError("its entry point is None")
        self._manager.check_pending()
        for caller in self._manager.get_hookcallers(module) or []:
            if any(hook.wrapper or hook.hookwrapper for hook in self._hooks(caller.name, name)):
                raise PluginError(f"its {caller.name} is a wrapper, but the plugins are asked one by one")
        classes: dict[str, type[Featurizer[Any]]] = {}
        rules: dict[str, Rule] = {}
        for hook in self._hooks("featurizers_register", name):
            hook.function(*(functools.partial(_add, classes, _checked_kind, name) for _ in hook.argnames))
        for hook in self._hooks("featurizers_rules", name):
            hook.function(*(functools.partial(_add, rules, _checked_rule, name) for _ in hook.argnames))
        if rules and name != RULES:
            self.load(RULES)
            if taken := self._rules.keys() & rules:
                raise PluginError(f"it registers the rule {shown(taken.pop())}, which is the core's")
        self._classes.update(classes)
        self._rules.update(rules)
        self._owned_rules[name] = set(rules)

    def featurizer_class(self, kind: str) -> type[Featurizer[Any]]:
        """The class that is registered for a kind; imports the plugin that owns it and no other.

        Raises:
            UnknownKindError: it is not registered, or not a kind's name at all.
            PluginError: the plugin that owns it cannot be used.
        """
        if kind not in self._classes:
            if not KIND.fullmatch(kind):
                hint = "A kind is lower-case words joined by '-', never an import path."
                raise UnknownKindError(kind, self._entries, hint)
            self.load(kind.partition(".")[0])
        if kind not in self._classes:
            hint = f"The plugin {kind!r} provides no kind of that name; its README says what it does."
            known = {*self._entries, *self._classes}
            raise UnknownKindError(kind, known, hint if self.is_loaded(kind) else _hint(kind))
        return self._classes[kind]

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
            known = ", ".join(sorted(self._rules))
            raise ConfigError(f"no installed plugin has the activation rule {shown(name)}; known rules: {known}")
        return self._rules[name]

    def ask(self, hook: str, plugin: str | None = None, **arguments: Any) -> Any:
        """What a plugin answers to a hook, or the first of all plugins that answers.

        A plugin that raises an error of ours has recognised what it was given, and refuses it: that is the answer.

        Raises:
            PluginError: the plugin cannot be used, or one raises something else and no other answers.
        """
        self.load_all() if plugin is None else self.load(plugin)
        return self._first(hook, plugin, arguments)

    def anatomy(self, model: nn.Module) -> Blocks | None:
        """What the ``featurizers_anatomy`` hooks of the plugins loaded so far say of a model; faults as in `ask`."""
        found: Blocks | None = self._first("featurizers_anatomy", None, {"model": model})
        return found

    def _first(self, name: str, plugin: str | None, arguments: dict[str, Any]) -> Any:
        """The first answer, of one plugin or of all that are loaded; one that fails does not silence the others."""
        faults: list[str] = []
        cause: BaseException | None = None
        for hook in self._hooks(name, plugin):
            try:
                if (answer := hook.function(*(arguments[key] for key in hook.argnames))) is not None:
                    return answer
            except FeaturizerError:
                raise
            except (Exception, SystemExit) as error:
                owner = " and ".join(map(_distribution, self._entries.get(hook.plugin_name, [])))
                faults.append(f"the plugin {hook.plugin_name!r} of {owner} fails in its {name}: {_reason(error)}")
                cause = cause or error
        if faults:
            raise PluginError(f"{'; '.join(faults)}. Upgrade or uninstall that distribution.") from cause
        return None

    def _hooks(self, name: str, plugin: str | None) -> list[HookImpl]:
        """The implementations of a hook, of one plugin or of all, in the order in which pluggy calls them."""
        # pluggy's own caller of a subset looks, in some versions, into the modules of all other plugins.
        found = reversed(getattr(self._manager.hook, name).get_hookimpls())
        return [hook for hook in found if plugin in (None, hook.plugin_name)]

    def load_all(self) -> None:
        """Import every plugin that can be imported; `plugins` shows those that cannot, and why."""
        for name in sorted(self._entries):
            with contextlib.suppress(PluginError):
                self.load(name)


@functools.cache
def host() -> PluginHost:
    """The plugin host of this process."""
    return PluginHost()


def plugins() -> list[PluginInfo]:
    """Every installed plugin with its state; imports none of them."""
    return host().plugins()


def check_plugins() -> list[PluginInfo]:
    """Every installed plugin, all imported: for a program's own CI, where a plugin that is left out is a failure.

    Raises:
        PluginError: some cannot be used; the message names each of them.
    """
    host().load_all()
    if errors := [str(info.error) for info in plugins() if info.state != "loaded"]:
        raise PluginError("; ".join(errors))
    return plugins()


def kinds() -> list[str]:
    """Names of the installed kinds, by their entry points; imports none of them."""
    return sorted(host()._entries)


def install_command(kind: str) -> str | None:
    """The pip command for a first-party kind, None for any other."""
    distribution = FIRST_PARTY.get(kind.partition(".")[0])
    return distribution and f"pip install {distribution}"


def _discovered() -> list[EntryPoint]:
    from importlib.metadata import distributions, entry_points

    try:
        return list(entry_points(group=GROUP))
    except Exception:  # one unreadable file of any installed package stops the reading of all
        found: list[EntryPoint] = []
        for distribution in distributions():
            with contextlib.suppress(Exception):
                found += distribution.entry_points.select(group=GROUP)
        return found


def _claimant(entry: EntryPoint) -> tuple[str, str]:
    """Name and version of an entry point's distribution, fit to print; ``?`` for what its metadata lack."""
    name = version = "?"
    with contextlib.suppress(Exception):  # no metadata, or in another encoding
        metadata: Any = entry.dist and entry.dist.metadata  # which are parsed anew each time
        name, version = (str((metadata.get_all(field) or ["?"])[0]) for field in ("Name", "Version"))
    return _plain(name), _plain(version)


def _distribution(entry: EntryPoint) -> str:
    name, version = _claimant(entry)
    return shown(entry.value) if name == "?" else f"{name} {version}"


def _plain(text: str) -> str:
    """A name, a version or a specifier as it is, and anything else that metadata hold as its `repr`."""
    return text if re.fullmatch(r"\?|[A-Za-z0-9.,<>=!~+*_-]{1,80}", text) else shown(text)


def _refused(entry: EntryPoint) -> PluginInfo | None:
    """The row of an entry point that is never imported, whatever is in it; None if it may be."""
    name, claimant, version = entry.name, *_claimant(entry)
    if not NAME.fullmatch(name):
        name = shown(name)
        reason = "a plugin's name is lower-case words joined by '-'; uninstall that distribution"
    elif (owner := OWNERS.get(name)) and re.sub(r"[-_.]+", "-", claimant).lower() != owner:
        reason = f"the name {name!r} belongs to {owner}; uninstall {claimant}"
    else:
        return None
    error = f"the plugin {shown(entry.name)} of {_distribution(entry)} is refused: {reason}"
    return PluginInfo(name, claimant, version, "failed", error)


def _unmet(entry: EntryPoint) -> str | None:
    """Why a distribution's own metadata say that it cannot work with this core; None if they do not."""
    from featurizers import __version__

    try:
        for text in (entry.dist.requires if entry.dist else None) or []:
            # What it needs of other projects is its installer's business, and parsing that would take longer.
            if not re.match(r"\s*(featurizers(?![\w.-])|[^a-z0-9\s]|$)", text, re.IGNORECASE):
                continue
            from packaging.requirements import Requirement

            need = Requirement(text)
            applies = need.marker is None or need.marker.evaluate({"extra": ""})
            if applies and not need.specifier.contains(__version__, prereleases=True):
                return f"it needs featurizers {_plain(str(need.specifier))}, this is {__version__}"
    except Exception as error:
        return f"what it requires cannot be read: {_reason(error)}"
    return None


def _reason(error: BaseException) -> str:
    """What a plugin raised, in one line; what we say of it ourselves is left as it is."""
    message = "?"
    with contextlib.suppress(Exception):  # this is the plugin's code as well
        message = str(error)
    ours = isinstance(error, PluginError)
    return one_line(message, 200) if ours else f"{type(error).__name__}: {shown(message, 200)}"


def _hint(kind: str) -> str:
    command = install_command(kind)
    return f"Install it with: {command}." if command else "Install the package of its author."


def _add(found: dict[str, Any], check: Callable[[str, Any], str], plugin: str, given: Any) -> None:
    if (name := check(plugin, given)) in found:
        raise PluginError(f"it registers {shown(name)} twice")
    found[name] = given


def _checked_kind(plugin: str, cls: Any) -> str:
    from featurizers.featurizer import Featurizer

    return checked_class(Featurizer, plugin, cls)


def checked_class(base: type, plugin: str, cls: Any) -> str:
    """The name under which a plugin registers a class, if both are as ``base`` asks.

    Raises:
        PluginError: they are not.
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
    from featurizers.rules import Rule

    if not isinstance(rule, Rule):
        raise PluginError(f"it registers {shown(rule)}, which is not made by featurizers.activation_rule")
    if plugin != RULES and not (KIND.fullmatch(rule.name) and rule.name.partition(".")[0] == plugin):
        raise PluginError(f"its rule is named {shown(rule.name)}; it must be {plugin!r} or start with '{plugin}.'")
    return rule.name
