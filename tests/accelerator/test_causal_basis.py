"""Causal bases found on an accelerator are those found on the CPU."""

from __future__ import annotations

import copy

import featurizers
import pytest
import torch
from featurizers_causal_basis import LogitLens, causal_fidelity, extract_causal_bases, remove_subspace

from tests.support.models import WIDTH, prompts, tiny_model


def extracted(model, ids, readout, **options):
    options = {"layers": [1], "mask": ids > 0, "seed": 3, **options}
    return extract_causal_bases(LogitLens(model) if readout == "logit-lens" else model, ids, 2, **options)[0]


@pytest.mark.parametrize("readout", ["logit-lens", "model"])
@pytest.mark.parametrize("mode", ["mean", "zero", "resample"])
def test_a_basis_is_that_found_on_the_cpu(readout, mode, device, tmp_path):
    model = copy.deepcopy(tiny_model("llama")).double()
    moved = copy.deepcopy(model).to(device)
    ids = prompts(6, 10)
    expected = extracted(model, ids, readout, mode=mode)
    basis = extracted(moved, ids.to(device), readout, mode=mode)
    assert basis.directions.device == device
    torch.testing.assert_close(basis.energies.cpu(), expected.energies, rtol=1e-4, atol=1e-8)
    cosines = (basis.vectors.cpu() * expected.vectors).sum(0).abs()
    assert (cosines > 0.999).all()
    basis.save_pretrained(tmp_path / "a")
    assert torch.equal(featurizers.load(tmp_path / "a", device=device).directions, basis.directions)


@pytest.mark.parametrize("preset", ["multi", "fast", "reference"])
def test_every_preset_runs_in_single_precision(preset, device):
    model, ids = tiny_model("gpt2"), prompts(6, 10)
    moved = copy.deepcopy(model).to(device)
    expected = extracted(model, ids, "logit-lens", preset=preset)
    basis = extracted(moved, ids.to(device), "logit-lens", preset=preset)
    assert float(basis.energies.sum()) == pytest.approx(float(expected.energies.sum()), rel=0.1)
    fidelity = causal_fidelity(basis, moved, ids.to(device))
    assert (fidelity.model_kl > 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_ablation_in_half_precision_stays_on_the_device(dtype, device):
    u = torch.randn(4, 5, WIDTH, device=device, dtype=dtype)
    basis = torch.linalg.qr(torch.randn(WIDTH, 3)).Q.to(device, dtype)
    edited = remove_subspace(u, basis)
    assert edited.device == device
    assert (edited.float() @ basis.float()).abs().max() < 0.1
