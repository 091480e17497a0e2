"""Commands of installed distributions: entry points of the group ``featurizers.commands``, imported when called."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from featurizers.cli.output import escaped
from featurizers.errors import PluginError, one_line, shown
from featurizers.names import COMMAND, COMMANDS, FIRST_PARTY, GROUPS, OWNERS, same_project
from featurizers.registry.entry_points import claimant, discovered, distribution_of, reason_of, unmet

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

GROUP: Final = "featurizers.commands"

Path = tuple[str, ...]
"""Words of a command: one, or two for a command of a group."""


@dataclass(frozen=True)
class CommandEntry:
    """Command that an installed distribution adds.

    Attributes:
        path: its words.
        distribution: name and version.
        point: names its function.
    """

    path: Path
    distribution: str
    point: EntryPoint

    @property
    def help(self) -> str:
        """First line of its help, as far as it is known without importing it."""
        known = COMMANDS.get(".".join(self.path))
        return known.help if known else f"Added by {self.distribution}."

    def load(self) -> Any:
        """Import the function, and return its command.

        Raises:
            PluginError: it cannot be imported, or makes no command, or needs another version of the core.
        """
        import typer
        from typer.main import get_group

        if reason := unmet(self.point):
            raise self._unfit(reason)
        try:
            function = self.point.load()
            if not callable(function):
                raise PluginError("its entry point names no function")
            app = typer.Typer(rich_markup_mode=None)
            app.command(self.path[-1])(function)
            command = get_group(app).commands[self.path[-1]]
        except (Exception, SystemExit) as error:  # typer raises many kinds for a signature that it does not accept
            raise self._unfit(reason_of(error)) from error
        _escape(command)
        return command

    def _unfit(self, reason: str) -> PluginError:
        return PluginError(
            f"the command {' '.join(self.path)!r} of {self.distribution} cannot be used: {reason}. "
            "Upgrade or uninstall that distribution; the other commands still work."
        )


@dataclass
class CommandTable:
    """Commands of all installed distributions.

    Attributes:
        entries: by their words; those of this project first, in the order of `COMMANDS`.
        faults: why commands are not used, by their words.
    """

    entries: dict[Path, CommandEntry] = field(default_factory=dict)
    faults: dict[Path, str] = field(default_factory=dict)

    @classmethod
    def of(cls, taken: Collection[str]) -> CommandTable:
        """Read the table from the metadata of the installed distributions; import none of them.

        Args:
            taken: names of the core's commands, which no distribution replaces.
        """
        table = cls()
        found: dict[Path, list[EntryPoint]] = {}
        for point in discovered(GROUP):
            path = tuple(point.name.split("."))
            if reason := _refused(point, taken):
                text = f"the command {shown(point.name)} of {distribution_of(point)} is refused: {reason}"
                table.faults[path] = one_line(text)
            else:
                found.setdefault(path, []).append(point)
        for path, points in sorted(found.items(), key=_order):
            related = (other for other in found if _within(other, path) or _within(path, other))
            rivals = [*points[1:], *(each for other in related for each in found[other])]
            if rivals:
                several = " and ".join(sorted({distribution_of(point) for point in (points[0], *rivals)}))
                text = f"the command {' '.join(path)!r} is claimed more than once, by {several}; uninstall one"
                table.faults[path] = text
                table.faults.setdefault(path[:1], text)
            else:
                table.entries[path] = CommandEntry(path, distribution_of(points[0]), points[0])
        return table

    def below(self, prefix: Path) -> list[str]:
        """Return the next words of the commands that begin with some words."""
        return list(dict.fromkeys(path[len(prefix)] for path in self.entries if _within(path, prefix)))

    def load_all(self) -> tuple[list[dict[str, str]], list[str]]:
        """Import every command; return a row for each, and why others cannot be used."""
        rows, faults = [], list(dict.fromkeys(self.faults.values()))
        for path, entry in sorted(self.entries.items()):
            try:
                help_ = entry.load().get_short_help_str(200)
                rows.append({"command": " ".join(path), "distribution": entry.distribution, "help": help_})
            except PluginError as error:
                faults.append(str(error))
        return rows, faults


def _within(path: Path, prefix: Path) -> bool:
    return len(path) > len(prefix) and path[: len(prefix)] == prefix


def _order(item: tuple[Path, Any]) -> tuple[int, Path]:
    known, name = list(COMMANDS), ".".join(item[0])
    return (known.index(name) if name in known else len(known)), item[0]


def _refused(point: EntryPoint, taken: Collection[str]) -> str | None:
    """Return why an entry point is never imported; None if it may be."""
    project = claimant(point)[0]
    if not COMMAND.fullmatch(point.name):
        return "a command is lower-case words joined by '-', after those of its group and a dot if it is in one"
    first, _, last = point.name.partition(".")
    if first in taken:
        return f"{first!r} is a command of the core; uninstall {project}"
    if point.name in GROUPS:
        return f"{first!r} is a group of commands; uninstall {project}"
    known: Mapping[str, str] = {name: FIRST_PARTY[command.plugin] for name, command in COMMANDS.items()}
    owner = known.get(point.name) or known.get(first) or OWNERS.get(last or first)
    if owner and not same_project(project, owner):
        return f"it belongs to {owner}; uninstall {project}"
    return None


def _escape(command: Any) -> None:
    """Escape unprintable characters in what ``--help`` prints of a command of a plugin."""
    for text, owner in (
        *((name, command) for name in ("help", "short_help", "epilog")),
        *((name, parameter) for parameter in command.params for name in ("help", "metavar")),
    ):
        if isinstance(value := getattr(owner, text, None), str):
            lines = (line if line == "\b" else escaped(line) for line in value.split("\n"))  # \b: not to be wrapped
            setattr(owner, text, "\n".join(lines))
