"""Damaged and hostile folders of tuned-lens: each costs one line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from featurizers.errors import FeaturizerError
from featurizers_causal_basis.lens.tuned_lens import TunedLens

from tests.support.decoders import shared_decoder


def load(folder: Path, config: dict[str, Any] | str, tensors: dict[Any, Any]) -> TunedLens:
    model = shared_decoder("gpt2")
    width, layers = model.config.n_embd, model.config.n_layer
    good = {"d_model": width, "num_hidden_layers": layers, "bias": True, "lens_type": "linear_tuned_lens"}
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps({**good, **config}))
    state: dict[Any, Any] = {f"{i}.weight": torch.zeros(width, width) for i in range(layers)}
    state |= {f"{i}.bias": torch.zeros(width) for i in range(layers)}
    torch.save({**state, **tensors}, folder / "params.pt")
    return TunedLens.load(model, folder)


def test_a_good_folder_is_read(tmp_path):
    assert load(tmp_path, {}, {}).n_layers == 3


@pytest.mark.parametrize(
    ("config", "tensors", "words"),
    [
        *(
            ({name: value}, {}, name)
            for name in ("d_model", "num_hidden_layers")
            for value in (-1, 0, 10**9, 10**30, float("nan"), "32", 32.0, True, None, [32])
        ),
        ({"num_hidden_layers": 2}, {}, "does not hold exactly"),
        ({"bias": "no"}, {}, "bias"),
        ({"lens_type": "\x1b[31m" + "x" * 10_000}, {}, "lens type"),
        ({"lens_type": 5}, {}, "lens_type"),
        ("[" * 100_000, {}, "config.json"),
        ("[]", {}, "config.json"),
        ("", {}, "config.json"),
        ({}, {"0.weight": torch.full((32, 32), torch.nan)}, "finite"),
        ({}, {"0.weight": torch.zeros(32, 32, dtype=torch.int64)}, "floating-point"),
        ({}, {"0.weight": torch.zeros(32, 32, dtype=torch.bool)}, "floating-point"),
        ({}, {"0.weight": torch.zeros(32, 32, dtype=torch.complex64)}, "params.pt"),
        ({}, {"0.weight": torch.zeros(31, 32)}, "shape"),
        ({}, {"0.weight": "words"}, "params.pt"),
        ({}, {0: torch.zeros(1)}, "params.pt"),
        ({}, {"\x1b]0;title\x07": torch.zeros(1)}, "params.pt"),
    ],
)
def test_a_damaged_folder_costs_one_line(tmp_path, config, tensors, words):
    with pytest.raises(FeaturizerError, match=words) as caught:
        load(tmp_path, config, tensors)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize("name", ["config.json", "params.pt"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/etc/passwd", path), lambda path: None])
def test_files_that_are_none_of_the_folder_are_refused(tmp_path, name, make):
    load(tmp_path, {}, {})
    (tmp_path / name).unlink()
    make(tmp_path / name)
    with pytest.raises(FeaturizerError, match=name):
        TunedLens.load(shared_decoder("gpt2"), tmp_path)
