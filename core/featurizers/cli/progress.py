"""Progress of commands on stderr: a bar if that is a terminal, else a line for each note."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any, final

if TYPE_CHECKING:
    from rich.console import Console


@final
class ProgressBar:
    """Bar that `progress_bar` yields."""

    def __init__(self, bar: Any = None, task: Any = None, lines: IO[str] | None = None) -> None:
        self._bar, self._task, self._lines = bar, task, lines

    def advance(self, steps: int = 1, description: str | None = None) -> None:
        """Add completed steps.

        Args:
            steps: number of steps.
            description: text to show from now on; None to keep it.
        """
        if self._bar is not None:
            self._bar.update(self._task, advance=steps, description=description)

    def reach(self, completed: int, description: str | None = None) -> None:
        """Set the number of completed steps; ``description`` as in `advance`."""
        if self._bar is not None:
            self._bar.update(self._task, completed=completed, description=description)

    def note(self, text: str) -> None:
        """Write a line, such as one an epoch, if no bar is shown because there is no terminal."""
        if self._lines is not None:
            print(f"progress: {text}", file=self._lines, flush=True)


@contextmanager
def progress_bar(
    total: int | None,
    description: str = "",
    *,
    shown: bool = True,
    elapsed: bool = False,
    transient: bool = True,
    console: Console | None = None,
) -> Iterator[ProgressBar]:
    """Show a progress bar while the context lasts.

    Args:
        total: number of steps; None if it is not known.
        description: text before the bar.
        shown: False to show nothing, for ``--json`` and ``quiet``. Without a terminal only notes are written.
        elapsed: True to show the time so far instead of an estimate of the time that remains.
        transient: whether the bar disappears at the end.
        console: to show it on; None for stderr.

    Yields:
        The bar, to advance.

    Examples:
        >>> with progress_bar(3, "scalars") as bar:
        ...     for _ in range(3):
        ...         bar.advance()
    """
    if not shown:
        yield ProgressBar()
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = console or Console(stderr=True)
    if not console.is_terminal:
        yield ProgressBar(lines=console.file)
        return
    time = TimeElapsedColumn() if elapsed else TimeRemainingColumn()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), time)
    with Progress(*columns, console=console, transient=transient) as bar:
        yield ProgressBar(bar, bar.add_task(description, total=total))
