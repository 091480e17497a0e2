"""Transcoders: those of SAELens compared with SAELens, those of Gemma Scope with the norms of a Gemma model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import featurizers
import pytest
import torch
from featurizers.errors import ConversionError, FeatureIndexError, ManifestError, UsageError, WeightsError
from featurizers_sae_lens import wrap
from featurizers_transcoder import CrossLayerTranscoder, Transcoder
from featurizers_transcoder.hooks import hook_of_read, read_of
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.support.sae_lens import D_OUT, D, F, batch, gemma, make, same, weights

np = pytest.importorskip("numpy")

ARCHITECTURES = ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")
NORMALIZATIONS = ("none", "expected_average_only_in", "constant_norm_rescale", "layer_norm")


def output(f: Any, x: Tensor) -> Tensor:
    """Return what a transcoder says about its write."""
    return f.decode("out", {"features": f.encode("features", {"in": x})}, {"in": x})


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_forward_is_that_of_saelens_and_folders_go_both_ways(sae_lens, architecture, normalize, tmp_path):
    sae = make(architecture, normalize_activations=normalize)
    sae.cfg.metadata.hook_name = "blocks.3.mlp.hook_in"
    sae.cfg.metadata.hook_name_out = "blocks.3.hook_mlp_out"
    sae.cfg.metadata.model_name = "gpt2-small"
    x = batch(5, 3)
    expected = sae(x)
    assert torch.allclose(expected, sae.decode(sae.encode(x))) != ("skip" in architecture)
    sae.save_model(tmp_path / "it")
    for f in (wrap(sae), featurizers.load(tmp_path / "it")):
        assert isinstance(f, Transcoder)
        same(f.encode("features", {"in": x}), sae.encode(x))
        same(output(f, x), expected, 1e-5)
        assert f.sites_text == "mlp.in:3 -> mlp.out:3"
        assert {site.model for site in f.sites.values()} == {"openai-community/gpt2"}
    assert featurizers.convert(f, tmp_path / "back", "sae-lens") == []
    again = sae_lens.SAE.load_from_disk(str(tmp_path / "back"))
    same(again(x), expected, 1e-5)
    assert again.cfg.metadata.hook_name_out == "blocks.3.hook_mlp_out"
    artefact = featurizers.load(f.save_pretrained(tmp_path / "artefact"))
    assert torch.equal(output(artefact, x), output(f, x))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_slice_is_those_rows(sae_lens, architecture, tmp_path):
    make(architecture).save_model(tmp_path)
    whole, x = featurizers.load(tmp_path), {"in": batch(4)}
    for indices in ([40, 3], {"features": [40, 3]}):
        part = featurizers.load(tmp_path, indices=indices)
        assert part.numbers("features").tolist() == [40, 3]
        same(part.encode("features", x), whole.encode("features", x)[..., [40, 3]])
        assert torch.equal(part.W_dec["features"]["out"], whole.W_dec["features"]["out"][[40, 3]])
    with pytest.raises(FeatureIndexError, match="feature index 64 is out of range: there are 64"):
        featurizers.load(tmp_path, indices=[64])
    with pytest.raises(UsageError, match="has the group 'features'"):
        featurizers.load(tmp_path, indices={"layer-3": [1]})


def test_weights_keep_their_dtype(sae_lens):
    for architecture in ARCHITECTURES:
        f = wrap(make(architecture).to(torch.bfloat16))
        assert {tensor.dtype for tensor in f.state_dict().values()} == {torch.bfloat16}


def edited(folder: Path, **keys: Any) -> Path:
    """Change keys of ``cfg.json`` and return the folder."""
    cfg = json.loads((folder / "cfg.json").read_text())
    metadata = {**cfg.get("metadata", {}), **keys.pop("metadata", {})}
    (folder / "cfg.json").write_text(json.dumps({**cfg, **keys, "metadata": metadata}))
    return folder


GEMMA_NORM = "module:{0}.layers.3.post_feedforward_layernorm:output"


@pytest.mark.parametrize(
    ("model", "hook_in", "hook_out", "reads", "writes", "normalize"),
    [
        ("gpt2", "hook_resid_mid", "hook_mlp_out", "resid.mid:3", "mlp.out:3", "none"),
        ("gpt2", "hook_mlp_in", "hook_mlp_out", "resid.mid:3", "mlp.out:3", "none"),
        ("gpt2", "ln2.hook_normalized", "hook_mlp_out", "resid.mid:3", "mlp.out:3", "standard"),
        ("Qwen/Qwen3-4B", "mlp.hook_in", "hook_mlp_out", "mlp.in:3", "mlp.out:3", "none"),
        ("Qwen/Qwen3-4B", "mlp.hook_in", "mlp.hook_out", "mlp.in:3", "mlp.out:3", "none"),
        ("gemma-2-2b", "ln2.hook_normalized", "hook_mlp_out", "resid.mid:3", GEMMA_NORM.format("model"), "rms"),
        (
            "google/gemma-3-4b-pt",
            "mlp.hook_in",
            "hook_mlp_out",
            "mlp.in:3",
            GEMMA_NORM.format("model.language_model"),
            "none",
        ),
        ("gpt2", "attn.hook_z", "hook_attn_out", "attn.z:3", "attn.out:3", "none"),
        ("gpt2", "ln1.hook_normalized", "hook_attn_out", "resid.pre:3", "attn.out:3", "standard"),
        ("Qwen/Qwen3-4B", "ln2.hook_normalized", "hook_mlp_out", "resid.mid:3", "mlp.out:3", "rms"),
        ("meta-llama/Llama-3.2-1B", "ln1.hook_normalized", "hook_attn_out", "resid.pre:3", "attn.out:3", "rms"),
        ("someone/model", "ln2.hook_normalized", "hook_mlp_out", None, None, "none"),
        ("gpt2", "hook_resid_post", "hook_mystery", None, None, "none"),
        ("gpt2", "ln2.hook_normalized", "hook_mystery", None, None, "none"),
    ],
)
def test_hooks_are_sites(sae_lens, model, hook_in, hook_out, reads, writes, normalize, tmp_path):
    sae = make("jumprelu_transcoder")
    sae.cfg.metadata.hook_name, sae.cfg.metadata.hook_name_out = f"blocks.3.{hook_in}", f"blocks.3.{hook_out}"
    sae.cfg.metadata.model_name = model
    sae.save_model(tmp_path / "it")
    f = featurizers.load(tmp_path / "it")
    assert f.sites_text == (reads and f"{reads} -> {writes}")
    assert f.config.reads["in"].normalize == normalize
    assert any("no sites" in note for note in f.metadata.get("notes", [])) == (reads is None)
    lost = featurizers.convert(f, tmp_path / "back", "sae-lens")
    assert lost == (["The name 'blocks.3.hook_mlp_in' is not kept."] if hook_in == "hook_mlp_in" else [])
    back = featurizers.load(tmp_path / "back")
    assert back.sites_text == f.sites_text
    assert back.config == f.config
    assert torch.equal(output(back, batch(2)), output(f, batch(2)))


def test_the_norm_of_a_hook_is_that_of_the_model(sae_lens):
    """``ln2.hook_normalized`` of GPT-2 is LayerNorm without gain and bias, as torch computes it."""
    sae = make("transcoder")
    sae.cfg.metadata.hook_name, sae.cfg.metadata.hook_name_out = "blocks.3.ln2.hook_normalized", "blocks.3.hook_mlp_out"
    sae.cfg.metadata.model_name = "gpt2-medium"
    x = batch(6)
    same(output(wrap(sae), x), sae(torch.nn.functional.layer_norm(x, (D,), eps=1e-5)), 1e-5)


def test_a_norm_before_another_or_beside_a_skip_is_not_put_into_the_encoder(sae_lens):
    for architecture, options in (("skip_transcoder", {}), ("transcoder", {"normalize_activations": "layer_norm"})):
        sae = make(architecture, **options)
        sae.cfg.metadata.hook_name = "blocks.3.ln2.hook_normalized"
        sae.cfg.metadata.hook_name_out, sae.cfg.metadata.model_name = "blocks.3.hook_mlp_out", "gpt2"
        f = wrap(sae)
        assert f.sites_text is None
        same(output(f, batch(3)), sae(batch(3)), 1e-5)  # of the hook's own activations


def test_a_file_without_a_version_keeps_the_hook_that_it_writes(sae_lens, tmp_path):
    make("skip_transcoder").save_model(tmp_path)
    cfg = {key: value for key, value in json.loads((tmp_path / "cfg.json").read_text()).items() if key != "metadata"}
    where = {"hook_name": "blocks.1.mlp.hook_in", "hook_name_out": "blocks.1.hook_mlp_out", "model_name": "gpt2"}
    for old, kept in (({**cfg, **where}, "blocks.1.hook_mlp_out"), ({**cfg, "metadata": where}, None)):
        (tmp_path / "cfg.json").write_text(json.dumps(old))
        assert sae_lens.SAE.load_from_disk(str(tmp_path)).cfg.metadata.hook_name_out == kept
        assert featurizers.load(tmp_path).sites_text == "mlp.in:1 -> mlp.out:1"


def test_what_a_transcoder_cannot_be(sae_lens, tmp_path):
    make("skip_transcoder").save_model(tmp_path)
    for change, words in (
        ({"apply_b_dec_to_input": True}, "apply_b_dec_to_input must be false"),
        ({"reshape_activations": "hook_z"}, "reshape_activations is 'hook_z'"),
        ({"normalize_activations": "hydra"}, "normalize_activations is 'hydra'"),
        ({"architecture": "transcoder"}, r"missing or unknown: \['W_skip'\]"),
        ({"architecture": "crosscoder"}, "'crosscoder' is not supported"),
        ({"d_out": 7}, "the tensors have d_out 10, but the configuration says 7"),
        ({"d_in": 7}, "the tensors have d_in 16, but the configuration says 7"),
        ({"heads": 7}, r"unknown keys \['heads'\]"),
    ):
        before = (tmp_path / "cfg.json").read_text()
        with pytest.raises((ManifestError, WeightsError), match=words):
            featurizers.load(edited(tmp_path, **change))
        (tmp_path / "cfg.json").write_text(before)
    tensors = load_file(tmp_path / "sae_weights.safetensors")
    save_file({**tensors, "W_skip": torch.ones(D, D_OUT)}, tmp_path / "sae_weights.safetensors")
    with pytest.raises(WeightsError, match="W_skip"):
        featurizers.load(tmp_path)


def test_what_saelens_cannot_hold_is_said(sae_lens, tmp_path):
    g = torch.Generator().manual_seed(0)
    w = [torch.randn(shape, generator=g) for shape in ((F, D), (F, D_OUT), (F,), (D_OUT,))]
    with pytest.raises(ConversionError, match="no transcoder with the rule 'topk'"):
        featurizers.convert(
            Transcoder.from_weights(*w, rule="topk", rule_options={"k": 3}), tmp_path / "a", to="sae-lens"
        )
    with pytest.raises(ConversionError, match=r"only as the hook ln2\.hook_normalized"):
        featurizers.convert(Transcoder.from_weights(*w, normalize="rms"), tmp_path / "a", to="sae-lens")
    layers = CrossLayerTranscoder.from_tensors(
        {
            "reads": {"in-0": {"width": D}},
            "writes": {"out-0": D},
            "groups": {"layer-0": {"reads": ["in-0"], "writes": ["out-0"], "n_features": F}},
        },
        {"W_enc.layer-0.in-0": torch.ones(F, D), "W_dec.layer-0.out-0": torch.ones(F, D)},
    )
    with pytest.raises(ConversionError, match=r"no architecture for the kind 'transcoder\.cross-layer'"):
        featurizers.convert(layers, tmp_path / "a", to="sae-lens")
    centre = torch.randn(D, generator=g)
    f = Transcoder.from_weights(*w, normalize="scale", input_scale=3.0, centre=centre, special_tokens=[7])
    lost = featurizers.convert(f.take([5, 2]), tmp_path / "it", to="sae-lens")
    for words in ("numbers", "factor 3.0", "centre"):
        assert sum(words in sentence for sentence in lost) == 1, (words, lost)
    sae, x = sae_lens.SAE.load_from_disk(str(tmp_path / "it")), batch(3)
    same(sae(x), output(f.take([5, 2]), x), 1e-5)
    assert sae.cfg.metadata.exclude_special_tokens == [7]


def test_a_hook_holds_the_norm_of_known_models_alone():
    read = read_of("blocks.2.ln2.hook_normalized", "gemma-2-2b")
    assert hook_of_read(read) == "blocks.2.ln2.hook_normalized"
    assert hook_of_read(type(read)(read.site, "rms", 1e-5)) is None
    assert hook_of_read(type(read)(read.site, "standard", 1e-6)) is None


# ---------------------------------------------------------------------- Gemma Scope
def scope(folder: Path, version: int, *, affine: bool = False, point: bool = True) -> dict[str, Tensor]:
    """Write random weights as a transcoder of Gemma Scope 1 or 2, and return them."""
    t = {**weights("threshold"), **({"affine": torch.randn(D, D)} if affine else {})}
    folder.mkdir(parents=True)
    if version == 1:
        np.savez(folder / "params.npz", **{name: tensor.numpy() for name, tensor in t.items()})
        return t
    named = {name.replace("W_", "w_").replace("affine", "affine_skip_connection"): value for name, value in t.items()}
    save_file(named, folder / "params.safetensors")
    block = "model.layers.1"
    points = {
        "hf_hook_point_in": f"{block}.pre_feedforward_layernorm.output",
        "hf_hook_point_out": f"{block}.post_feedforward_layernorm.output",
    }
    raw = {
        "architecture": "jump_relu",
        "model_name": "gemma-v3-1b-pt",
        "affine_connection": affine,
        "type": "transcoder",
    }
    (folder / "config.json").write_text(json.dumps({**raw, **(points if point else {})}))
    return t


def jumprelu(x: Tensor, t: dict[str, Tensor]) -> Tensor:
    h = x @ t["W_enc"] + t["b_enc"]
    return h.relu() * (h > t["threshold"])


CASES = {
    "Gemma Scope 1": (1, "gemma-scope-2b-pt-transcoders/layer_1/width_16k/average_l0_5", False, True),
    "Gemma Scope 2": (2, "google/gemma-scope-2-1b-pt/transcoder_all/layer_1_width_16k_l0_big", False, True),
    "Gemma Scope 2, affine": (2, "somewhere", True, True),
    "Gemma Scope 2, no hook points": (2, "transcoder/layer_1_width_16k_l0_big_affine", True, False),
}


@pytest.mark.parametrize(("version", "path", "affine", "point"), CASES.values(), ids=CASES)
def test_gemma_scope_reads_and_writes_where_the_norms_are(version, path, affine, point, tmp_path):
    """Features are those of the model's own norm, and an edit adds to the output of the norm after the MLP."""
    t = scope(tmp_path / path, version, affine=affine, point=point)
    f = featurizers.load(tmp_path / path)
    model = gemma(2 if version == 1 else 3)
    ids = {"input_ids": torch.randint(0, 50, (2, 7), generator=torch.Generator().manual_seed(0))}
    block = model.model.layers[1]
    seen: dict[str, Tensor] = {}
    before, after = block.pre_feedforward_layernorm, block.post_feedforward_layernorm

    def read(module: Any, args: Any, out: Tensor) -> None:
        # Gemma Scope 1 has the norm without its gain, as `Gemma2RMSNorm._norm` computes it
        seen["in"] = module._norm(args[0].float()) if version == 1 else out
        seen["raw"] = args[0]

    def write(_module: Any, _args: Any, out: Tensor) -> Tensor:
        seen["out"] = out
        change = torch.zeros_like(out)
        change[:, -1] = (5.0 - jumprelu(seen["in"], t)[:, -1, 9:10]) * t["W_dec"][9]
        return out + change

    with torch.no_grad():
        base = model(**ids).logits
        handles = [before.register_forward_hook(read), after.register_forward_hook(write)]
        expected = model(**ids).logits
        [handle.remove() for handle in handles]
        collected = featurizers.Collect(f)
        with featurizers.intervene(model, collected) as results:
            model(**ids)
        same(results[collected], jumprelu(seen["in"], t), 1e-5)
        with featurizers.intervene(model, featurizers.Ablate(f, positions=[-1], indices=[9], value=5.0)):
            same(model(**ids).logits, expected, 1e-5)
        assert not torch.allclose(base, expected, atol=1e-3)
    x = seen["raw"] if version == 1 else seen["in"]
    y = jumprelu(seen["in"], t) @ t["W_dec"] + t["b_dec"]
    same(output(f, x), y + x @ t["affine"] if affine else y, 1e-5)
    assert f.reads["in"] == featurizers.Site("resid.mid:1" if version == 1 else "mlp.in:1")
    assert str(f.writes["out"]) == "module:model.layers.1.post_feedforward_layernorm:output"
    assert f.reads["in"].model == ("google/gemma-2-2b" if version == 1 else "google/gemma-3-1b-pt")
    part = featurizers.load(tmp_path / path, indices=[40, 9])
    same(part.encode("features", {"in": x}), f.encode("features", {"in": x})[..., [40, 9]])


def test_gemma_scope_2_that_is_no_transcoder_or_lacks_its_skip(tmp_path):
    scope(tmp_path / "a", 2)
    for change, words in (
        ({"affine_connection": True}, "lacks 'affine_skip_connection'"),
        ({"type": "crosscoder"}, "'crosscoder' is not supported"),
        ({"type": "clt"}, "'clt' is not supported"),
    ):
        path = tmp_path / "a/config.json"
        before = path.read_text()
        path.write_text(json.dumps({**json.loads(before), **change}))
        with pytest.raises((ManifestError, WeightsError), match=words):
            featurizers.load(tmp_path / "a")
        path.write_text(before)
