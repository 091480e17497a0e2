"""Edits inside vLLM against `featurizers.intervene` on transformers, where an environment with vLLM is at hand.

The interpreter is this one if it has vLLM, else the one that ``VLLM_PYTHON`` names; ``plugins/vllm/checks/environment``
makes such an environment.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PYTHON = sys.executable if importlib.util.find_spec("vllm") else os.environ.get("VLLM_PYTHON")


@pytest.mark.skipif(PYTHON is None, reason="vLLM is not installed, and VLLM_PYTHON names no interpreter that has it")
@pytest.mark.parametrize("mode", ["chunks", "cache", "preemption"])
def test_edits_inside_vllm_are_those_of_intervene(mode, tmp_path):
    script = [str(PYTHON), str(ROOT / "plugins/vllm/checks/serving.py"), str(tmp_path), mode]
    done = subprocess.run(
        script, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "right: " in done.stdout
    assert "WRONG" not in done.stdout
