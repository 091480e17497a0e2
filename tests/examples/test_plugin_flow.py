"""The example of a plugin from outside: begun by ``featurizers new-plugin``; its tests and its README run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from featurizers_new_plugin.scaffold import scaffold

FOLDER = Path(__file__).parents[2] / "examples" / "plugin-flow"
REWRITTEN = {
    "README.md",
    "pyproject.toml",
    "featurizers_flow/featurizer.py",
    "tests/test_contract.py",
    "tests/test_kind.py",
}


@pytest.fixture(scope="module")
def site_packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder into which pip installed the example, from a copy of its sources."""
    source = shutil.copytree(FOLDER, tmp_path_factory.mktemp("source") / "plugin")
    target = tmp_path_factory.mktemp("site-packages")
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, "--target", target, source], check=True)
    return target


def run(site_packages: Path, folder: Path, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(site_packages)}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_its_own_tests_pass(site_packages: Path, tmp_path: Path) -> None:
    tests = shutil.copytree(FOLDER / "tests", tmp_path / "tests")
    options = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path)]
    output = run(site_packages, tmp_path, *options, str(tests))
    assert re.search(r"^.* passed", output, re.MULTILINE)
    assert "failed" not in output


def test_the_examples_of_its_readme_run(site_packages: Path, tmp_path: Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", (FOLDER / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert blocks
    run(site_packages, tmp_path, "-c", "\n".join(blocks))
    assert (tmp_path / "my-flow" / "config.json").is_file()


def test_the_rest_is_what_the_command_writes(tmp_path: Path) -> None:
    written, files = scaffold("flow", tmp_path / "new")
    assert set(files) >= REWRITTEN
    for file in sorted(set(files) - REWRITTEN):
        assert (FOLDER / file).read_bytes() == (written / file).read_bytes(), file
