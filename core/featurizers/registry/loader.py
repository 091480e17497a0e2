"""Finds plugins without importing them, and imports the one that owns a kind when it is asked for.

Discovery reads `importlib.metadata` only. It is our own and not pluggy's, because pluggy's drops the second of
two distributions that use one entry-point name without a word. One that is unfit is named, and the others go on.
"""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from featurizers.errors import (
    FeaturizerError,
    PluginConflictError,
    PluginError,
    PluginLoadError,
    UnknownKindError,
    one_line,
    shown,
)
from featurizers.names import NAME, OWNERS, install_command, install_hint
from featurizers.version import __version__

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

    from pluggy import HookImpl

GROUP = "featurizers"


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


class PluginLoader:
    """The installed plugins of one process; `host` gives the only one that programs need."""

    def __init__(self) -> None:
        import pluggy

        from featurizers.registry import hookspecs

        self._manager = pluggy.PluginManager(GROUP)
        self._manager.add_hookspecs(hookspecs)
        self._entries: dict[str, list[EntryPoint]] = {}
        self._refused: dict[str, list[PluginInfo]] = {}
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
                hint = f" {install_hint(name)}" if install_command(name) else ""
                raise PluginError(f"{'; '.join(str(row.error) for row in self._refused[name])}.{hint}")
            raise UnknownKindError(name, self._entries, install_hint(name))
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

    def module(self, name: str) -> Any:
        """Return the module of one plugin, imported as by `load`; for names of a plugin that the core forwards.

        Raises:
            PluginError: as `load`.
        """
        self.load(name)
        return self._manager.get_plugin(name)

    def _forget(self, name: str) -> None:
        if self.is_loaded(name):
            self._manager.unregister(name=name)

    def _collect(self, name: str) -> None:
        """Take what a plugin registers; what is raised here makes the plugin a failed one."""

    def _register(self, name: str, module: object) -> None:
        if module is None or self._manager.register(module, name) is None:
            raise PluginError("its entry point is None")
        self._manager.check_pending()
        for caller in self._manager.get_hookcallers(module) or []:
            if any(hook.wrapper or hook.hookwrapper for hook in self._hooks(caller.name, name)):
                raise PluginError(f"its {caller.name} is a wrapper, but the plugins are asked one by one")
        self._collect(name)

    def ask(self, hook: str, plugin: str | None = None, **arguments: Any) -> Any:
        """What a plugin answers to a hook, or the first of all plugins that answers.

        A plugin that raises an error of ours has recognised what it was given, and refuses it: that is the answer.

        Raises:
            PluginError: the plugin cannot be used, or one raises something else and no other answers.
        """
        self.load_all() if plugin is None else self.load(plugin)
        return self._first(hook, plugin, arguments)

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
