"""Featurizers and interventions on an accelerator do what they do on the CPU, and nothing comes back elsewhere."""

from __future__ import annotations

import copy

import featurizers
import pytest
import torch
from featurizers import Ablate, Interchange, Mask, SigmoidGate, Steer, collect, intervene
from torch import Tensor

from tests.support.dictionaries import RULES, dictionary
from tests.support.models import ARCHITECTURES, WIDTH, prompts, tiny_model

SITES = ("resid.post:1", "attn.z:1", "mlp.act:1", "attn.z:1:0")


def moved(module, device):
    return copy.deepcopy(module).to(device)


def close(found: Tensor, wanted: Tensor, device: torch.device, tolerance: float = 1e-4) -> None:
    assert found.device == device
    torch.testing.assert_close(found.cpu(), wanted, atol=tolerance, rtol=tolerance)


def subspace(**options):
    return featurizers.create("subspace", d_in=WIDTH, n_features=6, seed=1, **options)


KINDS = {
    **{f"dictionary {rule}": lambda rule=rule: dictionary(rule, d_in=WIDTH) for rule in RULES},
    **{
        f"normalized {how}": lambda how=how: dictionary("topk", d_in=WIDTH, normalize=how)
        for how in ("layer-norm", "constant-norm")
    },
    "identity": lambda: featurizers.create("identity", d_in=WIDTH),
    "subspace": subspace,
    "composition": lambda: subspace() >> featurizers.create("subspace", d_in=6, n_features=3, seed=2),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("indices", [None, [], [0, 2], [[0], [1]], [[0, 1], [2]]], ids=str)
def test_an_edit_is_that_of_the_cpu(kind, indices, device):
    f = KINDS[kind]()
    base, source = torch.randn(2, 2, 3, f.d_in, generator=torch.Generator().manual_seed(3))
    there = moved(f, device)
    far = base.to(device), source.to(device)
    with torch.no_grad():
        close(there.interchange(*far, indices), f.interchange(base, source, indices), device)
        close(there.ablate(far[0], indices, 0.5), f.ablate(base, indices, 0.5), device)
        close(there.steer(far[0], 2.0, indices), f.steer(base, 2.0, indices), device)
        features, error = there.featurize(far[0])
        close(features, f.featurize(base)[0], device)
        close(there.inverse_featurize(features, error), f.inverse_featurize(*f.featurize(base)), device)
        gate = torch.rand(features.shape[-1], generator=torch.Generator().manual_seed(4))
        close(there.mask(*far, gate.to(device)), f.mask(base, source, gate), device)
        assert torch.equal(there.interchange(far[0], far[0], indices), far[0])


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_cpu(kind, device):
    f = KINDS[kind]()
    base, source = torch.randn(2, 2, 3, f.d_in, generator=torch.Generator().manual_seed(3))
    found = []
    for where in (torch.device("cpu"), device):
        x, y = (part.clone().to(where).requires_grad_() for part in (base, source))
        moved(f, where).interchange(x, y, [0, 1]).pow(2).sum().backward()
        found.append((x.grad, y.grad))
    for wanted, got in zip(*found, strict=True):
        close(got, wanted, device, 1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_edit_of_nothing_changes_no_bit_in_half_precision(kind, dtype, device):
    f = moved(KINDS[kind](), device)
    x = torch.randn(4, f.d_in, device=device, dtype=dtype)
    assert torch.equal(f.interchange(x, x), x)
    assert torch.equal(f.steer(x, 0.0), x)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_interventions_in_a_model_are_those_of_the_cpu(architecture, device):
    model = tiny_model(architecture)
    there = moved(model, device)
    base, source = {"input_ids": prompts(2, 6)}, {"input_ids": prompts(2, 6, seed=1)}
    far = [{name: ids.to(device) for name, ids in inputs.items()} for inputs in (base, source)]
    width = collect(model, base, {"attn.z:1": featurizers.create("identity")})["attn.z:1"]
    for site in SITES:
        if site == "attn.z:1":
            f = featurizers.create("subspace", d_in=width.shape[-1], n_features=4, seed=1)
        elif site == "resid.post:1":
            f = subspace()
        else:
            f = featurizers.create("identity")
        gate = SigmoidGate(f.n_features) if f.n_features else None
        for operation in (
            lambda f, source, gate: Interchange(f, source=source, positions=[0, -1]),
            lambda f, source, gate: Steer(f, delta=1.5, positions=[[1], [2]]),
            lambda f, source, gate: Ablate(f, value="mean"),
            lambda f, source, gate: Mask(f, source=source, gate=gate, positions=[-1]) if gate else None,
        ):
            logits = []
            for m, b, s, where in ((model, base, source, None), (there, *far, device)):
                g = gate if where is None or gate is None else moved(gate, where)
                edit = operation(f if where is None else moved(f, where), s, g)
                if edit is None:
                    break
                with torch.no_grad(), intervene(m, {site: edit}):
                    logits.append(m(**b).logits)
            if logits:
                close(logits[1], logits[0], device, 1e-3)


def test_features_are_collected_where_the_model_is(device):
    model, f = tiny_model("llama"), subspace()
    inputs = {"input_ids": prompts(2, 6)}
    wanted = collect(model, inputs, {"resid.post:1": f})
    found = collect(
        moved(model, device), {"input_ids": inputs["input_ids"].to(device)}, {"resid.post:1": moved(f, device)}
    )
    (site,) = found
    close(found[site], wanted[site], device, 1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_an_artefact_is_loaded_onto_the_device_and_saved_from_it(kind, device, tmp_path):
    f = KINDS[kind]()
    f.feature_sets["selected"] = torch.tensor([0, 2])
    f.save_pretrained(tmp_path / "a")
    there = featurizers.load(tmp_path / "a", device=device)
    assert {tensor.device for tensor in there.state_dict().values()} <= {device}
    there.save_pretrained(tmp_path / "b")
    back = featurizers.load(tmp_path / "b")
    for one, other in zip(f.state_dict().values(), back.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_what_a_search_selected_is_used_where_the_model_is(device, tmp_path):
    f = subspace()
    f.feature_sets["selected"] = torch.tensor([0, 2])
    f.site = featurizers.Site("resid.post", 1).at(position=(-1,))
    f.save_pretrained(tmp_path / "a")
    model = tiny_model("llama")
    base, source = {"input_ids": prompts(2, 6)}, {"input_ids": prompts(2, 6, seed=1)}
    wanted = f.attach(model)(base, source).logits
    far = [{name: ids.to(device) for name, ids in inputs.items()} for inputs in (base, source)]
    attached = featurizers.load(tmp_path / "a", device=device).attach(moved(model, device))
    close(attached(*far).logits.detach(), wanted.detach(), device, 1e-3)
    assert attached.collect(far[0])[0].shape == (2, 1, 2)


def test_a_slice_of_a_dictionary_is_loaded_onto_the_device(device, tmp_path):
    f = dictionary("relu", d_in=WIDTH)
    f.save_pretrained(tmp_path / "a")
    part = featurizers.load(tmp_path / "a", indices=[3, 1], device=device)
    x = torch.randn(4, WIDTH)
    close(part.encode(x.to(device)).detach(), f.encode(x)[:, [3, 1]].detach(), device)
