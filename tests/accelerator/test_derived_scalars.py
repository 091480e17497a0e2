"""What is captured and derived on an accelerator is what is captured and derived on the CPU.

The models are in float64, but for their rotary positions, which are computed in float32.
"""

from __future__ import annotations

import copy

import featurizers
import pytest
import torch
from featurizers_derived_scalars import Circuit, capture, scalars
from featurizers_derived_scalars.circuit import Need

from tests.support.decoders import WIDTH, shared_decoder, tokens
from tests.support.dictionaries import dictionary

NAMES = ("gpt2", "llama", "gpt_neox", "gemma2", "olmo2", "opt")


def metric(logits):
    return logits[-1, 5] - logits[-1, 9]


def moved(name, device):
    return copy.deepcopy(shared_decoder(name)).to(device)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_captured_is_that_of_the_cpu(name, device):
    here = Circuit(shared_decoder(name))
    there = Circuit(moved(name, device))
    kinds = ("resid.pre", "attn.q", "attn.probs", "attn.z", "attn.delta", "mlp.neurons", "mlp.delta", "resid.final")
    needs = [Need(kind, pass_) for kind in kinds for pass_ in ("forward", "backward")]
    [wanted] = capture(here, tokens(), needs, metric=metric)
    [found] = capture(there, tokens().to(device), needs, metric=metric)
    [offloaded] = capture(there, tokens(), needs, metric=metric, device="cpu")
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert found[key].device == device
        torch.testing.assert_close(found[key].cpu(), tensor, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(offloaded[key], tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rule", [None, "topk", "relu"])
def test_scalars_are_those_of_the_cpu(name, rule, device):
    what = ["write_to", "act_times_grad", "write_norm"]
    given = {} if rule is None else {"mlp.delta:1": dictionary(rule, d_in=WIDTH, dtype=torch.float64)}
    wanted = scalars(shared_decoder(name), tokens(), what, metric=metric, featurizers=given or None)
    far = {site: copy.deepcopy(f).to(device) for site, f in given.items()}
    found = scalars(moved(name, device), tokens(), what, metric=metric, featurizers=far or None)
    assert list(found) == list(wanted)
    for key, tensor in wanted.items():
        assert found[key].device == device
        torch.testing.assert_close(found[key].cpu(), tensor, rtol=1e-3, atol=1e-5)
    tops = [[(one.name, one.layer, one.at) for one in each.topk(10)] for each in (wanted, found)]
    assert tops[0] == tops[1]


def test_half_precision_models_are_captured(device):
    model = moved("llama", device).to(torch.bfloat16)
    found = scalars(model, tokens(), "write_to", metric=metric)
    assert all(tensor.isfinite().all() for tensor in found.values())
    sae = featurizers.create("subspace", d_in=WIDTH, n_features=3).to(device)
    seen = scalars(model, tokens(), "value:mlp.delta", featurizers={"mlp.delta:1": sae}, layers=[1])
    assert any(tensor.shape[-1] == 3 for tensor in seen.values())
