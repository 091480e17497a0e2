"""The progress bar of a search."""

from __future__ import annotations

from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Ticker:
    """A bar with the loss and the accuracy so far, where ``shown`` and stderr is a terminal."""

    def __init__(self, total: int, title: str, *, shown: bool) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        console = Console(stderr=True)
        shown = shown and console.is_terminal
        self._progress = Progress(*columns, console=console, disable=not shown, transient=True)
        self._title = title
        self._task = self._progress.add_task(title, total=total)

    def advance(self, steps: int, **measured: Any) -> None:
        """Steps that were done, and what was measured."""
        shown = {"loss": "loss {:.3f}", "accuracy": "accuracy {:.0%}", "validation": "validation {:.0%}"}
        words = [shown[name].format(value) for name, value in measured.items() if name in shown]
        self._progress.update(self._task, advance=steps, description="  ".join([self._title, *words]))

    def __enter__(self) -> Self:
        """Show it."""
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Take it away."""
        self._progress.stop()
