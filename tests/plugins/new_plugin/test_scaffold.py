"""``featurizers new-plugin``: what it writes installs, passes its own tests and loads by Hub id; names are checked."""

from __future__ import annotations

import os
import site
import subprocess
import sys
import tomllib
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest
from featurizers.errors import ArtefactError, UsageError
from featurizers_new_plugin.scaffold import scaffold

from tests.support.command import as_json, run
from tests.support.hub import ALICE, LoopbackHub

PUSH = """
import torch, featurizers
from featurizers_my_kind import MyKindFeaturizer
f = MyKindFeaturizer.fit(torch.randn(40, 8, generator=torch.Generator().manual_seed(0)))
print(f.push_to_hub("alice/mine").oid)
"""
LOAD = """
import featurizers, sys
f = featurizers.load("alice/mine", verify=True)
print(f.revision, f.kind, round(float(f.shift.sum()), 4), type(f).__module__)
"""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[LoopbackHub]:
    hub = LoopbackHub(tmp_path / "server")
    yield hub
    hub.stop()


def python(interpreter: Path | str, *arguments: str, **environment: str) -> str:
    """Run a Python in an environment without the settings of the tests, and return what it prints."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING", "PYTHON"))}
    done = subprocess.run(
        [str(interpreter), *arguments], env={**clean, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def environment_beside(folder: Path) -> Path:
    """Make a virtual environment that also sees the packages of this one, and return its interpreter."""
    windows = os.name == "nt"
    venv.create(folder, symlinks=not windows, with_pip=False)
    interpreter = folder / ("Scripts" if windows else "bin") / "python"
    own = python(interpreter, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    lines = [f"import site; site.addsitedir({path!r})" for path in site.getsitepackages()]
    (Path(own) / "packages_of_the_tests.pth").write_text("\n".join(lines) + "\n")
    return interpreter


def test_what_is_written_installs_passes_its_tests_and_loads_by_id(tmp_path: Path, hub: LoopbackHub) -> None:
    folder, _ = scaffold("my-kind", tmp_path / "new", author='Ann "A" \\ Author')
    interpreter = environment_beside(tmp_path / "env")
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    python(sys.executable, "-m", "pip", "--python", str(interpreter), "install", *options, "-e", str(folder))

    tests = python(
        interpreter, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(folder / "tests"), "--rootdir", str(folder)
    )
    assert " passed" in tests
    assert "failed" not in tests
    listed = python(interpreter, "-m", "featurizers", "kinds").split()
    assert "my-kind" in listed

    environment = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_TOKEN": ALICE,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
    }
    commit = python(interpreter, "-c", PUSH, **environment).strip()
    revision, kind, _, module = python(interpreter, "-c", LOAD, **environment).split()
    assert (revision, kind, module) == (commit, "my-kind", "featurizers_my_kind.featurizer")
    done = subprocess.run(  # who does not have the package is told the kind, and runs nothing of it
        [sys.executable, "-c", LOAD], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert "no installed plugin provides the featurizer kind 'my-kind'" in done.stderr


def test_the_metadata_name_the_kind_and_the_author(tmp_path: Path) -> None:
    folder, files = scaffold("my-kind", tmp_path / "new", author='Ann "A" \\ Author')
    assert sorted(files) == sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    assert project["name"] == "featurizers-my-kind"
    assert project["authors"] == [{"name": 'Ann "A" \\ Author'}]
    assert project["entry-points"]["featurizers"] == {"my-kind": "featurizers_my_kind"}
    assert "license" not in project
    assert all("$" not in (folder / file).read_text() for file in files)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("identity", "the name 'identity' belongs to this project; choose another"),
        ("dictionary", "belongs to this project"),
        ("My-Kind", "a name is lower-case words"),
        ("my_kind", "a name is lower-case words"),
        ("my.kind", "a name is lower-case words"),
        ("3d", "a name is lower-case words"),
        ("../x", "a name is lower-case words"),
        ("x\x1b[2J", "a name is lower-case words"),
        ("x" * 41, "a name is lower-case words"),
        ("", "a name is lower-case words"),
        ("featurizers-mine", "give the name of the kind alone, 'mine'"),
    ],
)
def test_a_name_that_no_plugin_can_have_is_refused(tmp_path: Path, name: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason) as error:
        scaffold(name, tmp_path / "new")
    assert str(error.value).isprintable()
    assert not (tmp_path / "new").exists()


def test_the_name_of_an_installed_plugin_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "dist_mine-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: dist-mine\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[featurizers]\nmine = nowhere\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    from featurizers.registry import host

    host.cache_clear()
    with pytest.raises(UsageError, match="dist-mine has the name 'mine' already"):
        scaffold("mine", tmp_path / "new")
    host.cache_clear()


@pytest.mark.parametrize("author", ["", " ", "a\nb", "x" * 201, "\x1b[2J"])
def test_an_author_that_is_no_line_is_refused(tmp_path: Path, author: str) -> None:
    with pytest.raises(UsageError, match="an author is a line of text"):
        scaffold("mine", tmp_path / "new", author=author)


def test_a_folder_that_is_there_is_refused_and_unchanged(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ArtefactError, match="choose a new or an empty folder"):
        scaffold("mine", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_the_command_writes_beside_where_it_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = as_json("new-plugin", "mine")
    assert result["folder"] == "featurizers-mine"
    assert all((tmp_path / "featurizers-mine" / file).is_file() for file in result["files"])
    code, out, error = run("new-plugin", "mine")
    assert (code, out) == (1, "")
    assert "choose a new or an empty folder" in error
