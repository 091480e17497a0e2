"""Commands of plugins: those of this project are listed from a table, and a plugin is imported when one is called."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, MutableMapping
from typing import Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_group

from featurizers.cli.output import escaped
from featurizers.errors import FeaturizerError, MissingDependencyError, PluginError, did_you_mean, one_line, shown
from featurizers.names import COMMANDS, FIRST_PARTY, OWNERS
from featurizers.registry.plugin_host import host


class CommandGroup(TyperGroup):
    """Commands of the core and of plugins; groups that plugins add under one name become one.

    ``--help`` and the completion of a shell import no plugin: the commands of this project's plugins are in `COMMANDS`,
    and other plugins are named beside them. To find a command, the plugins that one of the first two words names are
    asked, as in ``featurizers fit causal-basis``, then the plugin that `COMMANDS` names, then all that are not of this
    project.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._asked: set[str] = set()
        self._faults: list[str] = []
        self._conflicts: dict[str, str] = {}
        self._rows: list[dict[str, str]] = []

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of the core's commands and of those of installed plugins, as far as they are known."""
        installed = host().names()
        words = [word for word in COMMANDS if word in self.commands or COMMANDS[word].plugin in installed]
        return [*(word for word in self.commands if word not in COMMANDS), *words]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return a command; one of a plugin that is not imported yet has its name and its help alone."""
        command = self.commands.get(cmd_name)
        if command is None and cmd_name in COMMANDS and COMMANDS[cmd_name].plugin in host().names():
            return TyperCommand(cmd_name, help=COMMANDS[cmd_name].help, callback=lambda: _outdated(cmd_name))
        return command

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the list of commands, and the plugins that may add more."""
        super().format_commands(ctx, formatter)
        if others := self._others():
            with formatter.section("Plugins that may add commands"):
                formatter.write_text(f"{', '.join(others)}; to list them: featurizers plugins --commands")

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
        try:
            self._find(args)
        except FeaturizerError:
            if ctx.resilient_parsing:  # a shell completes the words
                return None, None, args[1:]
            raise
        if self.get_command(ctx, args[0]) is None and not ctx.resilient_parsing:
            near = did_you_mean(args[0], self.list_commands(ctx), "featurizers --help lists the commands.")
            ctx.fail(f"There is no command {shown(args[0])}. {near}")
        return super().resolve_command(ctx, args)

    def of_plugins(self) -> list[dict[str, str]]:
        """Import all plugins and return a row for each of their commands; warn of plugins that fail."""
        self._ask(host().names())
        for fault in [*self._faults, *self._conflicts.values()]:
            typer.echo(f"warning: {fault}", err=True)
        return sorted(self._rows, key=lambda row: row["command"])

    def _find(self, args: list[str]) -> None:
        """Ask the plugins that may have the command."""
        word, installed = args[0], host().names()
        owner = COMMANDS.get(word)
        if not self._has(args):
            for plugin in args[:2]:
                if plugin in installed or (plugin in FIRST_PARTY and plugin not in COMMANDS):
                    host().load(plugin)
                    self._ask([plugin])
        if not self._has(args) and owner and owner.plugin in installed:
            self._ask([owner.plugin])
        if not self._has(args):
            self._ask(self._others())
        if word in self._conflicts:
            raise PluginError(self._conflicts[word])
        if word not in self.commands and owner and owner.plugin not in installed:
            command = f"pip install {shlex.quote(owner.requirement)}"
            raise MissingDependencyError(f"the command {word!r}", FIRST_PARTY[owner.plugin], command)
        if word not in self.commands and self._faults:
            raise PluginError(f"there is no command {shown(word)}, but some plugins failed: {'; '.join(self._faults)}")

    def _has(self, args: list[str]) -> bool:
        """Return whether the words name a command that is there; one word is enough unless it is a group."""
        command = self.commands.get(args[0])
        if isinstance(command, TyperGroup):
            return len(args) > 1 and args[1] in command.commands
        return command is not None

    def _others(self) -> list[str]:
        """Return the names of the plugins that are not of this project."""
        return [name for name in host().names() if name not in OWNERS]

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
            if not name.isprintable():
                raise PluginError(f"the plugin {plugin!r} adds a command with an unprintable name, {shown(name)}")
            _escape(command)
            existing, words = known.setdefault(name, command), (*path, name)
            if isinstance(command, TyperGroup) and existing is command:
                self._merge({}, command.commands, plugin, *words)
                continue
            if existing is command:
                text = command.get_short_help_str(200)
                self._rows.append({"command": " ".join(words), "plugin": plugin, "help": text})
                continue
            if isinstance(existing, TyperGroup) and isinstance(command, TyperGroup):
                self._merge(existing.commands, command.commands, plugin, *words)
            else:
                self._conflicts[words[0]] = (
                    f"the plugin {plugin!r} adds the command {' '.join(words)!r}, which exists already; "
                    "uninstall one of the two"
                )


def _escape(command: Any) -> None:
    """Escape unprintable characters in what ``--help`` prints of a command of a plugin."""
    for text, owner in (
        *((name, command) for name in ("help", "short_help", "epilog")),
        *((name, parameter) for parameter in command.params for name in ("help", "metavar")),
    ):
        if isinstance(value := getattr(owner, text, None), str):
            lines = (line if line == "\b" else escaped(line) for line in value.split("\n"))  # \b: not to be wrapped
            setattr(owner, text, "\n".join(lines))


def _outdated(word: str) -> NoReturn:
    distribution = FIRST_PARTY[COMMANDS[word].plugin]
    raise PluginError(
        f"the installed {distribution} has no command {word!r}; upgrade it: pip install -U {distribution}"
    )
