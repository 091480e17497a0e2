"""Models of interp-engine and their points against torch hooks, and specs against interp-engine's own steering."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import featurizers
import pytest
import torch
from featurizers import Ablate, Interchange, Mask, Steer
from featurizers.errors import LoweringError, SiteError, UsageError
from torch import nn

from tests.support.nnsight_models import CONFIGS, model_of, tokenizer

interp_engine = pytest.importorskip("interp_engine", reason="interp-engine is not installed")
plugin = pytest.importorskip("featurizers_interp_engine")

IDS = torch.arange(1, 13).reshape(2, 6)
POINTS = {
    "embed": "embeddings",
    "resid.pre:1": "resid_pre.1",
    "resid.post:1": "resid_post.1",
    "attn.out:1": "attn_out.1",
    "attn.z:1": "z.1",
    "mlp.act:1": "mlp_act.1",
    "mlp.out:1": "mlp_out.1",
    "norm.out": "final_norm",
}


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request: pytest.FixtureRequest) -> tuple[nn.Module, Any]:
    """Return a model and its copy held by interp-engine."""
    model = model_of(request.param)
    return model, eager(model)


@pytest.fixture(scope="module")
def llama() -> Any:
    return eager(model_of("llama"))


def eager(model: nn.Module) -> Any:
    return interp_engine.EagerModel("tiny", hf_model=copy.deepcopy(model), tokenizer=tokenizer(), device="cpu")


def test_points_are_the_tensors_that_interp_engine_captures(pair: tuple[nn.Module, Any]) -> None:
    _, holder = pair
    ids = IDS[0].tolist()
    captured = interp_engine.run_with_cache(holder, ids, points=list(POINTS.values()))
    ours = featurizers.collect(holder, {"input_ids": IDS[:1]}, list(POINTS.values()))
    for site, point in POINTS.items():
        found = torch.as_tensor(captured[point])
        assert torch.equal(found.reshape(ours[point].shape), ours[point]), site
        assert plugin.point_of(site) == point
        assert torch.equal(featurizers.collect(holder, {"input_ids": IDS[:1]}, [site])[site], ours[point])


def test_an_edit_is_that_of_a_torch_hook_on_the_model(pair: tuple[nn.Module, Any]) -> None:
    model, holder = pair
    delta = torch.linspace(-1.0, 1.0, 32)
    steer = Steer(featurizers.create("identity", d_in=32), delta=delta)
    path = "transformer.h.1.mlp" if hasattr(model, "transformer") else "model.layers.1.mlp"
    expected = copy.deepcopy(model)
    expected.get_submodule(path).register_forward_hook(lambda _, __, output: output + delta)
    for name in ("mlp_out.1", f"path.{path}"):
        with featurizers.intervene(holder, {name: steer}):
            assert torch.equal(holder.hf_model(IDS).logits, expected(IDS).logits)
    assert torch.equal(holder.hf_model(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("resid_mid.1", "for which there is no site"),
        ("attn_out_post.1", "for which there is no site"),
        ("resid_foo.1", "no point of interp-engine"),
        ("resid_post.1.stream-2", "without streams"),
        ("resid_post", "resid_post.LAYER"),
        ("embeddings.0", "embeddings alone"),
        ("resid_post:1", "resid_post"),
    ],
)
def test_points_that_are_no_sites_are_refused_by_name(llama: Any, name: str, problem: str) -> None:
    with pytest.raises(SiteError, match=problem):
        featurizers.collect(llama, {"input_ids": IDS}, [name])


def test_a_model_in_another_process_is_refused() -> None:
    class Remote:
        __module__ = "interp_engine.vllm_backend"

    with pytest.raises(UsageError, match="to_specs"):
        featurizers.collect(Remote(), {"input_ids": IDS}, ["resid.post:1"])


def subspace() -> featurizers.Featurizer:
    f = featurizers.create("subspace", d_in=32, n_features=3, seed=0)
    f.site = featurizers.Site("resid.post", 1)
    return f


def operations() -> dict[str, Any]:
    torch.manual_seed(0)
    f, source = subspace(), torch.randn(1, 32)
    torch.manual_seed(1)
    weights = {"W_enc": torch.randn(16, 32), "W_dec": torch.randn(16, 32), "b_enc": torch.randn(16)}
    sae = featurizers.DictionaryFeaturizer.from_tensors(**weights, b_dec=torch.randn(32), rule="relu")
    return {
        "steer": Steer(f, delta=torch.tensor([1.0, -2.0, 0.5])),
        "steer a dictionary": Steer(sae, delta=2.0, indices=[3, 5]),
        "ablate": Ablate(f, indices=[0, 2]),
        "set": Ablate(f, value=1.5),
        "interchange": Interchange(f, source=source),
        "mask": Mask(f, source=source, gate=torch.tensor([1.0, 0.25, 0.0])),
    }


@pytest.mark.parametrize("name", list(operations()))
def test_specs_steer_an_eager_model_as_the_operation_does(pair: tuple[nn.Module, Any], name: str) -> None:
    model, holder = pair
    operation = operations()[name]
    with featurizers.intervene(model, {"resid.post:1": operation}):
        expected = model(IDS).logits
    with interp_engine.steer(holder, plugin.to_specs(operation, site="resid.post:1")):
        logits = holder.hf_model(IDS).logits
    assert torch.allclose(logits, expected, atol=2e-5)
    assert (expected - model(IDS).logits).abs().max() > 1e-2


def test_several_edits_are_carried_out_in_their_order_at_their_points(llama: Any) -> None:
    f = subspace()
    edits = [Ablate(f), Steer(f, delta=2.0)]
    with featurizers.intervene(llama, {"resid.post:1": edits}):
        expected = llama.hf_model(IDS).logits
    for given in (edits, [featurizers.lower(each) for each in edits]):
        with interp_engine.steer(llama, plugin.to_specs(given)):
            assert torch.allclose(llama.hf_model(IDS).logits, expected, atol=2e-5)
    with featurizers.intervene(llama, {"embed": edits[1]}):
        expected = llama.hf_model(IDS).logits
    with interp_engine.steer(llama, plugin.to_specs(edits[1], site="embed")):
        assert torch.allclose(llama.hf_model(IDS).logits, expected, atol=2e-5)


def test_what_no_spec_can_say_is_refused() -> None:
    f, by_name = subspace(), operations()
    dictionary = by_name["steer a dictionary"].featurizer
    oblique = featurizers.DictionaryFeaturizer.from_tensors(
        W_enc=dictionary.W_enc, W_dec=dictionary.W_dec, b_enc=torch.zeros(16), b_dec=torch.zeros(32), rule="identity"
    )
    refused: list[tuple[Any, str]] = [
        (Ablate(dictionary, indices=[3]), "no such gate"),
        (Ablate(oblique, indices=[3]), "one direction for both"),
        (Steer(f, delta=1.0, positions=[-1]), "position_mask"),
        (replace(featurizers.lower(Steer(f, delta=1.0)), special_tokens=(1,)), "special tokens"),
        (Ablate(f, value="mean"), "depends on the batch"),
    ]
    for edit, reason in refused:
        with pytest.raises(LoweringError, match=reason):
            plugin.to_specs(edit, site="resid.post:1")
    with pytest.raises(LoweringError, match="takes no steering"):
        plugin.to_specs(by_name["ablate"], site="norm.out")
    with pytest.raises(LoweringError, match="where it belongs"):
        plugin.to_specs(by_name["steer a dictionary"])
    with pytest.raises(SiteError, match="without heads"):
        plugin.to_specs(by_name["ablate"], site="attn.z:1:0")
