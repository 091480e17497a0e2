"""List of the installed plugins without importing them, and import of a plugin when its kind is needed.

A broken plugin is reported by name; the others still load.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from featurizers.errors import (
    FeaturizerError,
    PluginConflictError,
    PluginError,
    PluginLoadError,
    UnknownKindError,
    shown,
)
from featurizers.names import NAME, OWNERS, install_command, install_hint, same_project
from featurizers.registry.entry_points import claimant, discovered, distribution_of, reason_of, unmet

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

    from pluggy import HookImpl

GROUP = "featurizers"


@dataclass(frozen=True)
class PluginInfo:
    """Row of an installed plugin in `plugins`.

    Attributes:
        name: entry-point name, which is also the kind it provides; its `repr` if it cannot be a kind's name.
        distribution: name of the distribution, or of all distributions that claim the name.
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
    """Installed plugins of one process; base of `PluginHost`."""

    def __init__(self) -> None:
        import pluggy

        from featurizers.registry import hookspecs

        self._manager = pluggy.PluginManager(GROUP)
        self._manager.add_hookspecs(hookspecs)
        self._entries: dict[str, list[EntryPoint]] = {}
        self._refused: dict[str, list[PluginInfo]] = {}
        self._failures: dict[str, PluginLoadError] = {}
        for entry in discovered(GROUP):
            if refused := _refused(entry):
                self._refused.setdefault(entry.name, []).append(refused)
            else:
                self._entries.setdefault(entry.name, []).append(entry)

    def names(self) -> list[str]:
        """Return the names of the installed plugins that may be imported; import none."""
        return sorted(self._entries)

    def known_kinds(self) -> list[str]:
        """Return the names that an unknown kind is compared with in an error."""
        return self.names()

    def plugins(self) -> list[PluginInfo]:
        """List every installed plugin, by name; import none."""
        rows = [self._info(name, entries) for name, entries in self._entries.items()]
        rows += (row for refused in self._refused.values() for row in refused)
        return sorted(rows, key=lambda info: (info.name, info.distribution))

    def _info(self, name: str, entries: list[EntryPoint]) -> PluginInfo:
        distributions, versions = map(" and ".join, zip(*map(claimant, entries), strict=True))
        info = PluginInfo(name, distributions, versions, "loaded" if self.is_loaded(name) else "available")
        if len(entries) > 1:
            return replace(info, state="conflict", error=str(PluginConflictError(name, map(distribution_of, entries))))
        if info.state == "available" and (failure := self._failure(name, entries[0])):
            return replace(info, state="failed", error=str(failure))
        return info

    def _failure(self, name: str, entry: EntryPoint) -> PluginLoadError | None:
        """Return why a plugin cannot be imported, as far as is known without importing it."""
        if name not in self._failures and (reason := unmet(entry)):
            self._failures[name] = PluginLoadError(name, distribution_of(entry), reason)
        return self._failures.get(name)

    def is_loaded(self, name: str) -> bool:
        """Return whether the plugin has been imported and registered."""
        return self._manager.has_plugin(name)

    def load(self, name: str) -> None:
        """Import one plugin and register its kinds; do nothing if it is loaded already.

        Raises:
            UnknownKindError: no distribution has an entry point of that name.
            PluginConflictError: several distributions have one.
            PluginLoadError: the plugin fails, or needs another version of the core.
            PluginError: the plugin is refused, because its name belongs to another distribution.
        """
        if self.is_loaded(name):
            return
        entries = self._entries.get(name, [])
        if not entries:
            if name in self._refused:
                hint = f" {install_hint(name)}" if install_command(name) else ""
                raise PluginError(f"{'; '.join(str(row.error) for row in self._refused[name])}.{hint}")
            raise UnknownKindError(name, self.known_kinds(), install_hint(name))
        if len(entries) > 1:
            raise PluginConflictError(name, map(distribution_of, entries))
        if failure := self._failure(name, entries[0]):
            raise failure
        try:
            module = entries[0].load()
            self._forget(name)  # its import may have loaded it recursively, with only some of its hooks defined
            self._register(name, module)
        except BaseException as error:  # a plugin may call sys.exit()
            self._forget(name)
            if isinstance(error, (KeyboardInterrupt, GeneratorExit)):
                raise
            self._failures[name] = PluginLoadError(name, distribution_of(entries[0]), reason_of(error))
            raise self._failures[name] from error

    def module(self, name: str) -> Any:
        """Return the module of one plugin, imported as by `load`, for names of a plugin that the core forwards.

        Raises:
            PluginError: as `load`.
        """
        self.load(name)
        return self._manager.get_plugin(name)

    def _forget(self, name: str) -> None:
        if self.is_loaded(name):
            self._manager.unregister(name=name)

    def _collect(self, name: str) -> None:
        """Collect what a plugin registers; if this raises, the plugin has failed."""

    def _register(self, name: str, module: object) -> None:
        if module is None or self._manager.register(module, name) is None:
            raise PluginError("its entry point is None")
        self._manager.check_pending()
        for caller in self._manager.get_hookcallers(module) or []:
            if any(hook.wrapper or hook.hookwrapper for hook in self._hooks(caller.name, name)):
                raise PluginError(f"its {caller.name} is a wrapper, but the plugins are asked one by one")
        self._collect(name)

    def ask(self, hook: str, plugin: str | None = None, **arguments: Any) -> Any:
        """Call a hook in one plugin or in all, and return the first result that is not None.

        A `FeaturizerError` that a plugin raises ends the search: the plugin knows its input, and refuses it.

        Args:
            hook: name of the hook.
            plugin: the only plugin to ask, None for all.
            **arguments: arguments of the hook.

        Raises:
            PluginError: the plugin cannot be used; or a plugin raises another error, and no other plugin has a result.
        """
        self.load_all() if plugin is None else self.load(plugin)
        return self._first(hook, plugin, arguments)

    def _first(self, name: str, plugin: str | None, arguments: dict[str, Any]) -> Any:
        """Return the first result of one plugin or of all loaded ones; the failure of one does not stop the others."""
        faults: list[str] = []
        cause: BaseException | None = None
        for hook in self._hooks(name, plugin):
            try:
                if (result := hook.function(*(arguments[key] for key in hook.argnames))) is not None:
                    return result
            except FeaturizerError:
                raise
            except (Exception, SystemExit) as error:
                owner = " and ".join(map(distribution_of, self._entries.get(hook.plugin_name, [])))
                faults.append(f"the plugin {hook.plugin_name!r} of {owner} fails in its {name}: {reason_of(error)}")
                cause = cause or error
        if faults:
            raise PluginError(f"{'; '.join(faults)}. Upgrade or uninstall that distribution.") from cause
        return None

    def asked(self, hook: str) -> list[str]:
        """Return the names of the loaded plugins that have a hook."""
        return sorted({each.plugin_name for each in self._hooks(hook, None)})

    def _hooks(self, name: str, plugin: str | None) -> list[HookImpl]:
        """Return the implementations of a hook in one plugin or in all, in the order in which pluggy calls them."""
        # pluggy's subset_hook_caller inspects the modules of all other plugins in some versions
        implementations = reversed(getattr(self._manager.hook, name).get_hookimpls())
        return [hook for hook in implementations if plugin in (None, hook.plugin_name)]

    def load_all(self) -> None:
        """Import every plugin that can be imported; `plugins` tells why the others cannot."""
        for name in sorted(self._entries):
            with contextlib.suppress(PluginError):
                self.load(name)


def _refused(entry: EntryPoint) -> PluginInfo | None:
    """Return the row of an entry point that must never be imported; None if it may be imported."""
    name, project, version = entry.name, *claimant(entry)
    if not NAME.fullmatch(name):
        name = shown(name)
        reason = "a plugin's name is lower-case words joined by '-'; uninstall that distribution"
    elif (owner := OWNERS.get(name)) and not same_project(project, owner):
        reason = f"the name {name!r} belongs to {owner}; uninstall {project}"
    else:
        return None
    error = f"the plugin {shown(entry.name)} of {distribution_of(entry)} is refused: {reason}"
    return PluginInfo(name, project, version, "failed", error)
