"""A plugin of pytest that tells which text of a file Python compiled, and which lines each test ran.

``-p mutant_plugin`` imports it before the code that it watches. It writes a report, in JSON, to the file
``MUTANT_REPORT`` of the environment: the sha256 of each text of ``MUTANT_FILE`` that was compiled to be imported, the
tests that did not pass, and, if ``MUTANT_ROOTS`` is not empty, the lines of files below these folders that each test
runs.
"""

from __future__ import annotations

import hashlib
import importlib.machinery
import json
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Generator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest

FILE = os.environ.get("MUTANT_FILE", "")
ROOTS = tuple(filter(None, os.environ.get("MUTANT_ROOTS", "").split(os.pathsep)))
compiled: set[str] = set()
tests: dict[str, dict[str, Any]] = {}
ran: dict[str, set[int]] = {}
failed: list[str] = []
calls: Counter[CodeType] = Counter()
ENOUGH = 1000
"""Calls of a function in one test, and lines of one call without a new one, after which nothing more is noted."""
_original = importlib.machinery.SourceFileLoader.source_to_code


def _source_to_code(self: Any, data: Any, path: Any, **options: Any) -> CodeType:
    if os.path.abspath(os.fspath(path)) == FILE:
        compiled.add(hashlib.sha256(bytes(data)).hexdigest())
    code: CodeType = _original(self, data, path, **options)
    return code


def pytest_configure() -> None:
    """Watch imports, and lines if they are asked for."""
    importlib.machinery.SourceFileLoader.source_to_code = _source_to_code  # type: ignore[method-assign]


def _call(frame: FrameType, event: str, arg: object) -> Any:  # noqa: ARG001
    name = frame.f_code.co_filename
    if not name.startswith(ROOTS):
        return None
    lines = ran.setdefault(name, set())
    lines.add(frame.f_lineno)
    calls[frame.f_code] += 1
    if calls[frame.f_code] > ENOUGH:
        return None
    old = 0

    def line(frame: FrameType, event: str, arg: object) -> Any:  # noqa: ARG001
        nonlocal old
        old = old + 1 if frame.f_lineno in lines else 0
        lines.add(frame.f_lineno)
        if old > ENOUGH:
            frame.f_trace_lines = False
        return line

    return line


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None]:
    """Trace one test with its fixtures."""
    if not ROOTS:
        yield
        return
    ran.clear()
    calls.clear()
    start = time.process_time()
    threading.settrace(_call)
    sys.settrace(_call)
    yield
    sys.settrace(None)
    threading.settrace(None)  # type: ignore[arg-type]
    seconds = time.process_time() - start
    tests[item.nodeid] = {"seconds": round(seconds, 4), "ran": {file: sorted(lines) for file, lines in ran.items()}}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Note what failed, and what was skipped: such a test kills nothing."""
    if report.outcome != "passed":
        failed.append(report.nodeid)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """Note files of tests that cannot be imported."""
    if report.failed:
        failed.append(report.nodeid)


def pytest_sessionfinish() -> None:
    """Write the report."""
    said = {"compiled": sorted(compiled), "failed": failed, "tests": tests}
    Path(os.environ["MUTANT_REPORT"]).write_text(json.dumps(said))
