"""Passports: a model is told from near misses, and what the difference looks like is said."""

from __future__ import annotations

import copy
import json
from typing import Any

import featurizers
import pytest
import torch
from featurizers import Site
from featurizers.errors import ManifestError, UsageError
from featurizers.models import passport_of
from featurizers_transcoder import CrossLayerTranscoder
from torch import nn

from tests.support.command import run
from tests.support.models import ARCHITECTURES, WIDTH, fresh_model, hooked, hooks_of, module_of, save_language_model
from tests.support.site_maps import linear_map

VARIED = ("gpt2", "llama", "gemma2", "gemma3", "qwen3")


def model_of(architecture: str) -> nn.Module:
    """Return a model whose norms do not all have gains of 1, so that before and after a norm differ."""
    model = fresh_model(architecture).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "ln_" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def found_in(model: nn.Module, site: str) -> Any:
    f = featurizers.create("subspace", d_in=WIDTH, n_features=2, seed=0)
    f.site = Site.parse(site)
    f.metadata = {"passport": passport_of(model, f).model_dump(mode="json")}
    return f


def problem(model: nn.Module, f: Any) -> str:
    with pytest.raises(UsageError) as caught:
        featurizers.attach(model, f)
    return str(caught.value)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_same_model_fits_and_is_left_as_it_was(architecture: str) -> None:
    model = model_of(architecture).train()
    f = found_in(model, "resid.post:1")
    before = hooks_of(model)
    assert featurizers.attach(copy.deepcopy(model), f).featurizers == (f,)
    assert featurizers.attach(model, f).featurizers == (f,)
    assert hooks_of(model) == before
    assert model.training


def test_its_numbers_are_those_of_a_hook() -> None:
    model = model_of("llama")
    f = found_in(model, "resid.post:1")
    stored = f.metadata["passport"]
    seen = []
    with hooked(*module_of(model, "llama", "resid.post", 1), lambda x: seen.append(x) or x):
        model(torch.tensor([stored["tokens"]]))
    x = seen[0][0].detach().double()
    numbers = stored["sites"]["site"]
    assert numbers["mean"] == pytest.approx(x.mean(-1).tolist(), rel=1e-4, abs=1e-6)
    assert numbers["rms"] == pytest.approx(x.square().mean(-1).sqrt().tolist(), rel=1e-4)
    direction = 2**0.5 * torch.cos(2 * torch.pi * 3**0.5 * torch.arange(1, WIDTH + 1, dtype=torch.float64))
    assert [row[1] for row in numbers["projections"]] == pytest.approx(
        (x @ direction / WIDTH**0.5).tolist(), rel=1e-3, abs=1e-5
    )
    assert len(json.dumps(stored)) < 1100


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("architecture", VARIED)
def test_another_dtype_fits(architecture: str, dtype: torch.dtype) -> None:
    model = model_of(architecture)
    f = found_in(model, "resid.post:2")
    featurizers.attach(copy.deepcopy(model).to(dtype), f)


@pytest.mark.parametrize("architecture", VARIED)
def test_a_tuned_model_is_another_one(architecture: str) -> None:
    base = model_of(architecture)
    tuned, generator = copy.deepcopy(base), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(parameter.std().nan_to_num() * 0.02 * torch.randn(parameter.shape, generator=generator))
    assert "another model, or another revision" in problem(tuned, found_in(base, "resid.post:1"))
    featurizers.attach(tuned, found_in(base, "resid.post:1"), any_model=True)


def centred(model: nn.Module) -> nn.Module:
    """Return GPT-2 with the mean over the width taken from all that writes to the stream: the same logits."""
    with torch.no_grad():
        for embedding in (model.transformer.wte, model.transformer.wpe):
            embedding.weight -= embedding.weight.mean(-1, keepdim=True)
        for block in model.transformer.h:
            for projection in (block.attn.c_proj, block.mlp.c_proj):
                projection.weight -= projection.weight.mean(-1, keepdim=True)
                projection.bias -= projection.bias.mean()
    return model


def test_centred_weights_are_named_in_either_direction() -> None:
    raw = model_of("gpt2")
    raw.lm_head.weight = nn.Parameter(raw.lm_head.weight.detach().clone())  # GPT-2 ties it to what is centred
    folded = centred(copy.deepcopy(raw))
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    torch.testing.assert_close(folded(ids).logits, raw(ids).logits, rtol=1e-4, atol=1e-5)
    assert "the weights of this model were centred" in problem(folded, found_in(raw, "resid.post:1"))
    assert "found in a model with centred weights" in problem(raw, found_in(folded, "resid.post:1"))


@pytest.mark.parametrize("architecture", ["gemma2", "gemma3"])
def test_before_and_after_the_post_norm_of_gemma_are_told_apart(architecture: str) -> None:
    model = model_of(architecture)
    after = "module:model.layers.1.post_feedforward_layernorm:output"
    f = found_in(model, after)
    featurizers.attach(model, f)
    f.site = Site.parse("mlp.out:1")
    assert f"those of the passport are here at {after}" in problem(model, f)
    g = found_in(model, "mlp.out:1")
    g.site = Site.parse(after)
    assert "those of the passport are here at mlp.out:1" in problem(model, g)


def test_the_neighbouring_layer_is_named() -> None:
    model = model_of("llama")
    f = found_in(model, "resid.post:1")
    f.site = Site.parse("resid.post:2")
    assert "those of the passport are here at resid.pre:2" in problem(model, f)


def test_a_norm_without_a_gain_is_one_factor_a_token() -> None:
    model = fresh_model("llama").eval()
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight.fill_(1.0)
    f = found_in(model, "mlp.in:1")
    f.site = Site.parse("resid.mid:1")
    assert "one factor a token" in problem(model, f)


def test_a_smaller_vocabulary_is_another_model() -> None:
    f = found_in(model_of("llama"), "resid.post:1")
    assert "its vocabulary has 20 tokens" in problem(fresh_model("llama", vocab_size=20).eval(), f)


def test_quantized_weights_may_differ_more() -> None:
    model = model_of("llama")
    f = found_in(model, "resid.post:1")
    rounded = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in rounded.parameters():
            step = parameter.abs().max() / 127
            parameter.copy_((parameter / step).round() * step)
    model.register_parameter("packed", nn.Parameter(torch.zeros(2, dtype=torch.uint8), requires_grad=False))
    assert "another model" in problem(rounded, f)
    rounded.register_parameter("packed", nn.Parameter(torch.zeros(2, dtype=torch.uint8), requires_grad=False))
    featurizers.attach(rounded, f)


def test_it_is_saved_loaded_and_compared(tmp_path: Any) -> None:
    model = model_of("qwen3")
    f = featurizers.create("subspace", d_in=WIDTH, n_features=2, seed=0)
    f.site = Site.parse("attn.out:1")
    f.save_pretrained(tmp_path / "f", model=model)
    loaded = featurizers.load(tmp_path / "f")
    featurizers.attach(model, loaded)
    assert "another model" in problem(fresh_model("qwen3").eval(), loaded)
    f.save_pretrained(tmp_path / "f")
    assert featurizers.load(tmp_path / "f").metadata["passport"] == loaded.metadata["passport"]


def test_a_map_has_numbers_of_each_site(tmp_path: Any) -> None:
    model = model_of("llama")
    f = linear_map(CrossLayerTranscoder, {0: (["in"], ["out"])}, width=WIDTH)
    f.reads, f.writes = {"in": Site.parse("mlp.in:1")}, {"out": Site.parse("mlp.out:1")}
    f.save_pretrained(tmp_path / "f", model=model)
    loaded = featurizers.load(tmp_path / "f")
    assert set(loaded.metadata["passport"]["sites"]) == set(loaded.sites)
    featurizers.attach(model, loaded)
    assert "another model" in problem(fresh_model("llama").eval(), loaded)


def test_edits_around_it_are_not_seen() -> None:
    model = model_of("llama")
    f = found_in(model, "resid.post:1")
    with featurizers.intervene(model, {"resid.post:0": featurizers.Steer(f, delta=30.0)}):
        featurizers.attach(model, f)


@pytest.mark.parametrize(
    "damage",
    [
        {"version": 2},
        {"tokens": [1]},
        {"tokens": []},
        {"tokens": [-1] * 6},
        {"sites": {}},
        {"sites": {"site": {"mean": [float("nan")] * 6, "rms": [1.0] * 6, "projections": [[1.0]] * 6}}},
        {"sites": {"site": {"mean": [1.0] * 6, "rms": [1.0] * 6, "projections": [[1.0], [1.0, 2.0]] * 3}}},
        {"other": 1},
        "text",
    ],
)
def test_a_damaged_passport_is_one_error(damage: Any) -> None:
    model = model_of("llama")
    f = found_in(model, "resid.post:1")
    f.metadata["passport"] = {**f.metadata["passport"], **damage} if isinstance(damage, dict) else damage
    with pytest.raises(ManifestError, match="its passport is damaged"):
        featurizers.attach(model, f)


def test_a_featurizer_without_a_site_has_none(tmp_path: Any) -> None:
    f = featurizers.create("subspace", d_in=WIDTH, n_features=2)
    with pytest.raises(UsageError, match="does not say where it belongs"):
        f.save_pretrained(tmp_path / "f", model=model_of("llama"))
    assert not (tmp_path / "f").exists()


def test_the_command_compares_it(tmp_path: Any, capsys: Any) -> None:
    model, other = model_of("llama"), fresh_model("llama").eval()
    f = found_in(model, "resid.post:1")
    f.save_pretrained(tmp_path / "f")
    save_language_model(model, tmp_path / "model")
    save_language_model(other, tmp_path / "other")
    code, out, _ = run("verify", str(tmp_path / "f"), "--model", str(tmp_path / "model"), "--json")
    assert code == 0
    assert json.loads(out)[0]["result"] == "ok, its passport fits the model"
    code, out, _ = run("verify", str(tmp_path / "f"), "--model", str(tmp_path / "other"), "--json")
    assert code == 1
    assert "another model" in json.loads(out)[0]["error"]
