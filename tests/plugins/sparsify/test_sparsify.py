"""Plugin sparsify compared with golden tensors of sparsify itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import featurizers
import pytest
import torch
from featurizers.errors import ConversionError, ManifestError, UsageError, WeightsError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.support.dictionaries import dictionary

GOLDEN = Path(__file__).parents[2] / "fixtures/sparsify/golden.safetensors"
WEIGHTS = ("encoder.weight", "encoder.bias", "W_dec", "b_dec")
ONE_SITE = {"skip_connection": False, "transcode": False}
CFG = {"expansion_factor": 4, "normalize_decoder": True, "num_latents": 0, "k": 8, "multi_topk": False, "d_in": 16}


def golden(activation: str) -> dict[str, Tensor]:
    start = f"{activation}/"
    return {n.removeprefix(start): t for n, t in load_file(GOLDEN).items() if n.startswith(start)}


def write(folder: Path, activation: str = "topk", drop: str = "", **changes: Any) -> Path:
    folder.mkdir(parents=True)
    tensors = golden(activation)
    kept = {name: tensors[name] for name in WEIGHTS if name != drop}
    save_file({**kept, **{n: t for n, t in changes.items() if isinstance(t, Tensor)}}, folder / "sae.safetensors")
    cfg = {**CFG, **({"signed": True} if activation == "signed" else {"activation": activation, **ONE_SITE})}
    cfg |= {n: v for n, v in changes.items() if not isinstance(v, Tensor)}
    (folder / "cfg.json").write_text(json.dumps(cfg))
    return folder


@pytest.mark.parametrize("length", [1.0, 1.002, -1.0, 2.0, 0.1])
def test_a_decoder_is_said_to_be_normalised_if_its_rows_have_length_one(length, tmp_path):
    decoder = length * torch.nn.functional.normalize(golden("topk")["W_dec"], dim=-1)
    f = featurizers.load(write(tmp_path / "layers.10", W_dec=decoder))
    featurizers.convert(f, tmp_path / "again", "sparsify")
    written = json.loads((tmp_path / "again" / "cfg.json").read_text())
    assert written["normalize_decoder"] == (abs(length) == 1.0)


@pytest.mark.parametrize("activation", ["topk", "groupmax", "signed"])
@pytest.mark.parametrize(
    "count", [{}, {"num_latents": 64, "expansion_factor": 1}, {"normalize_decoder": False}], ids=str
)
def test_the_numbers_are_sparsifys(activation, count, tmp_path):
    f = featurizers.load(write(tmp_path / "layers.10", activation, **count))
    t = golden(activation)
    features, error = f.featurize(t["x"])
    torch.testing.assert_close(features, t["features"], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(t["x"] - error, t["x_hat"], rtol=1e-5, atol=2e-6)
    three = t["x"].reshape(2, 3, 16)  # sparsify itself only decodes matrices
    torch.testing.assert_close(f.encode(three).reshape(6, 64), t["features"], rtol=1e-6, atol=1e-6)
    mixed = t["features"].clone()
    mixed[:, [1, 40]] = t["features"].flip(0)[:, [1, 40]]
    expected = mixed @ t["W_dec"] + t["b_dec"] + (t["x"] - t["x_hat"])
    torch.testing.assert_close(f.interchange(t["x"], t["x"].flip(0), [1, 40]), expected, rtol=1e-5, atol=1e-5)
    assert not torch.equal(mixed, t["features"])
    assert (f.site, f.id) == (featurizers.Site("resid.post", 10), "layers.10")


@pytest.mark.parametrize(
    ("hookpoint", "site"),
    [
        ("layers.3", "resid.post:3"),
        ("layers.3.mlp", "mlp.out:3"),
        ("model.layers.3.self_attn", "attn.out:3"),
        ("h.3.mlp", "mlp.out:3"),
        ("transformer.h.11", "resid.post:11"),
        ("layers.3.mlp/seed1", "mlp.out:3"),
        ("gpt_neox.layers.3.attention", "attn.out:3"),
        ("layers.3.mlp_in", None),
        ("layers.3.mlp.gate_proj", None),
        ("vision_tower.layers.3", None),
        ("embed_tokens", None),
    ],
)
def test_a_hookpoint_is_a_site(hookpoint, site, tmp_path):
    write(tmp_path / hookpoint)
    f = featurizers.load(tmp_path, subfolder=hookpoint)
    assert f.id == hookpoint.partition("/")[0]
    assert f.site == (None if site is None else featurizers.Site.parse(site))


@pytest.mark.parametrize("activation", ["topk", "groupmax"])
def test_it_is_written_as_it_was_read(activation, tmp_path):
    f = featurizers.load(write(tmp_path / "sparsify", activation, multi_topk=True))
    assert featurizers.convert(f, tmp_path / "back/sparsify", "sparsify") == []
    first, second = (load_file(tmp_path / name / "sae.safetensors") for name in ("sparsify", "back/sparsify"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    cfg = json.loads((tmp_path / "back/sparsify/cfg.json").read_text())
    assert (cfg["activation"], cfg["k"], cfg["num_latents"], cfg["d_in"]) == (activation, 8, 64, 16)
    assert (cfg["multi_topk"], cfg["normalize_decoder"]) == (True, False), "rows of other lengths than 1"
    assert featurizers.load(tmp_path / "back/sparsify").config == f.config
    artefact = featurizers.load(f.save_pretrained(tmp_path / "artefact"))
    assert torch.equal(artefact.encode(golden(activation)["x"]), f.encode(golden(activation)["x"]))


def test_what_is_lost_is_said(tmp_path):
    f = dictionary("topk", special_tokens=[3], n_heads=2).in_units("decoder-norm")
    f.site, f.metadata = featurizers.Site("attn.z", 2), {"found": "here"}
    lost = featurizers.convert(f, tmp_path / "it", "sparsify")
    for words in ("undoes sparsify's pre-bias", "raw units", "heads", "special tokens [3]", "'attn.z:2'", "'found'"):
        assert sum(words in sentence for sentence in lost) == 1, (words, lost)
    x = torch.randn(5, 8)
    again = featurizers.load(tmp_path / "it")
    torch.testing.assert_close(again.encode(x), f.in_units("raw").encode(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(again.featurize(x)[1], f.featurize(x)[1], rtol=1e-4, atol=1e-4)
    for other, words in (
        (dictionary("relu"), "the rules topk and groupmax, not 'relu'"),
        (dictionary("abstopk"), "the rules topk and groupmax, not 'abstopk'"),
        (dictionary("topk", normalize="layer-norm"), "normalises no activations"),
        (featurizers.create("identity", d_in=3), "not the kind 'identity'"),
    ):
        with pytest.raises(ConversionError, match=words):
            featurizers.convert(other, tmp_path / "no", "sparsify")
        assert not (tmp_path / "no").exists()


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no skip matrix": ({"skip_connection": True}, "its config implies"),
    "a skip matrix": ({"W_skip": torch.eye(16)}, "its config implies"),
    "signed groups": ({"signed": True, "activation": "groupmax"}, "signed belongs to the activation 'topk'"),
    "unequal groups": ({"k": 7, "activation": "groupmax"}, "64 features do not make 7 equal groups"),
    "another activation": ({"activation": "relu"}, "'relu' is not known; known are topk, groupmax"),
    "an unknown key": ({"temperature": 2}, "'temperature'"),
    "a string for a number": ({"k": "8"}, "'k'.*got '8'"),
    "k of none": ({"k": 0}, "'k'"),
    "k of too many": ({"k": 65}, "k must be between 1 and the 64 features, got 65"),
    "another number of features": ({"num_latents": 65}, r"implies \{'encoder.weight': \(65, 16\)"),
    "another width": ({"d_in": 17}, r"\(68, 17\)"),
    "no decoder": ({"drop": "W_dec"}, "an encoder alone"),
    "no bias": ({"drop": "b_dec"}, "its config implies"),
    "not a number": ({"b_dec": torch.full((16,), float("nan"))}, "'b_dec' holds NaN"),
}


@pytest.mark.parametrize(("changes", "words"), WRONG.values(), ids=WRONG)
def test_what_is_not_known_is_named(changes, words, tmp_path):
    activation = changes.get("activation", "topk")
    folder = write(tmp_path / "it", "topk", **{k: v for k, v in changes.items() if k != "activation"})
    if activation != "topk":
        cfg = json.loads((folder / "cfg.json").read_text())
        (folder / "cfg.json").write_text(json.dumps({**cfg, "activation": activation}))
    with pytest.raises((ManifestError, WeightsError), match=words) as caught:
        featurizers.load(folder)
    assert str(folder) in str(caught.value)


def test_a_part_is_refused(tmp_path):
    with pytest.raises(UsageError, match="compares all features"):
        featurizers.load(write(tmp_path / "it"), indices=[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_dtype_is_the_files_or_the_one_asked_for(dtype, tmp_path):
    tensors = {n: golden("topk")[n].to(dtype) for n in WEIGHTS}
    folder = write(tmp_path / "it", **tensors)
    assert featurizers.load(folder).W_enc.dtype == dtype
    f = featurizers.load(folder, dtype=torch.float32)
    assert torch.equal(f.W_dec, tensors["W_dec"].float())


HALF = {
    "bfloat16": dict.fromkeys(WEIGHTS, torch.bfloat16),
    "float16": dict.fromkeys(WEIGHTS, torch.float16),
    "encoder in bfloat16": {"encoder.weight": torch.bfloat16, "encoder.bias": torch.bfloat16},
    "decoder in bfloat16": {"W_dec": torch.bfloat16},
}
"""Dtypes of the tensors in the files of ``half-precision.safetensors``, if not float32."""


@pytest.mark.parametrize("kind", HALF)
def test_a_file_is_computed_in_the_dtype_in_which_sparsify_computes(kind, tmp_path):
    t, expected = golden("topk"), load_file(GOLDEN.with_name("half-precision.safetensors"))
    f = featurizers.load(write(tmp_path / "it", **{name: t[name].to(dtype) for name, dtype in HALF[kind].items()}))
    features, x_hat = (expected[f"{kind}/{name}"] for name in ("features", "x_hat"))
    found = f.encode(t["x"])
    assert found.dtype == features.dtype
    tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[features.dtype]
    torch.testing.assert_close(found, features, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(f.decode(features), x_hat, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("rule", ["topk", "groupmax"])
@pytest.mark.parametrize("pre_bias", [True, False])
def test_sparsify_reads_what_is_written(rule, pre_bias, tmp_path):
    sparsify = pytest.importorskip("sparsify")
    f = dictionary(rule, pre_bias=pre_bias)
    featurizers.convert(f, tmp_path / "it", "sparsify")
    coder = sparsify.SparseCoder.load_from_disk(tmp_path / "it")
    x = torch.randn(5, 8)
    values, indices, _ = coder.encode(x)
    features, error = f.featurize(x)
    torch.testing.assert_close(torch.zeros(5, 64).scatter(-1, indices, values), features, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(coder(x).sae_out, x - error, rtol=1e-5, atol=1e-5)
