"""The plugin that ``docs/plugins.md`` builds piece by piece: its reader, its catalogue, its format and its command."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import load_file

from tests.support.hub import LoopbackHub

PAGE = (Path(__file__).parents[2] / "docs" / "plugins.md").read_text(encoding="utf-8")
SCALE = numpy.array([0.5, 1.0, 4.0], dtype="f4")
READ = """
import featurizers, torch
from featurizers.errors import ManifestError, UsageError, WeightsError
f = featurizers.load("./theirs")
x = torch.tensor([[1.0, 2.0, 3.0]])
torch.testing.assert_close(f.encode(x), x / torch.tensor([0.5, 1.0, 4.0]))
assert (f.id, str(f.site)) == ("scales-3", "resid.post:3")
for source, options, error, words in (
    ("./theirs", {"indices": [1]}, UsageError, "load it whole"),
    ("./no-layer", {}, ManifestError, "'layer' must be a number from 0, got -1"),
    ("./no-scale", {}, WeightsError, "one positive number for each coordinate"),
):
    try:
        featurizers.load(source, **options)
    except error as raised:
        assert words in str(raised), raised
    else:
        raise AssertionError(source)
f.save_pretrained("artefact")
"""
CATALOGUE = """
import featurizers
f = featurizers.load("scale:small/3")
print(f.revision, f.kind, f.site)
try:
    featurizers.load("scale:large/3")
except featurizers.errors.UsageError as error:
    print(error)
"""


def blocks(language: str, section: str) -> list[str]:
    """Return the blocks of a section of the page."""
    text = PAGE.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def write_files(folder: Path, layer: int, **arrays: numpy.ndarray) -> None:
    """Write what the other program of the page writes."""
    folder.mkdir()
    (folder / "scales.json").write_text(json.dumps({"layer": layer}))
    numpy.savez(folder / "scales.npz", **arrays)


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    """A folder with files of the other program, beside the plugin with what the page adds to the smallest one."""
    packages = tmp_path / "packages"
    packages.mkdir()
    pieces = [blocks("python", title)[0] for title in ("The smallest plugin", "Files of another library")]
    (packages / "featurizers_scale.py").write_text("\n\n".join(pieces))
    (packages / "featurizers_scale_commands.py").write_text(blocks("python", "Commands")[0])
    record = packages / "featurizers_scale-0.1.0.dist-info"
    record.mkdir()
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: featurizers-scale\nVersion: 0.1.0\n")
    groups = tomllib.loads(blocks("toml", "The smallest plugin")[0])["project"]["entry-points"]
    groups |= tomllib.loads(blocks("toml", "Commands")[0])["project"]["entry-points"]
    lines = [
        f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in points.items())
        for group, points in groups.items()
    ]
    (record / "entry_points.txt").write_text("\n".join(lines))
    folder = tmp_path / "workplace"
    folder.mkdir()
    write_files(folder / "theirs", 3, scale=SCALE)
    write_files(folder / "no-layer", -1, scale=SCALE)
    write_files(folder / "no-scale", 3, other=SCALE)
    return folder


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[LoopbackHub]:
    hub = LoopbackHub(tmp_path / "server")
    yield hub
    hub.stop()


def run(workplace: Path, *arguments: str, **environment: str) -> str:
    """Run a Python that has the plugin, and return what it prints."""
    paths = {"PYTHONPATH": str(workplace.parent / "packages")}
    done = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, **paths, **environment},
        cwd=workplace,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_files_of_the_other_library_are_read_and_written(workplace: Path) -> None:
    run(workplace, "-c", READ)
    run(workplace, "-m", "featurizers", "convert", "./artefact", "out", "--to", "scale")
    assert json.loads((workplace / "out" / "scales.json").read_text()) == {"layer": 3}
    numpy.testing.assert_allclose(numpy.load(workplace / "out" / "scales.npz")["scale"], SCALE, rtol=1e-6)


def test_an_entry_of_the_catalogue_is_loaded_at_a_commit(workplace: Path, hub: LoopbackHub, tmp_path: Path) -> None:
    name = "owner/scales-of-a-small-model"
    record = hub.create("model", name)
    files = dict(record["commits"][hub.head(name)]["files"])
    for path in (workplace / "theirs").iterdir():
        data = path.read_bytes()
        files[f"layer-3/{path.name}"] = hub.entry(hub.put_bytes(data), len(data), path.suffix == ".npz", data)
    hub.commit(record, "refs/heads/main", files, "files", "", "owner", hub.head(name))
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1"}
    settings |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "0"}
    found, refused = run(workplace, "-c", CATALOGUE, **settings).splitlines()
    assert found == f"{hub.head(name)} scale resid.post:3"
    assert refused == "no scales are known for 'large'; known are small"


def test_the_command_fits_and_saves(workplace: Path) -> None:
    torch.save(torch.tensor([[0.0, 1.0], [2.0, 9.0]]), workplace / "x.pt")
    assert run(workplace, "-m", "featurizers", "fit", "scale", "x.pt", "--out", "found").strip() == "found"
    found = load_file(workplace / "found" / "model.safetensors")["log_scale"].exp()
    torch.testing.assert_close(found, torch.tensor([2**0.5, 32**0.5]))  # the deviations of the sample
