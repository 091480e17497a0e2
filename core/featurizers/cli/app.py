"""``featurizers``: the command line with the commands of the core and of plugins."""

from __future__ import annotations

import io
import os
import sys
import warnings
from typing import NoReturn

import typer

from featurizers.cli import commands
from featurizers.cli.command_group import CommandGroup
from featurizers.errors import CachedCopyWarning, FeaturizerError, one_line

app = typer.Typer(
    name="featurizers",
    cls=CommandGroup,
    help="Load any featurizer by its id, whoever made it, and intervene through it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.callback()(commands.root)
app.command()(commands.plugins)
app.command()(commands.kinds)
app.command()(commands.sites)
app.command()(commands.info)
app.command("list")(commands.list_artefacts)
app.command()(commands.search)
app.command()(commands.pull)
app.command()(commands.push)
app.command()(commands.verify)
app.command()(commands.convert)


def main() -> NoReturn:
    """Run the command; an error of this library or of the system is one line on stderr and exit code 1."""
    warnings.showwarning = _show_warning
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # hides the warnings of its retries
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for stream in (sys.stdout, sys.stderr):  # terminals without UTF-8
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        app()
    except FeaturizerError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(1)
    except BrokenPipeError:  # the reader closed the pipe (e.g. `head`); else Python reports it again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:  # such as a full disk
        sys.stderr.write(f"error: {one_line(error)}\n")
        sys.exit(1)
    sys.exit(0)


def _show_warning(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
    """Write a warning of this library in one line; hide those of other libraries."""
    if issubclass(category, CachedCopyWarning):
        sys.stderr.write(f"warning: {message}\n")
