"""Call the ``featurizers`` command in the process of the tests."""

from __future__ import annotations

import json
from typing import Any

from featurizers.cli import app as cli
from featurizers.errors import FeaturizerError
from typer.testing import CliRunner


def run(*arguments: Any) -> tuple[int, str, str]:
    """Return the exit code, stdout and stderr that a process would give."""
    result = CliRunner().invoke(cli.app, list(map(str, arguments)))
    if isinstance(result.exception, FeaturizerError):
        return 1, result.stdout, f"error: {result.exception}\n"
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def as_json(*arguments: Any) -> Any:
    """Run a command with ``--json``, check that it succeeded, and return the parsed output."""
    code, out, error = run(*arguments, "--json")
    assert code == 0, error
    assert out.isascii()
    return json.loads(out)
