"""The plugin does not import nnsight, and nnsight's own changes to Python leave this library as it is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("nnsight", reason="nnsight is not installed")

UNLOADED = """
import sys, featurizers
featurizers.check_plugins()
heavy = sorted({"nnsight", "interp_engine", "gguf"} & set(sys.modules))
assert not heavy, heavy
"""
SAVING = """
import nnsight, featurizers
assert hasattr(object(), "save")  # nnsight gives every object this method
f = featurizers.create("identity", d_in=8)
assert featurizers.load(f"./{featurizers.save(f, 'one')}", verify=True).d_in == 8
assert featurizers.load(f"./{f.save_pretrained('two')}", verify=True).d_in == 8
from featurizers.store import save
save(f, "three")
"""


@pytest.mark.parametrize("program", [UNLOADED, SAVING], ids=["plugins are loaded", "featurizers are saved"])
def test_beside_nnsight(program: str, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
