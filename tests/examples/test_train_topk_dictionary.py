"""The example that trains a dictionary, on a tiny model and for a few steps."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import featurizers
import torch

PATH = Path(__file__).parents[2] / "examples/train_topk_dictionary.py"


def test_it_learns_what_there_is_to_learn(tmp_path):
    spec = importlib.util.spec_from_file_location("train_topk_dictionary", PATH)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    g = torch.Generator().manual_seed(0)
    truth = torch.nn.functional.normalize(torch.randn(48, 16, generator=g), dim=-1)
    active = (torch.rand(6000, 48, generator=g) < 0.06) * (1 + torch.rand(6000, 48, generator=g))
    x = active @ truth + 3.0
    f, losses = example.train(x[600:], n_features=64, k=4, steps=400, batch=256, seed=0)
    assert losses[-1] < 0.4 * losses[0]
    found = example.measure(f, x[:600], k=4)
    assert found["variance_explained"] > found["variance_explained_by_pca_of_rank_k"] + 0.2
    assert found["l0"] <= 4
    close = (torch.nn.functional.normalize(f.W_dec, dim=-1) @ truth.T).amax(0)
    assert (close > 0.9).float().mean() > 0.5, "few of the true directions are found"
    again = featurizers.load(f.save_pretrained(tmp_path / "it"))
    assert int((again.encode(x[:50]) != 0).sum(-1).max()) <= 4
    assert again.encode_sparse(x[:50]).values.shape == (50, 4)


def test_the_text_is_there():
    spec = importlib.util.spec_from_file_location("train_topk_dictionary", PATH)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    assert len(example.python_documentation()) > 1_000_000
