"""Raw formats that the sae-lens plugin reads: what files say, what names of folders say, and what neither says."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import featurizers
import pytest
import torch
from featurizers.errors import FeatureIndexError, ManifestError, WeightsError
from safetensors.torch import save_file

from tests.support.sae_lens import D, F, batch, linear, same, weights

np = pytest.importorskip("numpy")


def put(folder: Path, name: str, data: dict[str, Any]) -> Path:
    """Write a file in the format of its suffix, and return the folder."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    match path.suffix:
        case ".json":
            path.write_text(json.dumps(data))
        case ".npz":
            np.savez(path, **{key: value.numpy() for key, value in data.items()})
        case ".safetensors":
            save_file({key: value.contiguous() for key, value in data.items()}, path)
        case _:
            torch.save(data, path)
    return folder


EMBEDDING = "gemma-scope-2b-pt-res/embedding/width_4k/average_l0_6"


@pytest.mark.parametrize(
    ("path", "scaled", "site"),
    [
        (EMBEDDING, True, "embed"),
        ("embedding-study/layer_3", False, "None"),
        ("embedding/gemma-scope-2b-pt-res/layer_3/width_16k/average_l0_9", False, "resid.post:3"),
        (
            "transcoder-study/gemma-scope-9b-pt-mlp/layer_3/width_16k/average_l0_9",
            False,
            "module:model.layers.3.post_feedforward_layernorm:output",
        ),
        ("somewhere", False, "None"),
        ("gemma-scope-2b-pt-other/layer_3/width_16k", False, "None"),
        ("gemma-scope-2b-pt-res/layer_x/width_16k", False, "None"),
    ],
)
def test_gemma_scope_by_its_path(path, scaled, site, tmp_path):
    t = weights("threshold")
    f = featurizers.load(put(tmp_path / path, "params.npz", t))
    root = math.sqrt(D) if scaled else 1.0
    torch.testing.assert_close(f.W_enc, t["W_enc"].T / root)
    torch.testing.assert_close(f.W_dec, t["W_dec"] * root)
    assert str(f.site) == site
    named = f.metadata["sae_lens"]["metadata"].get("hook_name")
    assert named is None or "None" not in named


@pytest.mark.parametrize(
    ("path", "name", "words"),
    [
        (
            "gemma-scope-2b-pt-crosscoders/layer_3/width_16k",
            "params.npz",
            "crosscoders are read only in the files of Gemma Scope 2",
        ),
        ("crosscoder/layer_0", "params.safetensors", "crosscoders are read only in the files"),
        ("clt/width_16k", "params.safetensors", "read only in the files of Gemma Scope 2"),
    ],
)
def test_gemma_scope_of_several_layers(path, name, words, tmp_path):
    t = weights("threshold")
    folder = put(tmp_path / path, name, {key.replace("W_", "w_"): tensor for key, tensor in t.items()})
    put(folder, "config.json", {"architecture": "jump_relu"})
    with pytest.raises(ManifestError, match=f"is not supported: .*{words}"):
        featurizers.load(folder)


SCOPE_2 = {"architecture": "jump_relu", "model_name": "gemma-v3-270m-pt"}


def test_gemma_scope_2_by_its_configuration(tmp_path):
    t = {key.replace("W_", "w_"): tensor for key, tensor in weights("threshold").items()}
    sites = {
        "model.layers.5.output": "resid.post:5",
        "model.layers.5.self_attn.o_proj.input": "attn.z:5",
        "model.layers.5.post_feedforward_layernorm.output": "module:model.layers.5.post_feedforward_layernorm:output",
    }
    for number, (point, site) in enumerate(sites.items()):
        folder = put(tmp_path / str(number), "params.safetensors", t)
        f = featurizers.load(put(folder, "config.json", {**SCOPE_2, "hf_hook_point_in": point}))
        assert str(f.site) == site
        assert f.site.model == "google/gemma-3-270m"
    part = featurizers.load(folder, indices=[F - 1, D])
    torch.testing.assert_close(part.W_enc, t["w_enc"].T[[F - 1, D]])
    torch.testing.assert_close(part.W_dec, t["w_dec"][[F - 1, D]])
    with pytest.raises(FeatureIndexError, match=f"feature index {F} is out of range: there are {F}"):
        featurizers.load(folder, indices=[F])
    for change, words in (({"architecture": "topk"}, "the architecture 'topk' of Gemma Scope 2 is not known"),):
        put(folder, "config.json", {**SCOPE_2, **change})
        with pytest.raises(ManifestError, match=words):
            featurizers.load(folder)
    put(folder, "config.json", SCOPE_2)
    put(folder, "params.safetensors", {**t, "w_gate": torch.ones(F)})
    with pytest.raises(WeightsError, match=r"unknown tensors \['w_gate'\]"):
        featurizers.load(folder)


LLAMA = {"d_model": D, "d_sae": F, "jump_relu_threshold": 0.3, "dataset_average_activation_norm": {"in": 5.0}}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dataset_average_activation_norm": {"in": 0}}, "'in' must be positive, got 0"),
        ({"dataset_average_activation_norm": None}, "lacks the object dataset_average_activation_norm"),
        ({"d_model": 17}, "the configuration says 17"),
        ({"d_sae": 65}, "the configuration says 65"),
        ({"jump_relu_threshold": None}, "'jump_relu_threshold' must be a number"),
        ({"hook_point_in": "a", "hook_point_out": "b"}, "reads one site and writes another"),
    ],
)
def test_llama_scope_that_says_too_little(change, words, tmp_path):
    put(tmp_path, "checkpoints/final.safetensors", linear())
    put(tmp_path, "hyperparams.json", {**LLAMA, **change})
    with pytest.raises((ManifestError, WeightsError), match=words):
        featurizers.load(tmp_path)


def test_a_release_in_half_precision_is_computed_in_single_precision(tmp_path):
    """As `sae_lens.SAE.from_pretrained` does: activations are not rounded, and thresholds are computed in float32."""
    t = {name: tensor.bfloat16() for name, tensor in linear().items()}
    put(tmp_path, "checkpoints/final.safetensors", t)
    f = featurizers.load(put(tmp_path, "hyperparams.json", LLAMA))
    factor, x = math.sqrt(D) / 5.0, batch(5)
    pre = x * factor @ t["encoder.weight"].float().T + t["encoder.bias"].float()
    same(f.encode(x), torch.where(pre > 0.3 * factor, pre, 0.0))
    assert float(f.threshold[0]) == float(torch.tensor(0.3 * factor))
    state = {key: value.bfloat16() for key, value in linear().items()}
    plain = featurizers.load(put(tmp_path / "plain", "layer_3.pt", state))
    pre = x @ state["encoder.weight"].float().T + state["encoder.bias"].float()
    same(plain.encode(x), pre.clamp(min=0))


def test_qwen_scope_says_k_in_its_name(tmp_path):
    t = weights()
    state = {**t, "W_enc": t["W_enc"].T, "W_dec": t["W_dec"].T}
    f = featurizers.load(put(tmp_path / "SAE-Res-Qwen3-1.7B-Base-W32K-L0_7", "layer3.sae.pt", state))
    x = batch(3)
    assert ((f.encode(x) != 0).sum(-1) <= 7).all()
    assert f.config.rule_options == {"k": 7}
    assert f.site == featurizers.Site("resid.post", 3)
    assert f.site.model == "Qwen/Qwen3-1.7B-Base"
    with pytest.raises(ManifestError, match="SAE-Res-…-L0_50"):
        featurizers.load(put(tmp_path / "renamed", "layer3.sae.pt", state))
    put(tmp_path / "renamed", "layer4.sae.pt", state)
    with pytest.raises(ManifestError, match="the autoencoders of 2 layers of Qwen Scope; name one"):
        featurizers.load(tmp_path / "renamed")


def test_a_file_with_other_tensors_is_not_taken_for_one(tmp_path):
    assert featurizers.load(put(tmp_path / "plain", "layer_3.pt", linear())).site is None
    with pytest.raises(ManifestError, match="no installed plugin knows"):
        featurizers.load(put(tmp_path / "more", "layer_3.pt", {**linear(), "log_threshold": torch.ones(F)}))
    with pytest.raises(WeightsError, match=r"'encoder_linear\.bias' has 3 features, but W_dec has 64"):
        featurizers.load(
            put(tmp_path / "short", "x.pth", {**linear("_linear."), "encoder_linear.bias": torch.ones(3)}), indices=[2]
        )
    with pytest.raises(WeightsError, match="norm_factor"):
        featurizers.load(put(tmp_path / "dump", "x.pt", {"state_dict": linear(), "norm_factor": 2.5}))


def openai(**change: Any) -> dict[str, Any]:
    t = weights()
    return {
        "pre_bias": t["b_dec"],
        "latent_bias": t["b_enc"],
        "encoder.weight": t["W_enc"].T,
        "decoder.weight": t["W_dec"].T,
        "stats_last_nonzero": torch.zeros(F),
        "activation": "TopK",
        "activation_state_dict": {"k": 5, "postact_fn": "ReLU"},
        **change,
    }


@pytest.mark.parametrize("kind", ["TopK", "ReLU"])
def test_openai_by_its_formulas(kind, tmp_path):
    """TopK sees layer-normed activations, and the statistics undo the norm; ReLU sees plain activations."""
    t, x = weights(), batch(4)
    f = featurizers.load(put(tmp_path, "8.pt", openai(activation=kind)))
    normed = kind == "TopK"
    mean, std = (x.mean(-1, keepdim=True), x.std(-1, keepdim=True)) if normed else (0.0, 1.0)
    z = (x - mean) / (std + 1e-5) if normed else x
    h = (z - t["b_dec"]) @ t["W_enc"] + t["b_enc"]
    top = h.topk(5 if normed else F, dim=-1)
    expected = torch.zeros_like(h).scatter(-1, top.indices, top.values.relu())
    features, error = f.featurize(x)
    same(features, expected)
    residual = error[0] if isinstance(error, tuple) else error
    same(x - residual, (expected @ t["W_dec"] + t["b_dec"]) * std + mean, 2e-6)
    assert f.site is None


@pytest.mark.parametrize(
    ("location", "site"),
    [
        ("resid_post_mlp_v5_32k", "resid.post:8"),
        ("resid_delta_mlp", "mlp.out:8"),
        ("resid_delta_attn_v5_128k", "attn.out:8"),
        ("mlp_post_act", "mlp.act:8"),
        ("resid_post_attn_v5_32k", "resid.mid:8"),
    ],
)
def test_openai_by_its_path(location, site, tmp_path):
    f = featurizers.load(put(tmp_path / location / "autoencoders", "8.pt", openai()))
    assert str(f.site) == site
    assert f.metadata["sae_lens"]["metadata"]["hook_name"].startswith("blocks.8.")


def test_what_of_openai_is_not_known(tmp_path):
    for number, (change, words) in enumerate(
        (
            ({"activation": "Softplus"}, "the activation 'Softplus'; known are 'ReLU' and 'TopK'"),
            ({"activation_state_dict": {"k": 5, "postact_fn": "Identity"}}, "'Identity' after its TopK"),
            ({"activation_state_dict": {}}, "'k' must be a number, got None"),
        )
    ):
        with pytest.raises(ManifestError, match=words):
            featurizers.load(put(tmp_path / str(number), "8.pt", openai(**change)))
    f = featurizers.load(put(tmp_path / "k", "8.pt", openai(activation_state_dict={"k": torch.tensor(6)})))
    assert f.config.rule_options == {"k": 6}


def test_arrays_of_objects_are_not_read(tmp_path):
    np.savez(tmp_path / "params.npz", W_enc=np.array([{}], dtype=object))
    with pytest.raises(
        WeightsError, match=r"params\.npz cannot be read: 'W_enc\.npy' in it is an array of '\|O', which are objects"
    ):
        featurizers.load(tmp_path)
    (tmp_path / "params.npz").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(WeightsError, match=r"params\.npz"):
        featurizers.load(tmp_path)
