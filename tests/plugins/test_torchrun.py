"""The commands ``harvest``, ``evaluate`` and ``compare`` in processes that torchrun starts, in one launch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import featurizers
import pytest
import torch
from featurizers.errors import UsageError

from tests.plugins.harvest.test_harvest import IDS, files, topk
from tests.support.command import as_json, run
from tests.support.models import fresh_model, save_language_model

ROOT = Path(__file__).parents[2]
TEXTS = [" ".join(f"w{i}" for i in ids) for ids in IDS if ids]
SECONDS = 300


def harvest_options(root: Path, out: str) -> tuple[Any, ...]:
    own = ("--model", root / "model", "--data", root / "texts.jsonl", "--out", root / out)
    return (*own, "--featurizer", f"f={root / 'f'}", "--shard-tokens", 100, "--batch-size", 4)


def evaluate_options(root: Path, out: str) -> tuple[Any, ...]:
    own = ("--model", root / "model", "--data", root / "texts.jsonl", "--out", root / out)
    return (root / "f", *own, "--batch-size", 4)


def in_each_process(root: Path) -> None:
    """Run the commands as a process of torchrun does, and note what they print."""
    torch.set_num_threads(1)
    found = {
        "harvest": run("harvest", *harvest_options(root, "shared"), "--json"),
        "index": run("harvest", *harvest_options(root, "x"), "--index"),
        "evaluate": run("evaluate", *evaluate_options(root, "evaluated"), "--json"),
        "report": run(
            "report", root / "f", "--model", root / "model", "--data", root / "texts.jsonl", "--out", "x.html"
        ),
    }
    (root / f"printed-{os.environ['RANK']}.json").write_text(json.dumps(found), encoding="utf-8")


@pytest.fixture(scope="module")
def root(tmp_path_factory: Any) -> Path:
    """Return the folder in which two processes ran the commands."""
    root = Path(tmp_path_factory.mktemp("torchrun"))
    save_language_model(fresh_model("llama"), root / "model")
    topk().save_pretrained(root / "f")
    (root / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    code = f"from pathlib import Path; from tests.plugins.test_torchrun import *; in_each_process(Path({str(root)!r}))"
    (root / "each.py").write_text(code)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*launcher, str(root / "each.py")],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        encoding="utf-8",
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return root


def printed(root: Path) -> list[Any]:
    return [json.loads((root / f"printed-{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1)]


def test_a_harvest_is_shared(root: Path) -> None:
    torch.set_num_threads(1)
    code, _, error = run("harvest", *harvest_options(root, "whole"))
    assert code == 0, error
    assert files(root / "shared") == files(root / "whole")
    for each in printed(root):
        assert each["harvest"][0] == 0, each["harvest"][2]
        assert "no torchrun" in each["index"][2]


def test_an_evaluation_is_shared_and_the_first_process_prints_it(root: Path) -> None:
    expected = as_json("evaluate", *evaluate_options(root, "alone"))
    first, second = (each["evaluate"] for each in printed(root))
    assert (first[0], second[0], second[1]) == (0, 0, ""), first[2] + second[2]
    found = json.loads(first[1])
    for name, metric in expected["metrics"].items():
        if metric["value"] is not None:
            assert found["metrics"][name]["value"] == pytest.approx(metric["value"], rel=1e-9, abs=1e-12), name
    result = featurizers.load_evaluation(root / "evaluated" / "evaluation.json")
    assert result["l0"] == pytest.approx(expected["metrics"]["l0"]["value"])


def test_what_is_not_shared_is_refused(root: Path) -> None:
    for each in printed(root):
        assert "call it without torchrun" in each["report"][2]
    with pytest.raises(UsageError, match="that torchrun starts"):
        featurizers.harvest(str(root / "model"), {"f": topk()}, TEXTS, root / "x", shard="rank")
