"""Group of commands of the core and of plugins; a plugin's is imported when it is called."""

from __future__ import annotations

import importlib.metadata
import shlex
from functools import cached_property
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from featurizers.cli.command_entries import CommandTable, Path
from featurizers.errors import FeaturizerError, MissingDependencyError, PluginError, did_you_mean, shown
from featurizers.names import COMMANDS, FIRST_PARTY, GROUPS


class CommandGroup(TyperGroup):
    """Commands of the core, and those that entry points of the group ``featurizers.commands`` name.

    ``--help`` and the completion of a shell import no plugin: their names are in the metadata of the distributions, and
    the help of this project's is in `COMMANDS`. When a command is called, its module alone is imported.
    """

    def __init__(self, *, prefix: Path = (), table: CommandTable | None = None, **options: Any) -> None:
        super().__init__(**options)
        self._prefix = prefix
        self._own = tuple(self.commands)
        self._given = table

    @cached_property
    def _table(self) -> CommandTable:
        return CommandTable.of(self._own) if self._given is None else self._given

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of the core's commands, and of those of installed plugins."""
        return [*self._own, *self._table.below(self._prefix)]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return a command; one that is not imported yet has its name and its help alone."""
        command = self.commands.get(cmd_name)
        if command is None and cmd_name in self._table.below(self._prefix):
            return TyperCommand(cmd_name, help=self._help((*self._prefix, cmd_name)), callback=lambda: None)
        return command

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the list of commands, each with its whole summary."""
        rows = [(name, self.get_command(ctx, name).get_short_help_str(1000)) for name in self.list_commands(ctx)]
        with formatter.section("Commands"):
            formatter.write_dl(rows)

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
            PluginError: its plugin cannot be used, or two plugins add it.
        """
        word = args[0]
        try:
            if word not in self.commands:
                self._add(args)
        except FeaturizerError:
            if ctx.resilient_parsing:  # a shell completes the words
                return None, None, args[1:]
            raise
        if word not in self.commands and not ctx.resilient_parsing:
            near = did_you_mean(word, self.list_commands(ctx), f"{ctx.command_path} --help lists the commands.")
            ctx.fail(f"There is no command {shown(' '.join((*self._prefix, word)))}. {near}")
        return super().resolve_command(ctx, args)

    def of_plugins(self) -> tuple[list[dict[str, str]], list[str]]:
        """Import all commands of plugins; return a row for each, and why others cannot be used."""
        return self._table.load_all()

    def _help(self, path: Path) -> str:
        """Return the first line of the help of a command or a group that is not imported."""
        if entry := self._table.entries.get(path):
            return entry.help
        commands = ", ".join(self._table.below(path))
        return GROUPS.get(" ".join(path), f"Commands: {commands}.")

    def _add(self, args: list[str]) -> None:
        """Add the command or the group that the first word names, if there is one."""
        word, path = args[0], (*self._prefix, args[0])
        if entry := self._table.entries.get(path):
            self.commands[word] = entry.load()
        elif self._table.below(path):
            help_ = self._help(path)
            self.commands[word] = CommandGroup(
                prefix=path,
                table=self._table,
                name=word,
                help=help_,
                no_args_is_help=True,
                rich_markup_mode=None,
            )
        elif path in self._table.faults:
            raise PluginError(self._table.faults[path])
        else:
            _refuse_missing([".".join((*self._prefix, *args[:2])), ".".join(path)])


def _refuse_missing(names: list[str]) -> None:
    """Raise an error that says what to install if a command, or one of a group, is of this project's plugins.

    Args:
        names: of the entry point that may be meant; the last may be a group's.

    Raises:
        MissingDependencyError: its distribution is not installed.
        PluginError: the installed one does not have it.
    """
    names = [*names, *(name for name in COMMANDS if name.partition(".")[0] == names[-1])]
    name = next((name for name in names if name in COMMANDS), None)
    if name is None:
        return
    distribution, text = FIRST_PARTY[COMMANDS[name].plugin], repr(name.replace(".", " "))
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        command = f"pip install {shlex.quote(COMMANDS[name].requirement)}"
        raise MissingDependencyError(f"the command {text}", distribution, command) from None
    raise PluginError(f"the installed {distribution} has no command {text}; upgrade it: pip install -U {distribution}")
