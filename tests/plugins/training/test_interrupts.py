"""Ctrl-C: a real SIGINT to a process of each long command, at a place where it waits for it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import featurizers
import pytest

from tests.support.command import as_json
from tests.support.hub import ALICE, LoopbackHub
from tests.support.models import fresh_model, prompts, save_language_model

WAITING = "the process waits"

LAUNCHER = f"""
import signal, sys, threading

signal.signal(signal.SIGINT, signal.default_int_handler)  # it may be ignored where the tests run in the background

def wait(*_, **__):
    print({WAITING!r}, flush=True)
    threading.Event().wait()

place = sys.argv.pop(1)
if place == "progress":  # after an epoch, a cell or a vector
    from featurizers.cli.progress import ProgressBar
    notes, note = [], ProgressBar.note

    def noted(self, text):
        note(self, text)
        notes.append(text)
        if len(notes) == 2:
            wait()

    ProgressBar.note = noted
elif place == "demo":
    from featurizers_training.demo import toy
    toy.make_task = wait
else:
    import huggingface_hub
    huggingface_hub.HfApi.create_commit = wait

from featurizers.cli.app import main
main()
"""

FIT = ("fit", "causal-basis", "--data", "texts.txt", "-k", "3", "--preset", "fast", "--layers", "0", "--tokens", "20")
PAIRS = ("--pairs", "pairs.jsonl", "--features", "2", "--epochs", "3")
TRAIN = ("train", "das", *PAIRS, "--site", "resid.post:1")
SWEEP = ("sweep", *PAIRS, "--layers", "0-1", "--methods", "das,random")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a language model, pairs and texts."""
    folder = tmp_path_factory.mktemp("interrupts")
    save_language_model(fresh_model("llama"), folder / "lm")
    base, source = ([" ".join(f"w{i}" for i in row) for row in prompts(20, 5, seed=seed).tolist()] for seed in range(2))
    pairs = [{"base": b, "source": s, "label": f" w{i}"} for i, (b, s) in enumerate(zip(base, source, strict=True))]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    (folder / "texts.txt").write_text("\n".join(base) + "\n")
    return folder


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[LoopbackHub]:
    """Return a Hub for another process."""
    hub = LoopbackHub(tmp_path / "server")
    yield hub
    hub.stop()


def interrupted(place: str, folder: Path, *arguments: Any, **environment: str) -> tuple[int, str, str]:
    """Run a command until it waits, interrupt it, and return its exit code, the rest of its stdout, and its stderr."""
    process = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, place, *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if WAITING in line:
            process.send_signal(signal.SIGINT)
            break
    out, error = process.communicate()
    return process.returncode, out, error


@pytest.mark.parametrize("command", [TRAIN, SWEEP, FIT], ids=["train", "sweep", "fit"])
def test_an_interrupted_search_leaves_nothing_or_goes_on_to_the_same_result(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    arguments = [*command, "--model", "./lm", "--out", tmp_path / "out"]
    resumable = command != SWEEP
    if resumable:
        arguments += ["--checkpoints", tmp_path / "state"]
    code, _, error = interrupted("progress", folder, *arguments)
    *before, last = error.splitlines()
    assert (code, last) == (130, "error: interrupted; what was complete before is unchanged")
    assert all(line.startswith("progress: ") for line in before)
    assert sorted(path.name for path in tmp_path.iterdir()) == (["state"] if resumable else [])
    if resumable:
        kept = {path.name for path in (tmp_path / "state").iterdir()} - {".lock"}
        assert kept == ({"search.safetensors"} if command == TRAIN else {"run.json", "layer-000.safetensors"})
        monkeypatch.chdir(folder)
        as_json(*arguments)
        as_json(*command, "--model", "./lm", "--out", tmp_path / "whole")
        one, other = (featurizers.load(tmp_path / name).state_dict() for name in ("out", "whole"))
        assert all(one[name].equal(other[name]) for name in other)


def test_an_interrupted_demo_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    code, _, error = interrupted("demo", folder, "demo", "--out", tmp_path / "demo")
    assert (code, error) == (130, "error: interrupted; what was complete before is unchanged\n")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_push_changes_nothing_and_may_be_repeated(tmp_path: Path, hub: LoopbackHub) -> None:
    featurizers.create("identity").save_pretrained(tmp_path / "a")
    clean = {name: "" for name in os.environ if name.startswith(("HF_", "HUGGING"))}
    environment = {**clean, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": ALICE}
    more = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}
    code, out, error = interrupted("push", tmp_path, "push", "./a", "alice/a", **environment, **more)
    assert (code, out) == (130, "")
    assert error == "error: interrupted; what was complete before is unchanged\n"
    assert hub.titles("alice/a") == []
    command = [sys.executable, "-m", "featurizers", "push", "./a", "alice/a"]
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, **environment, **more}, check=False)
    assert done.returncode == 0
    assert "config.json" in hub.files("alice/a")
