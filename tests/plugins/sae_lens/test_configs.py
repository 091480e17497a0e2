"""SAELens' configurations as the sae-lens plugin reads them: old and invalid ones, their sites and metadata."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import featurizers
import pytest
import torch
from featurizers.errors import ManifestError, WeightsError
from featurizers_transcoder.hooks import site_of
from safetensors.torch import save_file
from torch import Tensor

from tests.support.sae_lens import D, F, batch, same, weights


def save(folder: Path, cfg: dict[str, Any], **tensors: Tensor) -> Path:
    folder.mkdir()
    save_file({**weights(), **tensors}, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps(cfg))
    return folder


OLD = {
    "relu": {"d_in": D, "d_sae": F, "hook_point": "blocks.2.hook_resid_pre", "activation_fn_str": "relu", "lr": 1e-3},
    "topk": {
        "d_in": D,
        "d_sae": F,
        "hook_name": "blocks.2.hook_resid_pre",
        "activation_fn_str": "topk",
        "activation_fn_kwargs": {"k": 5},
        "normalize_activations": "layer_norm",
        "apply_b_dec_to_input": False,
    },
    "hook_z": {"d_in": D, "d_sae": F, "hook_name": "blocks.2.attn.hook_z", "normalize_activations": False},
}


@pytest.mark.parametrize("cfg", OLD.values(), ids=OLD)
def test_configurations_before_version_6(sae_lens, cfg, tmp_path):
    folder = save(
        tmp_path / "old", {**cfg, "model_name": "gpt2-small", "dtype": "float32", "sae_lens_version": "3.20.0"}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sae = sae_lens.SAE.load_from_disk(str(folder))
    f = featurizers.load(folder)
    x = batch(4)
    expected = sae.encode(x.unflatten(-1, (4, 4)) if f.config.n_heads == 0 else x)
    x_hat = sae.decode(expected)
    features, error = f.featurize(x)
    same(features, expected)
    same(x - (error[0] if isinstance(error, tuple) else error), x_hat.reshape(x.shape), 2e-6)
    assert f.site.layer == 2
    assert featurizers.convert(f, tmp_path / "new", "sae-lens") == []
    new = sae_lens.SAE.load_from_disk(str(tmp_path / "new"))
    same(new.encode(x.unflatten(-1, (4, 4)) if f.config.n_heads == 0 else x), expected)
    assert new.cfg.metadata.hook_name == sae.cfg.metadata.hook_name


V6 = {"d_in": D, "d_sae": F, "architecture": "standard", "metadata": {}}
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "architecture": ({"architecture": "hydra"}, "the architecture 'hydra' is not known; known are standard"),
    "architecture of another type": ({"architecture": ["standard"]}, "is not known"),
    "normalisation": ({"normalize_activations": "batch"}, "normalize_activations is 'batch'; known are none"),
    "reshaping": ({"reshape_activations": "hook_q"}, "reshape_activations is 'hook_q'"),
    "unknown key": ({"soft_cap": 3}, r"unknown keys \['soft_cap'\]"),
    "k missing": ({"architecture": "topk"}, "'k' must be a number, got None"),
    "k a string": ({"architecture": "topk", "k": "5"}, "'k' must be a number, got '5'"),
    "k too large": ({"architecture": "topk", "k": 65}, "k must be between 1 and the 64 features"),
    "another width": ({"d_in": 17}, "the configuration says 17"),
    "another count": ({"d_sae": 65}, "the configuration says 65"),
    "a flag of another type": ({"apply_b_dec_to_input": "no"}, "apply_b_dec_to_input is 'no'"),
    "special tokens that are no ids": (
        {"metadata": {"exclude_special_tokens": ["<bos>"]}},
        "'special_tokens.0': Input should be a valid integer, got '<bos>'",
    ),
    "metadata of another type": ({"metadata": []}, r"metadata is \[\], not an object"),
    "tensors of another architecture": ({"architecture": "jumprelu"}, r"missing or unknown: \['threshold'\]"),
}


@pytest.mark.parametrize(("change", "words"), WRONG.values(), ids=WRONG)
def test_what_is_not_known_is_named(change, words, tmp_path):
    folder = save(tmp_path / "it", {**V6, **change})
    with pytest.raises((ManifestError, WeightsError), match=words) as caught:
        featurizers.load(folder)
    assert str(folder) in str(caught.value)


def test_an_old_activation_or_factor_is_named(tmp_path):
    old = {"d_in": D, "d_sae": F, "hook_point": "x"}
    with pytest.raises(ManifestError, match="activation_fn is 'tanh-relu'"):
        featurizers.load(save(tmp_path / "a", {**old, "activation_fn": "tanh-relu"}))
    ones = save(tmp_path / "b", {**old, "finetuning_scaling_factor": True}, scaling_factor=torch.ones(F))
    assert torch.equal(featurizers.load(ones).W_dec, featurizers.load(save(tmp_path / "plain", old)).W_dec)
    with pytest.raises(WeightsError, match="scaling_factor is not 1"):
        featurizers.load(save(tmp_path / "c", old, scaling_factor=torch.full((F,), 2.0)))
    with pytest.raises(WeightsError, match="'W_dec' holds NaN"):
        featurizers.load(save(tmp_path / "d", old, W_dec=torch.full((F, D), float("nan"))))
    with pytest.raises(WeightsError, match=r"\['W_enc'\] must be floating-point tensors"):
        featurizers.load(save(tmp_path / "e", old, W_enc=torch.ones(D, F, dtype=torch.int32)))
    with pytest.raises(WeightsError, match=r"b_enc has shape \(3,\)"):
        featurizers.load(save(tmp_path / "f", old, b_enc=torch.ones(3)))
    mixed = featurizers.load(save(tmp_path / "g", old, b_enc=torch.ones(F, dtype=torch.float64)))
    assert mixed.W_enc.dtype == torch.float64


def test_special_tokens_are_kept(tmp_path):
    folder = save(tmp_path / "it", {**V6, "metadata": {"exclude_special_tokens": [0, 50256]}})
    f = featurizers.load(folder)
    assert f.special_tokens == (0, 50256)
    featurizers.convert(f, tmp_path / "back", "sae-lens")
    assert json.loads((tmp_path / "back/cfg.json").read_text())["metadata"]["exclude_special_tokens"] == [0, 50256]


SITES = [
    ("blocks.3.hook_resid_pre", "gpt2-small", None, "resid.pre:3", "openai-community/gpt2"),
    ("blocks.3.hook_mlp_out", "gpt2-small", None, "mlp.out:3", "openai-community/gpt2"),
    ("blocks.3.hook_mlp_out", "gemma-2b", None, "mlp.out:3", "google/gemma-2b"),
    (
        "blocks.3.hook_mlp_out",
        "gemma-2-2b",
        None,
        "module:model.layers.3.post_feedforward_layernorm:output",
        "google/gemma-2-2b",
    ),
    (
        "blocks.3.hook_attn_out",
        "google/gemma-3-4b-pt",
        None,
        "module:model.language_model.layers.3.post_attention_layernorm:output",
        "google/gemma-3-4b-pt",
    ),
    (
        "blocks.3.hook_attn_out",
        "google/gemma-3-270m",
        None,
        "module:model.layers.3.post_attention_layernorm:output",
        "google/gemma-3-270m",
    ),
    ("blocks.3.attn.hook_z", "pythia-70m-deduped", 5, "attn.z:3:5", "EleutherAI/pythia-70m-deduped"),
    ("hook_embed", "meta-llama/Llama-3.1-8B", None, "embed", "meta-llama/Llama-3.1-8B"),
    ("blocks.3.hook_resid_mid", "gpt2-small", None, "resid.mid:3", "openai-community/gpt2"),
    ("blocks.3.hook_mlp_in", "gpt2-small", None, "None", None),
    ("blocks.3.attn.hook_q", "gpt2-small", 2, "None", None),
    (None, None, None, "None", None),
]


@pytest.mark.parametrize(("hook", "model", "head", "site", "hub_id"), SITES)
def test_sites_and_back(hook, model, head, site, hub_id, tmp_path):
    metadata = {"hook_name": hook, "model_name": model, "hook_head_index": head}
    f = featurizers.load(save(tmp_path / "it", {**V6, "metadata": metadata}))
    assert str(f.site) == site
    assert (f.site.model if f.site else None) == hub_id
    assert featurizers.convert(f, tmp_path / "back", "sae-lens") == []
    assert json.loads((tmp_path / "back/cfg.json").read_text())["metadata"] == {**metadata, "sae_lens_version": "6.0.0"}
    assert featurizers.load(tmp_path / "back").site == f.site


def test_gemma_adds_to_the_residual_stream_what_these_sites_are():
    """Gemma 2 normalises the outputs of attention and MLP before it adds them; TransformerLens hooks the result."""
    transformers = pytest.importorskip("transformers")
    config = transformers.Gemma2Config(
        vocab_size=11, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layernorm" in name:
                parameter.uniform_(0.5, 2)
    sites = [site_of(f"blocks.1.{hook}", "gemma-2-2b") for hook in ("hook_attn_out", "hook_mlp_out")]
    ends = [featurizers.Site("resid.pre", 1), featurizers.Site("resid.post", 1)]
    with torch.no_grad():
        collected = featurizers.collect(model, {"input_ids": torch.arange(5)[None]}, [*sites, *ends])
    attention, mlp, before, after = (collected[site] for site in (*sites, *ends))
    torch.testing.assert_close(before + attention + mlp, after)


def test_metadata_of_a_featurizer_survive(tmp_path):
    f = featurizers.load(save(tmp_path / "it", V6))
    f.metadata |= {"note of mine": [1, 2], "catalogue": {"release": "x"}}
    assert featurizers.convert(f, tmp_path / "back", "sae-lens") == []
    again = featurizers.load(tmp_path / "back")
    assert again.metadata["note of mine"] == [1, 2]
    assert again.metadata["catalogue"] == {"release": "x"}


def test_activations_of_another_kind_are_noted(tmp_path):
    options = {"metadata": {"model_from_pretrained_kwargs": {"center_writing_weights": True}}}
    f = featurizers.load(save(tmp_path / "it", {**V6, **options, "normalize_activations": "expected_average_only_in"}))
    assert [note.split()[0] for note in f.metadata["notes"]] == ["expected_average_only_in", "Trained"]
