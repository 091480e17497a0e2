"""The progress bar of commands."""

import io
import subprocess
import sys

import pytest
from featurizers.cli import progress_bar
from rich.console import Console


def terminal() -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=80)


@pytest.mark.parametrize(("elapsed", "column"), [(False, "-:--:--"), (True, "0:00:00")])
def test_a_terminal_is_shown_the_description_and_the_steps(elapsed, column):
    console = terminal()
    with progress_bar(7, "searching", elapsed=elapsed, transient=False, console=console) as bar:
        bar.advance()
        bar.advance(2, "layer 3")
        bar.reach(5)
        bar.advance()
    text = console.file.getvalue()
    last = next(line for line in reversed(text.splitlines()) if "/7" in line)
    assert "layer 3" in last
    assert "6/7" in last
    assert column in text


def test_a_transient_bar_is_taken_away():
    console = terminal()
    with progress_bar(2, console=console) as bar:
        bar.advance(2)
    assert console.file.getvalue().endswith("\x1b[2K")


@pytest.mark.parametrize(("shown", "console"), [(True, Console(file=io.StringIO())), (False, terminal())])
def test_nothing_is_written_where_it_is_not_shown(shown, console):
    with progress_bar(2, "x", shown=shown, console=console) as bar:
        bar.advance()
        bar.reach(2, "y")
    assert console.file.getvalue() == ""


def test_rich_is_imported_only_when_a_bar_is_shown():
    code = (
        "import sys; from featurizers.cli import progress_bar\n"
        "with progress_bar(1, shown=False) as bar: bar.advance()\n"
        "assert 'rich' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
