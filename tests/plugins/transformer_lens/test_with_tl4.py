"""TransformerLens 4: `with_tl4/checks.py` and its suites of holders, in a process that finds it before version 3.

SAELens needs TransformerLens 3, so that the two cannot be installed in one environment.
"""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

VERSION = "4.3.0"
ROOT = Path(__file__).parents[3]
CHECKS = Path(__file__).parent / "with_tl4" / "checks.py"
HOLDERS = ROOT / "tests" / "holders" / "test_transformer_lens.py"
NAMES = [
    node.name
    for node in ast.parse(CHECKS.read_text()).body
    if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
]
NAMES.append("test_an_edit_is_that_of_a_plain_hook_or_is_refused")  # of HolderContract


@pytest.fixture(scope="session")
def installed(request: pytest.FixtureRequest) -> Path:
    """Folder with TransformerLens 4 alone; it is kept in pytest's cache."""
    folder = Path(request.config.cache.mkdir("transformer-lens")) / VERSION
    if folder.exists():
        return folder
    unfinished = folder.with_name(f"{VERSION}-{os.getpid()}")
    words = ["install", "-q", "--no-deps", "--target", str(unfinished), f"transformer-lens=={VERSION}"]
    pip = subprocess.run([sys.executable, "-m", "pip", *words], capture_output=True, text=True, check=False)
    if pip.returncode:
        shutil.rmtree(unfinished, ignore_errors=True)
        pytest.skip(f"pip cannot install TransformerLens {VERSION}: {pip.stderr.strip().splitlines()[-1][:200]}")
    try:
        unfinished.replace(folder)
    except OSError:  # another process was faster
        shutil.rmtree(unfinished)
    return folder


@pytest.fixture(scope="session")
def outcomes(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Problems of each check; an empty list if all its cases passed."""
    report = tmp_path_factory.mktemp("with_tl4") / "report.xml"
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            f"--junitxml={report}",
            str(CHECKS),
            str(HOLDERS),
        ],
        env={**os.environ, "PYTHONPATH": str(installed), "PYTEST_ADDOPTS": ""},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert report.exists(), done.stdout[-3000:] + done.stderr[-3000:]
    found: dict[str, list[str]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        name = str(case.get("name"))
        problems = found.setdefault(name.partition("[")[0], [])
        bad = [child for child in case if child.tag in ("failure", "error", "skipped")]
        left_out = name.partition("[")[0] == NAMES[-1]  # a suite says why it skips a cell
        problems += [f"{name}: {child.text}" for child in bad if not (left_out and child.tag == "skipped")]
    return found


@pytest.mark.parametrize("name", NAMES)
def test_with_transformer_lens_4(name: str, outcomes: dict[str, list[str]]) -> None:
    assert name in outcomes, f"{name} was not run: {outcomes}"
    assert not outcomes[name], "\n".join(outcomes[name])
