"""A third-party plugin of thirty lines: installed, found, checked by the conformance suite, saved and loaded."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from featurizers.testing import FeaturizerContract

FOLDER = Path(__file__).parent / "featurizers-scale"


@pytest.fixture(scope="session")
def site_packages(tmp_path_factory):
    """Folder into which pip installed the plugin, from a copy of its sources."""
    import shutil

    source = shutil.copytree(FOLDER, tmp_path_factory.mktemp("source") / "plugin")
    target = tmp_path_factory.mktemp("site-packages")
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, "--target", target, source], check=True)
    return target


def run(site_packages, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(site_packages)}
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_plugin_is_short():
    lines = (FOLDER / "featurizers_scale.py").read_text().splitlines()
    assert len([line for line in lines if line.strip()]) <= 30


def test_it_is_listed_beside_the_first_party_plugins(site_packages):
    rows = json.loads(run(site_packages, "-m", "featurizers", "plugins", "--json"))
    mine = next(row for row in rows if row["name"] == "scale")
    assert (mine["distribution"], mine["version"], mine["state"]) == ("featurizers-scale", "0.1.0", "available")
    assert {"identity", "subspace"} <= {row["name"] for row in rows}


def test_it_is_created_saved_and_loaded_by_anyone_who_has_it(site_packages, tmp_path):
    code = f"""
import torch, featurizers
f = featurizers.create("scale", d_in=4)
f.log_scale.data = torch.arange(4.0)
again = featurizers.load(f.save_pretrained({str(tmp_path / "artefact")!r}), verify=True)
assert torch.equal(again.log_scale, f.log_scale)
"""
    run(site_packages, "-c", code)
    config = json.loads((tmp_path / "artefact" / "config.json").read_text())
    assert config["saved_with"] == {"featurizers": "0.1.0", "featurizers-scale": "0.1.0"}


def test_without_the_plugin_its_artefact_is_named_and_nothing_is_run(site_packages, tmp_path):
    test_it_is_created_saved_and_loaded_by_anyone_who_has_it(site_packages, tmp_path)
    code = f"import featurizers; featurizers.load({str(tmp_path / 'artefact')!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "UnknownKindError" in done.stderr
    assert "'scale'" in done.stderr
    assert "pip install" not in done.stderr  # a pip command is shown for first-party plugins only


class TestScale(FeaturizerContract):
    @pytest.fixture(autouse=True)
    def _installed(self, monkeypatch):
        import importlib.metadata

        from featurizers.registry import host

        monkeypatch.syspath_prepend(str(FOLDER))
        entry = importlib.metadata.EntryPoint("scale", "featurizers_scale", "featurizers")
        monkeypatch.setitem(host()._entries, "scale", [entry])

    @pytest.fixture
    def featurizer(self):
        import featurizers

        f = featurizers.create("scale", d_in=8)
        f.log_scale.data = torch.linspace(-1, 1, 8)
        return f

    @pytest.fixture
    def activations(self):
        return torch.randn(12, 8, generator=torch.Generator().manual_seed(0))
