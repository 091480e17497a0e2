"""Searches on an accelerator find the same as on the CPU."""

from __future__ import annotations

import copy

import featurizers
import pytest
import torch
from featurizers_training import DAS, DASDBM, DBM, PCA, BoundlessDAS, FullVector, Settings, evaluate, train

from tests.support.planted import SITE, SIZE, model, overlap, planted_pairs

METHODS = [DAS(n_features=SIZE), DBM(), DASDBM(sparsity=0.01), BoundlessDAS(), FullVector(), PCA(n_features=SIZE)]


def search(method, where, pairs, **options):
    settings = Settings(**{"epochs": 2, "batch_size": 16, **options.pop("settings", {})})
    return train(copy.deepcopy(model()).to(where), pairs, SITE, method, settings=settings, **options)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_a_search_is_that_of_the_cpu(method, device, tmp_path):
    pairs = planted_pairs(48)
    wanted, found = (search(method, where, pairs) for where in ("cpu", device))
    for one, other in zip(wanted.history, found.history, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-2)
    assert abs(found.accuracy["train"].value - wanted.accuracy["train"].value) <= 0.1
    for tensor in found.featurizer.state_dict().values():
        assert tensor.device == device
    folder = found.save(tmp_path / "a")
    loaded = featurizers.load(folder, device=device)
    assert evaluate(copy.deepcopy(model()).to(device), pairs, loaded) == found.accuracy["train"]


def test_das_finds_the_planted_subspace(device):
    settings = {"epochs": 20, "batch_size": 32}
    found = search(DAS(n_features=SIZE, lr=0.05), device, planted_pairs(320), settings=settings)
    assert overlap(found.featurizer.basis.detach().cpu()) > 0.85


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_finds_much_the_same(precision, device):
    pairs, method = planted_pairs(96), DAS(n_features=2)
    whole = search(method, device, pairs, settings={"epochs": 3})
    found = search(method, device, pairs, settings={"epochs": 3, "precision": precision})
    assert found.featurizer.basis.dtype == torch.float32
    assert found.history[-1]["loss"] == pytest.approx(whole.history[-1]["loss"], abs=0.15)


def test_an_interrupted_search_goes_on_and_moves_between_devices(device, tmp_path):
    pairs = planted_pairs(48)
    whole = search(DAS(n_features=2), device, pairs, checkpoints=tmp_path / "c")
    again = search(DAS(n_features=2), device, pairs, checkpoints=tmp_path / "c")
    assert torch.equal(whole.featurizer.basis, again.featurizer.basis)
    moved = search(DAS(n_features=2), "cpu", pairs, checkpoints=tmp_path / "c")
    torch.testing.assert_close(moved.featurizer.basis, whole.featurizer.basis.cpu())
