"""`remote_edit` in nnsight's simulation of a server that has nothing of this library, and models held by nnsight."""

from __future__ import annotations

import copy
from typing import Any

import featurizers
import pytest
import torch
from featurizers import Ablate, Collect, Interchange, Steer
from featurizers.errors import LoweringError, UsageError
from torch import nn

from tests.support.nnsight_models import CONFIGS, held, model_of, tokenizer

nnsight = pytest.importorskip("nnsight", reason="nnsight is not installed")
featurizers_nnsight = pytest.importorskip("featurizers_nnsight")

IDS = torch.arange(1, 13).reshape(2, 6)
WAVE = torch.linspace(-1.0, 1.0, 32)


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request: pytest.FixtureRequest) -> tuple[nn.Module, Any]:
    model = model_of(request.param)
    return model, held(model)


@pytest.fixture(scope="module")
def llama() -> tuple[nn.Module, Any]:
    model = model_of("llama")
    return model, held(model)


def relu_dictionary(special_tokens: list[int] | None = None) -> featurizers.Featurizer:
    torch.manual_seed(1)
    tensors = {"W_enc": torch.randn(16, 32), "W_dec": torch.randn(16, 32) / 4, "b_enc": torch.randn(16)}
    return featurizers.DictionaryFeaturizer.from_tensors(
        **tensors, b_dec=torch.randn(32), rule="relu", special_tokens=special_tokens or []
    )


def remotely(lm: Any, change: Any, ids: torch.Tensor = IDS, **inputs: Any) -> torch.Tensor:
    with lm.trace({"input_ids": ids, **inputs}, remote="local"):
        change(lm)
        logits = lm.output.logits.save()
    return logits


def test_fixed_edits_run_where_this_library_is_not(pair: tuple[nn.Module, Any]) -> None:
    model, lm = pair
    width = featurizers.collect(model, {"input_ids": IDS}, ["attn.q:1"])["attn.q:1"].shape[-1] // 4
    f, head = (featurizers.create("subspace", d_in=d, n_features=3, seed=0) for d in (32, width))
    source = torch.randn(1, 32)
    operations: dict[str, Any] = {
        "resid.post:2": [Interchange(f, source=source, positions=[-1]), Steer(f, delta=1.0)],
        "attn.q:1:2": Steer(head, delta=5.0),
        "resid.pre:1": Ablate(f),
        "resid.post:1": Ablate(relu_dictionary(), indices=[0, 3, 7], value=0.5, positions=[0, -2]),
    }
    change = featurizers_nnsight.remote_edit(lm, operations)
    with featurizers.intervene(model, operations):
        expected = model(IDS).logits
    assert torch.allclose(remotely(lm, change), expected, atol=1e-4, rtol=1e-4)
    assert (expected - model(IDS).logits).abs().max() > 0.1


def test_a_server_without_this_library_knows_no_featurizer(llama: tuple[nn.Module, Any]) -> None:
    """The simulation hides what a server does not have, so that the test above is one."""
    _, lm = llama
    f = featurizers.create("subspace", d_in=32, n_features=3, seed=0)
    with pytest.raises(ModuleNotFoundError, match="featurizers"):
        remotely(lm, lambda envoy: f)


def test_positions_and_special_tokens_are_right_with_padding_remotely(llama: tuple[nn.Module, Any]) -> None:
    model, lm = llama
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    f = relu_dictionary(special_tokens=[12])
    operation = Steer(f, delta=1.0, indices=[2], positions=[0, -1])
    change = featurizers_nnsight.remote_edit(lm, {"resid.post:1": operation})
    logits = remotely(lm, change, attention_mask=mask)

    def on_output(_: nn.Module, __: Any, hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden.clone()
        hidden[0, [2, 5]] += f.W_dec[2]
        hidden[1, 0] += f.W_dec[2]  # token 12, in the last column, is special
        return hidden

    handle = model.model.layers[1].register_forward_hook(on_output)
    expected = model(IDS, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits
    handle.remove()
    assert torch.allclose(logits[mask == 1], expected[mask == 1], atol=1e-5)
    with pytest.raises(IndexError, match="does not have the positions"):
        remotely(lm, featurizers_nnsight.remote_edit(lm, {"resid.post:1": Steer(f, delta=1.0, positions=[9])}))


def test_remote_edits_do_without_the_weights(llama: tuple[nn.Module, Any], tmp_path: Any) -> None:
    model, _ = llama
    model.save_pretrained(tmp_path)
    lm = nnsight.TransformersModel(str(tmp_path), tokenizer=tokenizer(), task="text-generation")
    assert next(lm._module.parameters()).is_meta
    operations = {
        f"module:model.layers.{layer}.mlp:output": Steer(featurizers.create("identity", d_in=32), delta=WAVE)
        for layer in (2, 0)
    }
    change = featurizers_nnsight.remote_edit(lm, operations)
    assert next(lm._module.parameters()).is_meta
    with pytest.raises(UsageError, match=r"not loaded: call its dispatch\(\)"):
        featurizers.collect(lm, {"input_ids": IDS}, ["resid.post:1"])
    with featurizers.intervene(model, operations):
        expected = model(IDS).logits
    assert torch.allclose(remotely(lm, change), expected, atol=1e-5)


def test_weights_that_accelerate_keeps_elsewhere_are_not_missing() -> None:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    model = model_of("llama")
    lm = nnsight.NNsight(accelerate.cpu_offload(copy.deepcopy(model)))
    assert all(parameter.is_meta for parameter in lm._module.parameters())
    f = featurizers.create("identity", d_in=32)
    operations = {site: Steer(f, delta=WAVE, positions=[-1]) for site in ("resid.post:1", "resid.post:0")}
    with featurizers.intervene(model, operations):
        expected = model(input_ids=IDS).logits
    with featurizers.intervene(lm, operations):
        assert torch.allclose(lm._module(input_ids=IDS).logits, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Collect, "Collect has no fixed form"),
        (lambda f: Ablate(f, value="mean"), "depends on the batch"),
        (lambda f: Interchange(f, source={"input_ids": IDS}), "reads its source from the model"),
        (lambda f: Steer(f, delta=1.0, positions=torch.tensor([[0], [1]])), "one list of integers"),
    ],
)
def test_what_has_no_fixed_form_is_refused_before_anything_is_sent(
    llama: tuple[nn.Module, Any], make: Any, reason: str
) -> None:
    _, lm = llama
    f = featurizers.create("subspace", d_in=32, n_features=3, seed=0)
    with pytest.raises(LoweringError, match=reason):
        featurizers_nnsight.remote_edit(lm, {"resid.post:1": make(f)})
    with pytest.raises(LoweringError, match="is a sum"):
        featurizers_nnsight.remote_edit(lm, {"resid.mid:1": Steer(f, delta=1.0)})


def test_intervene_collect_and_attach_take_a_model_held_by_nnsight(pair: tuple[nn.Module, Any]) -> None:
    model, lm = pair
    f = featurizers.create("subspace", d_in=32, n_features=3, seed=0)
    inputs = {"input_ids": IDS}
    for site, own in featurizers.collect(lm, inputs, ["resid.post:1", "attn.z:0"]).items():
        assert torch.equal(own, featurizers.collect(model, inputs, [site])[site])
    operation = Interchange(f, source={"input_ids": IDS.flip(1) + 20}, positions=[-1])
    with featurizers.intervene(model, {"resid.post:1": operation}):
        expected = model(IDS).logits
        tokens = model.generate(IDS, do_sample=False, max_new_tokens=3)
    with featurizers.intervene(lm, {"resid.post:1": operation}):
        with lm.trace(IDS):
            logits = lm.output.logits.save()
        with lm.generate(IDS, do_sample=False, max_new_tokens=3) as tracer:
            generated = tracer.result.save()
    assert torch.equal(logits, expected)
    assert torch.equal(generated, tokens)
    assert torch.equal(lm.trace(IDS, trace=False).logits, model(IDS).logits)
    f.site = featurizers.Site("resid.post", 1)
    own, expected = featurizers.attach(lm, f).collect(inputs), featurizers.attach(model, f).collect(inputs)
    assert torch.equal(own[0], expected[0])
