"""Commands of plugins, which are loaded if a word is not a command of the core, or if all commands are listed."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, MutableMapping
from typing import Any

import typer
from typer.core import TyperGroup
from typer.main import get_group

from featurizers.errors import MissingDependencyError, PluginError, one_line, shown
from featurizers.names import COMMANDS, FIRST_PARTY
from featurizers.registry.plugin_host import host, kinds


class CommandGroup(TyperGroup):
    """Commands of the core and of plugins; groups that plugins add under one name become one.

    No plugin is imported for a command of the core. If one of the first two words is a plugin's name, as in
    ``featurizers fit causal-basis``, or if the command is in `COMMANDS`, that plugin is asked first; if it has no such
    command, and for ``--help``, all plugins are asked.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._asked: set[str] = set()
        self._faults: list[str] = []
        self._conflicts: dict[str, str] = {}

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of the core's commands, then those of plugins; warn of plugins that fail."""
        self._ask(kinds())
        for fault in [*self._faults, *self._conflicts.values()]:
            typer.echo(f"warning: {fault}", err=True)
        return super().list_commands(ctx)

    def invoke(self, ctx: Any) -> Any:
        """Run the command; Ctrl-C ends it with one line and exit code 130, as shells expect."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            message = "error: interrupted; what was complete before is unchanged"
            typer.echo(message, err=True)
            raise typer.Exit(130) from None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Return the command that the words name.

        Raises:
            MissingDependencyError: a plugin of this project adds it, and is not installed.
            PluginError: its plugin is not installed or cannot be used, or two plugins add it.
        """
        word = args[0]
        if word not in self.commands:
            for plugin in args[:2]:
                if plugin in FIRST_PARTY or plugin in kinds():
                    host().load(plugin)
                    self._ask([plugin])
            owner, requirement = COMMANDS.get(word, ("", ""))
            if owner in kinds():
                self._ask([owner])
            if word not in self.commands:
                self._ask(kinds())
            if word in self._conflicts:
                raise PluginError(self._conflicts[word])
            if word not in self.commands and owner and owner not in kinds():
                command = f"pip install {shlex.quote(requirement)}"
                raise MissingDependencyError(f"the command {word!r}", FIRST_PARTY[owner], command)
            if word not in self.commands and self._faults:
                raise PluginError(
                    f"there is no command {shown(word)}, but some plugins failed: {'; '.join(self._faults)}"
                )
        return super().resolve_command(ctx, args)

    def _ask(self, plugins: Iterable[str]) -> None:
        """Add the commands of plugins that were not asked yet; a plugin that fails does not stop the others."""
        for plugin in plugins:
            if plugin not in self._asked:
                self._asked.add(plugin)
                app = typer.Typer(rich_markup_mode=None)
                try:
                    host().ask("featurizers_commands", plugin, app=app)
                    self._merge(self.commands, get_group(app).commands, plugin)
                except PluginError as error:
                    self._faults.append(str(error))
                except Exception as error:  # raised by typer for a command that it does not accept
                    self._faults.append(f"the commands of the plugin {plugin!r} cannot be used: {one_line(error)}")

    def _merge(self, known: MutableMapping[str, Any], added: MutableMapping[str, Any], plugin: str, *path: str) -> None:
        for name, command in added.items():
            existing, words = known.setdefault(name, command), (*path, name)
            if existing is command:
                continue
            if isinstance(existing, TyperGroup) and isinstance(command, TyperGroup):
                self._merge(existing.commands, command.commands, plugin, *words)
            else:
                self._conflicts[words[0]] = (
                    f"the plugin {plugin!r} adds the command {' '.join(words)!r}, which exists already; "
                    "uninstall one of the two"
                )
