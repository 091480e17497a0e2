"""SAELens' catalogue, with a Hub that serves small files under its names, compared with SAELens' own loaders."""

from __future__ import annotations

import dataclasses
import io
import json
import pickle
import re
import sys
import warnings
from typing import Any

import featurizers
import pytest
import torch
from featurizers.errors import FeatureIndexError, HubNotFoundError, ManifestError, SourceError, WeightsError
from featurizers_sae_lens import catalogue
from featurizers_sae_lens.table import Catalogue
from safetensors.torch import load, save

from tests.support.sae_lens import D, F, linear, same, weights

np = pytest.importorskip("numpy")


def pickled(data: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(data, stream)
    return stream.getvalue()


def zipped(t: dict[str, torch.Tensor]) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, **{name: tensor.numpy() for name, tensor in t.items()})
    return stream.getvalue()


def raw(data: Any) -> bytes:
    return json.dumps(data).encode()


def gated() -> dict[str, torch.Tensor]:
    t = weights("gate_bias", "r_mag", "mag_bias")
    t.pop("b_enc")
    g = {name: t[name] for name in ("gate_bias", "r_mag", "mag_bias")}
    return {"encoder.weight": t["W_enc"].T, "decoder.weight": t["W_dec"].T, "decoder_bias": t["b_dec"], **g}


def trainer(kind: str, **more: Any) -> bytes:
    common = {"dict_class": kind, "activation_dim": D, "dict_size": F, "layer": 12, "lm_name": "google/gemma-2-2b"}
    return raw({"trainer": {**common, **more}, "buffer": {"ctx_len": 128}})


NORMED = {"d_model": D, "d_sae": F, "jump_relu_threshold": 3.0, "dataset_average_activation_norm": {"in": 5.0}}
V5 = {"d_in": D, "d_sae": F, "dtype": "float32"}
V6 = {"d_in": D, "d_sae": F, "architecture": "jumprelu", "dtype": "float32", "device": "cpu", "metadata": {}}

# release and id, and the files that they need
ENTRIES: dict[str, tuple[str, dict[str, bytes]]] = {
    "sae_lens": (
        "gpt2-small-res-jb/blocks.8.hook_resid_pre",
        {
            "cfg.json": raw({**V5, "hook_point": "blocks.8.hook_resid_pre"}),
            "sae_weights.safetensors": save(weights()),
        },
    ),
    "gemma_2": ("gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_22", {"params.npz": zipped(weights("threshold"))}),
    "gemma_2 attention": (
        "gemma-scope-2b-pt-att/layer_12/width_16k/average_l0_22",
        {"params.npz": zipped(weights("threshold"))},
    ),
    "gemma_3": (
        "gemma-scope-2-4b-pt-res-all/layer_0_width_16k_l0_big",
        {
            "config.json": raw(
                {
                    "architecture": "jump_relu",
                    "model_name": "gemma-v3-4b-pt",
                    "hf_hook_point_in": "model.layers.0.output",
                }
            ),
            "params.safetensors": save({k.replace("W_", "w_"): t for k, t in weights("threshold").items()}),
        },
    ),
    "llama_scope": (
        "llama_scope_lxr_8x/l5r_8x",
        {
            "hyperparams.json": raw({**NORMED, "hook_point_in": "blocks.5.hook_resid_post"}),
            "checkpoints/final.safetensors": save(linear()),
        },
    ),
    "llama_scope_r1_distill": (
        "llama_scope_r1_distill/l0r_800m_slimpajama",
        {
            "config.json": raw({"d_model": D, "expansion_factor": 4, "hook_point_in": "blocks.0.hook_resid_post"}),
            "sae_weights.safetensors": save({**linear(), "log_jumprelu_threshold": torch.randn(F)}),
        },
    ),
    "goodfire": ("goodfire-llama-3.1-8b-instruct/layer_19", {"": pickled(linear("_linear."))}),
    "deepseek_r1": (
        "deepseek-r1-distill-llama-8b-qresearch/blocks.19.hook_resid_post",
        {"": pickled(linear())},
    ),
    "qwen_scope": (
        "qwen-scope-3-1.7b-base-w32k-l50/layer3",
        {"": pickled({**weights(), "W_enc": weights()["W_enc"].T, "W_dec": weights()["W_dec"].T})},
    ),
    "connor_rob_hook_z": (
        "gpt2-small-hook-z-kk/blocks.1.hook_z",
        {
            "": pickled(weights()),
            "_cfg.json": raw({"act_size": D, "dict_size": F, "act_name": "blocks.1.attn.hook_z"}),
        },
    ),
    "dictionary_learning topk": (
        "sae_bench_gemma-2-2b_topk_width-2pow12_date-1109/blocks.12.hook_resid_post__trainer_0",
        {
            "config.json": trainer("AutoEncoderTopK", k=5),
            "ae.pt": pickled(
                {
                    "encoder.weight": weights()["W_enc"].T,
                    "encoder.bias": weights()["b_enc"],
                    "decoder.weight": weights()["W_dec"].T,
                    "b_dec": weights()["b_dec"],
                    "k": torch.tensor(5),
                }
            ),
        },
    ),
    "dictionary_learning gated": (
        "sae_bench_gemma-2-2b_topk_width-2pow12_date-1109/blocks.12.hook_resid_post__trainer_1",
        {"config.json": trainer("GatedAutoEncoder"), "ae.pt": pickled(gated())},
    ),
    "dictionary_learning batchtopk": (
        "sae_bench_gemma-2-2b_topk_width-2pow12_date-1109/blocks.12.hook_resid_post__trainer_2",
        {
            "config.json": trainer("MatryoshkaBatchTopKSAE", k=5),
            "ae.pt": pickled({**weights(), "threshold": torch.tensor(0.4), "k": torch.tensor(5)}),
        },
    ),
    "dictionary_learning standard": (
        "sae_bench_gemma-2-2b_vanilla_width-2pow12_date-1109/blocks.12.hook_resid_post__trainer_0",
        {
            "config.json": trainer("AutoEncoder"),
            "ae.pt": pickled(
                {
                    "encoder.weight": weights()["W_enc"].T,
                    "encoder.bias": weights()["b_enc"],
                    "decoder.weight": weights()["W_dec"].T,
                    "bias": weights()["b_dec"],
                }
            ),
        },
    ),
    "gemma_2 embedding": (
        "gemma-scope-2b-pt-res/embedding/width_4k/average_l0_6",
        {"params.npz": zipped(weights("threshold"))},
    ),
    "gemma_2 mlp": (
        "gemma-scope-2b-pt-mlp/layer_12/width_16k/average_l0",
        {"params.npz": zipped(weights("threshold"))},
    ),
    "gemma_3 mlp, without config.json": (
        "gemma-scope-2-4b-pt-mlp-all/layer_3_width_16k_l0_big",
        {"params.safetensors": save({k.replace("W_", "w_"): t for k, t in weights("threshold").items()})},
    ),
    "gemma_3 attention, without config.json": (
        "gemma-scope-2-270m-pt-att-all/layer_3_width_16k_l0_big",
        {"params.safetensors": save({k.replace("W_", "w_"): t for k, t in weights("threshold").items()})},
    ),
    "sae_lens with config_overrides": (
        "mistral-7b-res-wg/blocks.8.hook_resid_pre",
        {
            "cfg.json": raw({**V5, "hook_name": "blocks.8.hook_resid_pre"}),
            "sae_weights.safetensors": save(weights()),
        },
    ),
    "sae_lens with a factor": (
        "gpt2-small-mlp-tm/blocks.1.hook_mlp_out",
        {
            "cfg.json": raw(
                {**V5, "hook_name": "blocks.1.hook_mlp_out", "normalize_activations": "expected_average_only_in"}
            ),
            "sae_weights.safetensors": save(weights()),
        },
    ),
}
SITES = {
    "gemma_2 attention": ("attn.z:12", "google/gemma-2-2b"),
    "gemma_2 embedding": ("embed", "google/gemma-2-2b"),
    "gemma_2 mlp": ("module:model.layers.12.post_feedforward_layernorm:output", "google/gemma-2-2b"),
    "gemma_3": ("resid.post:0", "google/gemma-3-4b-pt"),
    "gemma_3 mlp, without config.json": (
        "module:model.language_model.layers.3.post_feedforward_layernorm:output",
        "google/gemma-3-4b-pt",
    ),
    "gemma_3 attention, without config.json": ("attn.z:3", "google/gemma-3-270m"),
    "sae_lens": ("resid.pre:8", "openai-community/gpt2"),
    "sae_lens with a factor": ("mlp.out:1", "openai-community/gpt2"),
    "sae_lens with config_overrides": ("resid.pre:8", None),
    "llama_scope": ("resid.post:5", "meta-llama/Llama-3.1-8B"),
    "llama_scope_r1_distill": ("resid.post:0", "deepseek-ai/DeepSeek-R1-Distill-Llama-8B"),
    "goodfire": ("resid.post:19", "meta-llama/Llama-3.1-8B-Instruct"),
    "deepseek_r1": ("resid.post:19", "deepseek-ai/DeepSeek-R1-Distill-Llama-8B"),
    "qwen_scope": ("resid.post:3", "Qwen/Qwen3-1.7B-Base"),
    "connor_rob_hook_z": ("attn.z:1", "openai-community/gpt2"),
}
"""Site and model of each entry; entries that are not listed are of the residual stream of layer 12 of Gemma 2."""


@pytest.fixture(scope="module")
def sae_lens() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("sae_lens")


def entry(sae_lens: Any, reference: str) -> tuple[str, str, str, str]:
    """Return release and id, and the repository and the path that the catalogue has for them."""
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    release, _, name = reference.partition("/")
    lookup = get_pretrained_saes_directory()[release]
    name = name or next(iter(lookup.saes_map))
    name = name if name in lookup.saes_map else min(lookup.saes_map, key=lambda known: not known.startswith(name[:10]))
    return release, name, lookup.repo_id, lookup.saes_map[name]


def serve(hub: Any, repo_id: str, path: str, files: dict[str, bytes]) -> None:
    """Put files at the path that the catalogue has, or at that path with a suffix."""
    repo = hub.create("model", repo_id)
    entries = dict(repo["commits"][hub.head(repo_id)]["files"])
    for name, data in files.items():
        if name == "":
            file = path
        elif name.startswith("_"):
            file = path.removesuffix(".pt") + name
        else:
            file = f"{path}/{name}" if path else name
        entries[file] = hub.entry(hub.put_bytes(data), len(data), file.endswith((".safetensors", ".npz", ".pt")), data)
    hub.commit(repo, "refs/heads/main", entries, "files", "", "alice", hub.head(repo_id))


def _of_these_sizes(release: str, **more: int) -> Any:
    """Return SAELens' own loader with the sizes of these weights; some loaders have hard-coded sizes."""
    from sae_lens.loading.pretrained_sae_loaders import NAMED_PRETRAINED_SAE_LOADERS, get_conversion_loader_name

    loader = NAMED_PRETRAINED_SAE_LOADERS[get_conversion_loader_name(release)]

    def converter(cfg_overrides: dict[str, Any] | None = None, **arguments: Any) -> Any:
        return loader(**arguments, cfg_overrides={**(cfg_overrides or {}), "d_in": D, "d_sae": F, **more})

    return converter


@pytest.mark.parametrize("case", ENTRIES)
def test_a_release_is_what_saelens_loads(sae_lens, hub, monkeypatch, case):
    from sae_lens.loading import pretrained_sae_loaders as loaders

    reference, files = ENTRIES[case]
    site, model = SITES.get(case, ("resid.post:12", "google/gemma-2-2b"))
    # SAELens asks huggingface.co for the header of the file
    monkeypatch.setattr(loaders, "get_safetensors_tensor_shapes", lambda *_: {"w_enc": [D, F], "w_dec": [F, D]})
    release, name, repo_id, path = entry(sae_lens, reference)
    serve(hub, repo_id, path, files)
    f = featurizers.load(f"sae-lens:{release}/{name}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sae = sae_lens.SAE.from_pretrained(release, name, device="cpu", converter=_of_these_sizes(release))
    x = torch.randn(4, 3, D, generator=torch.Generator().manual_seed(1))
    apart = x.unflatten(-1, (4, 4)) if sae.cfg.reshape_activations == "hook_z" else x
    expected = sae.encode(apart)
    x_hat = sae.decode(expected).reshape(x.shape)
    features, error = f.featurize(x)
    same(features, expected)
    assert torch.equal(f.encode(apart), features)
    same(x - (error[0] if isinstance(error, tuple) else error), x_hat)
    assert f.id == f"sae-lens:{release}/{name}"
    assert f.revision == hub.head(repo_id)
    assert f.metadata["catalogue"]["repo_id"] == repo_id
    assert str(f.site) == site
    assert f.site.model == model
    if f.config.rule not in ("topk",):
        part = featurizers.load(f"sae-lens:{release}/{name}", indices=[40, 3])
        torch.testing.assert_close(part.collect(x, [3]), f.collect(x, [3]))


def clt(number: int, **more: torch.Tensor) -> dict[str, bytes]:
    """Return the files of a layer of a cross-layer transcoder of 26 layers."""
    g = torch.Generator().manual_seed(number)
    own = {"W_enc": torch.randn(F, D, generator=g), "b_enc": torch.randn(F, generator=g), "b_dec": torch.randn(D)}
    decoder = torch.randn(F, 26 - number, D, generator=g)
    return {
        f"W_enc_{number}.safetensors": save({f"{name}_{number}": t for name, t in {**own, **more}.items()}),
        f"W_dec_{number}.safetensors": save({f"W_dec_{number}": decoder}),
        "config.yaml": b"model_name: google/gemma-2-2b\nfeature_input_hook: hook_resid_mid\n"
        b"feature_output_hook: hook_mlp_out\nscan: null\n",
    }


QWEN = {name: t.T.contiguous() if name == "W_enc" else t for name, t in weights().items()}
SCOPE_2 = {name.replace("W_", "w_"): t for name, t in weights("threshold").items()}
POST = "module:model.layers.{}.post_feedforward_layernorm:output"
SIZES = f"d_model: {{value: {D}}}\nd_feature: {{value: {F}}}\nbatch_size: {{value: 64}}\n".encode()
# release and id, files by their paths in the repository, sites, model
MAPS: dict[str, tuple[str, dict[str, bytes], str, str]] = {
    "mwhanna": (
        "mwhanna-qwen3-4b-transcoders/layer_7",
        {
            "layer_7.safetensors": save(QWEN),
            "wandb-config.yaml": SIZES,
            "config.yaml": b"model_name: Qwen/Qwen3-4B\nfeature_output_hook: mlp.hook_out\nscan: [a, b]\n",
        },
        "mlp.in:7 -> mlp.out:7",
        "Qwen/Qwen3-4B",
    ),
    "mwhanna, without config.yaml": (
        "mwhanna-qwen3-14b-transcoders/layer_7",
        {"layer_7.safetensors": save(QWEN), "wanb-config.yaml": SIZES},
        "mlp.in:7 -> mlp.out:7",
        "Qwen/Qwen3-14B",
    ),
    "gemma_2_transcoder": (
        "gemma-scope-2b-pt-transcoders/layer_7/width_16k/average_l0_70",
        {"/params.npz": zipped(weights("threshold"))},
        f"resid.mid:7 -> {POST.format(7)}",
        "google/gemma-2-2b",
    ),
    "gemma_3": (
        "gemma-scope-2-1b-pt-transcoders-all/layer_7_width_16k_l0_big",
        {"/params.safetensors": save(SCOPE_2)},
        f"mlp.in:7 -> {POST.format(7)}",
        "google/gemma-3-1b-pt",
    ),
    "gemma_3, affine": (
        "gemma-scope-2-1b-pt-transcoders-all/layer_7_width_16k_l0_big_affine",
        {"/params.safetensors": save({**SCOPE_2, "affine_skip_connection": torch.randn(D, D)})},
        f"mlp.in:7 -> {POST.format(7)}",
        "google/gemma-3-1b-pt",
    ),
}


@pytest.mark.parametrize("case", MAPS)
def test_a_transcoder_is_what_saelens_loads(sae_lens, hub, monkeypatch, case):
    from sae_lens.loading import pretrained_sae_loaders as loaders

    reference, files, sites, model = MAPS[case]
    monkeypatch.setattr(loaders, "get_safetensors_tensor_shapes", lambda *_: {"w_enc": [D, F], "w_dec": [F, D]})
    release, name, repo_id, path = entry(sae_lens, reference)
    serve(hub, repo_id, "", {f"{path}{file}" if file.startswith("/") else file: data for file, data in files.items()})
    f = featurizers.load(f"sae-lens:{release}/{name}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sae = sae_lens.SAE.from_pretrained(release, name, device="cpu", converter=_of_these_sizes(release, d_out=D))
    x = torch.randn(4, 3, D, generator=torch.Generator().manual_seed(1))
    theirs = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) if case == "gemma_2_transcoder" else x
    features = f.encode("features", {"in": x})
    same(features, sae.encode(theirs))
    same(f.decode("out", {"features": features}, {"in": x}), sae(theirs), 1e-5)
    assert f.sites_text == sites
    assert {site.model for site in f.sites.values()} == {model}
    assert (f.id, f.revision) == (f"sae-lens:{release}/{name}", hub.head(repo_id))
    assert f.metadata["catalogue"]["repo_id"] == repo_id
    for indices in ([40, 3], {"features": [40, 3]}):
        part = featurizers.load(f"sae-lens:{release}/{name}", indices=indices)
        same(part.encode("features", {"in": x}), features[..., [40, 3]])


@pytest.mark.parametrize("threshold", [False, True])
def test_a_layer_of_a_cross_layer_transcoder_writes_each_later_layer(sae_lens, hub, threshold):
    """SAELens has the same features without a threshold, and the sum of our decoders."""
    release, name, repo_id, _ = entry(sae_lens, "mntss-gemma-2-2b-2.5m-clt-as-per-layer/layer_23")
    t = {"threshold": torch.rand(F)} if threshold else {}
    serve(hub, repo_id, "", clt(23, **t))
    f = featurizers.load(f"sae-lens:{release}/{name}")
    encoder = load(clt(23)["W_enc_23.safetensors"])
    decoder = load(clt(23)["W_dec_23.safetensors"])["W_dec_23"]
    x = torch.randn(4, 3, D, generator=torch.Generator().manual_seed(1))
    h = x @ encoder["W_enc_23"].T + encoder["b_enc_23"]
    features = f.encode("layer-23", {"in-23": x})
    same(features, torch.where(h > t["threshold"], h, 0.0) if threshold else h.relu())
    bias = f.b_dec["out-23"]
    for number in (23, 24, 25):
        y = f.decode(f"out-{number}", {"layer-23": features}, {"in-23": x})
        same(y, features @ decoder[:, number - 23] + (bias if number == 23 else 0.0), 1e-5)
    assert list(map(str, f.reads.values())) == ["resid.mid:23"]
    assert list(map(str, f.writes.values())) == [POST.format(number) for number in (23, 24, 25)]
    assert {site.model for site in f.sites.values()} == {"google/gemma-2-2b"}
    assert "this layer's features alone" in f.metadata["notes"][0]
    for indices in ([40, 3], {"layer-23": [40, 3]}):
        part = featurizers.load(f"sae-lens:{release}/{name}", indices=indices)
        same(part.encode("layer-23", {"in-23": x}), features[..., [40, 3]])
        assert torch.equal(part.W_dec["layer-23"]["out-25"], f.W_dec["layer-23"]["out-25"][[40, 3]])
    with pytest.raises(FeatureIndexError, match=f"feature index {F} is out of range: there are {F}"):
        featurizers.load(f"sae-lens:{release}/{name}", indices=[F])
    from sae_lens.loading import pretrained_sae_loaders as loaders

    shapes = {key: list(value.shape) for key, value in encoder.items()}
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr(loaders, "get_safetensors_tensor_shapes", lambda *_: shapes)
        if threshold:
            return  # SAELens refuses no such file, and has other features
        sae = sae_lens.SAE.from_pretrained(release, name, device="cpu", converter=_of_these_sizes(release, d_out=D))
    same(features, sae.encode(x))
    same(sum(f.W_dec["layer-23"].values()), sae.W_dec, 1e-5)


TEMPORAL = f"""
llm: {{dimin: {D}, name: a}}
sae: {{exp_factor: {F / D}, n_heads: 2, n_attn_layers: 1, bottleneck_factor: 8, sae_diff_type: topk, kval_topk: 5,
  tied_weights: True, scaling_factor: 0.029}}
data: {{dtype: bfloat16}}
""".encode()
LAYER = {"k_ctx": F // 8, "q_target": F // 8, "v_ctx": F, "c_proj": F}


@pytest.mark.parametrize(
    ("reference", "site", "model"),
    [
        ("temporal-sae-gemma-2-2b/blocks.12.hook_resid_post", "resid.post:12", "google/gemma-2-2b"),
        ("temporal-sae-llama-3.1-8b/blocks.26.hook_resid_post", "resid.post:26", "meta-llama/Llama-3.1-8B"),
    ],
)
def test_a_temporal_autoencoder_is_what_saelens_loads(sae_lens, hub, reference, site, model):
    release, name, repo_id, path = entry(sae_lens, reference)
    g = torch.Generator().manual_seed(0)
    t = {"D": torch.randn(F, D, generator=g), "b": torch.randn(D, generator=g)}
    for part, width in LAYER.items():
        t[f"attn_layers.0.{part}.weight"] = torch.randn(width, F, generator=g)
        t[f"attn_layers.0.{part}.bias"] = torch.randn(width, generator=g)
    serve(hub, repo_id, path, {"conf.yaml": TEMPORAL, "latest_ckpt.safetensors": save(t)})
    f = featurizers.load(f"sae-lens:{release}/{name}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sae = sae_lens.SAE.from_pretrained(release, name, device="cpu")
    x = torch.randn(4, 6, D, generator=g) * 30
    features = {group: f.encode(group, {"in": x}) for group in f.groups}
    for found, expected in zip(features.values(), sae.encode_with_predictions(x), strict=True):
        same(found, expected, 1e-5)
    same(f.decode("out", features, {"in": x}), sae(x), 1e-5)
    assert {str(each) for each in f.sites.values()} == {site}
    assert {each.model for each in f.sites.values()} == {model}
    serve(hub, repo_id, path, {"conf.yaml": TEMPORAL.replace(b"n_heads: 2, ", b"")})
    with pytest.raises(ManifestError, match="lacks a value"):
        featurizers.load(f"sae-lens:{release}/{name}")


def test_layers_that_cannot_be_read(hub):
    reference, repo_id = "mntss-gemma-2-2b-2.5m-clt-as-per-layer/layer_23", "mntss/clt-gemma-2-2b-2.5M"
    good = clt(23)
    for change, words in (
        (clt(23, threshold=torch.linspace(-0.1, 1, F)), "thresholds are negative"),
        (clt(23, threshold=torch.ones(F - 1)), "'threshold_23' has 63 features"),
        (clt(23, gain=torch.ones(F)), r"unknown tensors \['gain_23'\]"),
        ({"W_dec_23.safetensors": save({"W_dec_23": torch.ones(F, D)})}, "not 3 dimensions"),
        ({"W_dec_23.safetensors": save({"W_dec_23": torch.ones(F, 0, D)})}, "writes 0 layers; at most 1000"),
        ({"W_dec_23.safetensors": save({"W_dec_23": torch.ones(F, 1001, D)})}, "writes 1001 layers; at most 1000"),
        ({"W_dec_23.safetensors": save({"W_dec_2": torch.ones(F, 2, D)})}, "W_dec_2"),
        ({"config.yaml": b"[1, 2"}, r"config\.yaml is not YAML"),
        ({"config.yaml": b"- 1"}, "holds a list, not a mapping"),
        ({"config.yaml": b"model: 1"}, "lacks model_name"),
        ({"config.yaml": b"x" * 70000}, r"config\.yaml"),
    ):
        hub.repos.clear()
        serve(hub, repo_id, "", {**good, **change})
        with pytest.raises((ManifestError, WeightsError), match=words):
            featurizers.load(f"sae-lens:{reference}")


def test_a_repository_of_saelens_needs_no_catalogue(hub):
    serve(
        hub,
        "alice/saes",
        "blocks.1.hook_resid_post",
        {"cfg.json": raw(V6), "sae_weights.safetensors": save(weights("threshold"))},
    )
    f = featurizers.load("alice/saes", subfolder="blocks.1.hook_resid_post", device="cpu", dtype=torch.float64)
    assert f.n_features == F
    assert f.W_enc.dtype == torch.float64
    assert f.revision == hub.head("alice/saes")
    pinned = featurizers.load(f"alice/saes@{f.revision}", subfolder="blocks.1.hook_resid_post")
    assert torch.equal(pinned.W_enc.double(), f.W_enc)
    with pytest.raises(ManifestError, match=r"no installed plugin knows the format of '\.gitattributes', 'blocks"):
        featurizers.load("alice/saes")


WRONG = {
    "no release": ("gpt2-small-res-jbb/blocks.8.hook_resid_pre", SourceError, "did you mean 'gpt2-small-res-jb'"),
    "no id": ("gpt2-small-res-jb/blocks.99.hook_resid_pre", SourceError, r"has no 'blocks\.99.*'; did you mean"),
    "no id at all": ("gpt2-small-res-jb", SourceError, "write 'sae-lens:gpt2-small-res-jb/"),
    "a repository": (
        "jbloom/GPT2-Small-SAEs-Reformatted/blocks.8.hook_resid_pre",
        SourceError,
        "releases of the repository 'jbloom/GPT2-Small-SAEs-Reformatted' are 'gpt2-small-res-jb'",
    ),
    "a repository that is away": ("gpt2-small-res-jb/blocks.8.hook_resid_pre", HubNotFoundError, "no such repository"),
}


@pytest.mark.parametrize(("reference", "error", "words"), WRONG.values(), ids=WRONG)
def test_what_the_catalogue_does_not_give(hub, reference, error, words):
    with pytest.raises(error, match=words):
        featurizers.load(f"sae-lens:{reference}")


@pytest.mark.parametrize(
    ("source", "error", "asked"),
    [
        ("gpt2-small-res-jb/blocks.8.hook_resid_pre", HubNotFoundError, 1),
        ("gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71", SourceError, 0),
    ],
)
def test_an_entry_without_the_name_of_the_plugin_is_answered_by_its_source(hub, source, error, asked):
    with pytest.raises(error, match=rf"[^.]\. Did you mean 'sae-lens:{re.escape(source)}'\?$") as caught:
        featurizers.load(source)
    assert len(hub.requests()) == asked
    again = pickle.loads(pickle.dumps(caught.value))
    assert (type(again), str(again)) == (error, str(caught.value))


def test_a_repository_of_the_name_of_an_entry_is_loaded(hub):
    serve(hub, "gpt2-small-res-jb/blocks.8.hook_resid_pre", "", ENTRIES["sae_lens"][1])
    assert featurizers.load("gpt2-small-res-jb/blocks.8.hook_resid_pre").n_features == F
    with pytest.raises(HubNotFoundError) as caught:
        featurizers.load("gpt2-small-res-jb/blocks.8.hook_resid_pre", revision="nowhere")
    assert "Did you mean" not in str(caught.value)


def test_a_catalogue_that_says_more_than_is_known(hub, monkeypatch):
    whole = catalogue.catalogue().releases
    for change, words in (
        ({"overrides": {"k": 5}}, r"overrides \['k'\], which is not known here"),
        ({"overrides": {"soft_cap": 5}}, r"overrides \['soft_cap'\]"),
        ({"loader": "hydra"}, "the loader 'hydra', which is not known here"),
    ):
        release = dataclasses.replace(whole["goodfire-llama-3.1-8b-instruct"], **change)
        hub.repos.clear()
        hub.create("model", release.repo_id)
        monkeypatch.setattr(catalogue, "catalogue", lambda release=release: Catalogue("6", {"r": release}))
        with pytest.raises(ManifestError, match=words):
            featurizers.load("sae-lens:r/layer_19")


def test_the_catalogue_needs_no_saelens(hub, monkeypatch):
    for name in ("sae_lens", "yaml"):
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    serve(hub, "jbloom/GPT2-Small-SAEs-Reformatted", "blocks.8.hook_resid_pre", ENTRIES["sae_lens"][1])
    f = featurizers.load("sae-lens:gpt2-small-res-jb/blocks.8.hook_resid_pre")
    assert str(f.site) == "resid.pre:8"
    assert f.metadata["catalogue"]["l0"] == 60.0


def test_every_entry_of_the_catalogue_is_decided():
    """Every entry has a known loader and known overrides, and none is refused; no file is downloaded."""

    class Asked(Exception):
        pass

    def repository(*_: Any) -> Any:
        raise Asked

    for release in catalogue.catalogue().releases.values():
        for name in release.entries:
            with pytest.raises(Asked):
                catalogue.resolve(f"{release.name}/{name}", repository)


def test_pickled_objects_are_not_run(sae_lens, hub, tmp_path):
    class Mischief:
        def __reduce__(self):
            return (open, (str(tmp_path / "was-here"), "w"))

    release, name, repo_id, path = entry(sae_lens, ENTRIES["goodfire"][0])
    serve(hub, repo_id, path, {"": pickled({"encoder_linear.weight": Mischief()})})
    with pytest.raises(WeightsError, match="holds more than tensors, and nothing of it is run"):
        featurizers.load(f"sae-lens:{release}/{name}")
    assert not (tmp_path / "was-here").exists()
