"""Run Python code in a new process."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run_python(code: str, timeout: float = 900) -> str:
    """Run code at the root of the repository, so that it can import ``tests.support``; return its stdout.

    The test fails if the process does, with the end of its stderr as the message.
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", timeout=timeout, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout
