"""TransformerLens in a process of its own, because it needs other packages.

`Peer` starts this file as a program, which builds the same GPT-2 with random weights by its seed. The program reads one
line for each call and answers with JSON: seconds, CPU seconds and the metric of some cells.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from models import gpt2, prompts
from timing import Elsewhere, Settings, Skipped

FOLDER = Path(tempfile.gettempdir()) / "tl4x"
VERSION = "4.3.0"
ANSWER, COUNTER = 7, 9
Cells = Sequence[tuple[int, int]]


class Peer:
    """A process that patches with TransformerLens.

    Args:
        sizes: arguments of `models.gpt2`; and "prompt", the number of tokens.
        cells: layers and positions to patch.

    Raises:
        Skipped: TransformerLens cannot be installed or imported.
    """

    def __init__(self, sizes: dict[str, Any], cells: Cells) -> None:
        _install()
        environment = os.environ | {"PYTHONPATH": str(FOLDER), "HF_HUB_OFFLINE": "1"}
        program = [sys.executable, __file__, json.dumps({"sizes": sizes, "cells": list(cells)})]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self._process = subprocess.Popen(program, env=environment, text=True, **pipes)
        self.found: list[float] = []
        if self._line() != "ready":
            raise Skipped(f"TransformerLens {VERSION} does not run: {self._error[-200:]}")

    def _line(self) -> str:
        line = self._process.stdout.readline().strip()  # type: ignore[union-attr]
        if not line:
            self._error = self._process.stderr.read()  # type: ignore[union-attr]
        return str(line)

    def __call__(self) -> Elsewhere:
        """Patch the cells once, and return how long that took."""
        self._process.stdin.write("go\n")  # type: ignore[union-attr]
        self._process.stdin.flush()  # type: ignore[union-attr]
        answer = json.loads(self._line())
        self.found = answer["found"]
        return Elsewhere(answer["wall"], answer["cpu"])

    def close(self) -> None:
        """End the process."""
        self._process.stdin.close()  # type: ignore[union-attr]
        self._process.wait(60)


@functools.cache
def _install() -> None:
    """Install TransformerLens alone into a folder, unless it is there.

    Raises:
        Skipped: it cannot be installed.
    """
    if (FOLDER / f"transformer_lens-{VERSION}.dist-info").exists():
        return
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(FOLDER)]
    done = subprocess.run([*command, f"transformer-lens=={VERSION}"], capture_output=True, text=True, check=False)
    if done.returncode:
        raise Skipped(f"TransformerLens {VERSION} cannot be installed: {done.stderr[-200:]}")


def _bridge(model: Any) -> Any:
    """Return a model of `transformers` as TransformerLens runs it; it wants a tokenizer from a folder."""
    from tokenizers import Tokenizer, models
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(10)}, unk_token="w0"))
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), "w0")
    with tempfile.TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        return TransformerBridge.boot_transformers(
            folder, hf_model=model, tokenizer=tokenizer, device="cpu", dtype=torch.float32
        )


def _serve(sizes: dict[str, Any], cells: list[list[int]]) -> None:
    import pandas
    from transformer_lens import patching

    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    settings = Settings(torch.device("cpu"))
    length = sizes.pop("prompt")
    base, source = (prompts(settings, 1, length, sizes["vocabulary"], seed) for seed in range(2))
    with contextlib.redirect_stdout(io.StringIO()):
        bridge = _bridge(gpt2(settings, **sizes))
        bridge.eval()
    index = pandas.DataFrame(cells, columns=["layer", "pos"])
    print("ready", flush=True)
    for _ in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            _, cache = bridge.run_with_cache(source)
            found = patching.get_act_patch_resid_pre(
                bridge, base, cache, lambda logits: logits[0, -1, ANSWER] - logits[0, -1, COUNTER],
                index_axis_names=None, index_df=index,
            )  # fmt: skip
        took = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        print(json.dumps({**took, "found": found.tolist()}), flush=True)


if __name__ == "__main__":
    _serve(**json.loads(sys.argv[1]))
