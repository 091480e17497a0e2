"""Plugin llamascopium compared with folders and golden tensors of llamascopium's own models."""

from __future__ import annotations

import functools
import json
import pickle
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import featurizers
import pytest
import torch
from featurizers import DictionaryFeaturizer
from featurizers.errors import FeatureIndexError, ManifestError, UsageError, WeightsError
from featurizers.testing import SiteMapContract
from featurizers_llamascopium import GluConfig, GluMap
from featurizers_transcoder import Crosscoder, CrossLayerTranscoder, ReadConfig, Transcoder
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.support.decoders import decoder
from tests.support.sae_lens import same

FIXTURES = Path(__file__).parents[2] / "fixtures/llamascopium"
D, N, LAYERS = 6, 18, 3
SAES = ("sae-relu", "sae-jumprelu", "sae-topk", "sae-token-wise")
PLTS = ("plt-relu", "plt-jumprelu", "plt-jumprelu-plain", "plt-topk", "plt-topk-plain")
GLUS = ("glu-jumprelu", "glu-topk-of-one-site")
CLTS = ("clt-relu", "clt-jumprelu", "clt-jumprelu-plain", "clt-topk")
CROSSCODERS = ("crosscoder-relu", "crosscoder-jumprelu", "crosscoder-topk")


def golden(name: str) -> dict[str, Tensor]:
    tensors = load_file(FIXTURES / "golden.safetensors")
    return {key.removeprefix(f"{name}/"): t for key, t in tensors.items() if key.startswith(f"{name}/")}


def streams(t: dict[str, Tensor], start: str) -> list[Tensor]:
    """Return the golden tensors of all hooks, in the order of the layers."""
    return [t[key] for key in sorted(t) if key.startswith(f"{start}.")]


def copied(name: str, folder: Path, *, without: str | None = None, **config: Any) -> Path:
    """Copy a folder with other values in its config, and without a tensor."""
    shutil.copytree(FIXTURES / name, folder)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, **config}))
    if without is not None:
        retensored(folder, **{without: None})
    return folder


def retensored(folder: Path, **changes: Tensor | None) -> None:
    tensors: dict[str, Tensor | None] = {**load_file(folder / "sae_weights.safetensors"), **changes}
    save_file({name: t for name, t in tensors.items() if t is not None}, folder / "sae_weights.safetensors")


@pytest.mark.parametrize("name", SAES)
def test_autoencoders_are_dictionaries(name):
    f, t = featurizers.load(FIXTURES / name), golden(name)
    assert isinstance(f, DictionaryFeaturizer)
    (x,), (y,) = streams(t, "x"), streams(t, "y")
    features, error = f.featurize(x)
    same(features, t["features"])
    same(x - (error[0] if isinstance(error, tuple) else error), y, 1e-5)
    assert 0 < int((features != 0).sum()) < features.numel()
    assert (f.id, str(f.site), f.site.model) == (name, "resid.post:1", "meta-llama/Llama-3.2-1B")


@pytest.mark.parametrize("name", PLTS)
def test_transcoders(name):
    f, t = featurizers.load(FIXTURES / name), golden(name)
    assert isinstance(f, Transcoder)
    (x,), (y,) = streams(t, "x"), streams(t, "y")
    features, error = f.featurize({"in": x}, {"out": y})
    same(features["features"], t["features"])
    torch.testing.assert_close(error["out"], torch.zeros_like(y), rtol=0, atol=float(1e-5 * y.abs().max()))
    assert f.sites_text == "resid.mid:1 -> mlp.out:1"


@pytest.mark.parametrize("name", GLUS)
def test_gated_encoders(name, tmp_path):
    f, t = featurizers.load(FIXTURES / name), golden(name)
    assert isinstance(f, GluMap)
    (x,), (y,) = streams(t, "x"), streams(t, "y")
    features, error = f.featurize({"in": x}, {"out": y})
    same(features["features"], t["features"])
    torch.testing.assert_close(error["out"], torch.zeros_like(y), rtol=0, atol=float(1e-5 * y.abs().max()))
    same(f.encode("features", {"in": x}, torch.tensor([9, 2])), t["features"][:, [9, 2]])
    assert f.sites_text == ("resid.mid:1 -> mlp.out:1" if name == GLUS[0] else "resid.post:1 -> resid.post:1")
    again = featurizers.load(f.save_pretrained(tmp_path / "it"))
    assert torch.equal(again.encode("features", {"in": x}), features["features"])
    assert torch.equal(pickle.loads(pickle.dumps(f)).encode("features", {"in": x}), features["features"])
    with pytest.raises(UsageError, match=r"loaded whole|topk compares all features"):
        featurizers.load(FIXTURES / name, indices=[1])
    with pytest.raises(ManifestError, match="without a gated encoder alone"):
        featurizers.load(copied(name, tmp_path / "token-wise", norm_activation="token-wise"))


class TestGlu(SiteMapContract):
    @pytest.fixture
    def site_map(self):
        read = ReadConfig(width=8, normalize="rms", centre=True)
        f = GluMap(GluConfig(read=read, d_out=8, n_features=16, rule="jumprelu"))
        generator = torch.Generator().manual_seed(0)
        for parameter in f.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)
        return f.eval()


@pytest.mark.parametrize("name", CLTS)
def test_cross_layer_transcoders(name):
    f, t = featurizers.load(FIXTURES / name), golden(name)
    assert isinstance(f, CrossLayerTranscoder)
    x, y = streams(t, "x"), streams(t, "y")
    by_read = {f"in-{i}": one for i, one in enumerate(x)}
    features, error = f.featurize(by_read, {f"out-{i}": one for i, one in enumerate(y)})
    for layer in range(LAYERS):
        same(features[f"layer-{layer}"], t["features"][:, layer])
        scale = float(y[layer].abs().max())
        torch.testing.assert_close(error[f"out-{layer}"], torch.zeros_like(y[layer]), rtol=0, atol=1e-5 * scale)
    assert f.sites_text == "resid.mid:0 … resid.mid:2 -> mlp.out:0 … mlp.out:2"
    assert len(f.decoders) == 6


@pytest.mark.parametrize("name", CROSSCODERS)
def test_crosscoders_have_features_of_each_head(name):
    f, t = featurizers.load(FIXTURES / name), golden(name)
    assert isinstance(f, Crosscoder)
    x, y = streams(t, "x"), streams(t, "y")
    names = [f"head-{head}" for head in range(LAYERS)]
    features, error = f.featurize(dict(zip(names, x, strict=True)), dict(zip(names, y, strict=True)))
    for head, own in enumerate(names):
        same(features["features" if name.endswith("-relu") else own], t["features"][:, head])
        scale = float(y[head].abs().max())
        torch.testing.assert_close(error[own], torch.zeros_like(y[head]), rtol=0, atol=1e-5 * scale)
    fires = t["features"] != 0
    assert bool((fires != fires[:, :1]).any()) == (not name.endswith("-relu"))  # not in all heads at once
    assert f.reads == f.writes
    assert f.sites_text == "resid.post:0 … resid.post:2 -> resid.post:0 … resid.post:2"


@pytest.mark.parametrize("name", ["sae-jumprelu", "plt-jumprelu"])
def test_a_slice_of_one_group(name, tmp_path):
    part, t = featurizers.load(FIXTURES / name, indices=[17, 3]), golden(name)
    (x,) = streams(t, "x")
    found = part.encode(x) if isinstance(part, DictionaryFeaturizer) else part.encode("features", {"in": x})
    same(found, t["features"][..., [17, 3]])
    with pytest.raises(FeatureIndexError):
        featurizers.load(FIXTURES / name, indices=[N])
    with pytest.raises(UsageError, match="topk compares all features"):
        featurizers.load(FIXTURES / "plt-topk", indices=[1])


def test_a_slice_of_several_groups():
    whole, t = featurizers.load(FIXTURES / "clt-jumprelu"), golden("clt-jumprelu")
    part = featurizers.load(FIXTURES / "clt-jumprelu", indices={"layer-1": [17, 3]})
    assert (list(part.reads), list(part.writes)) == (["in-1"], ["out-1", "out-2"])
    same(part.encode("layer-1", {"in-1": streams(t, "x")[1]}), t["features"][:, 1, [17, 3]])
    for write in part.writes:
        assert torch.equal(part.b_dec[write], whole.b_dec[write])
        assert torch.equal(part.W_dec["layer-1"][write], whole.W_dec["layer-1"][write][[17, 3]])
    t = golden("crosscoder-jumprelu")
    part = featurizers.load(FIXTURES / "crosscoder-jumprelu", indices={"head-2": [5], "head-0": [5, 1]})
    x = {f"head-{i}": one for i, one in enumerate(streams(t, "x"))}
    same(part.encode("head-0", x), t["features"][:, 0, [5, 1]])
    same(part.encode("head-2", x), t["features"][:, 2, [5]])
    t = golden("clt-topk")
    part = featurizers.load(FIXTURES / "clt-topk", indices={"layer-1": None})  # the rule compares features of a layer
    same(part.encode("layer-1", {"in-1": streams(t, "x")[1]}), t["features"][:, 1])
    for indices in ([1], {"layer-0": [1]}):
        with pytest.raises(UsageError, match=r"by group|has the groups"):
            featurizers.load(FIXTURES / "crosscoder-jumprelu", indices=indices)


def test_heads_share_the_encoder_in_memory():
    f = featurizers.load(FIXTURES / "crosscoder-topk")
    first, second = (f.W_enc[f"head-{head}"]["head-1"] for head in range(2))
    assert first.data_ptr() == second.data_ptr()


@pytest.mark.parametrize("name", ["sae-topk", "plt-topk", "clt-topk", "crosscoder-topk", "crosscoder-jumprelu"])
def test_artefacts_keep_the_features(name, tmp_path):
    f, t = featurizers.load(FIXTURES / name), golden(name)
    again = featurizers.load(f.save_pretrained(tmp_path / "it"))
    if isinstance(f, DictionaryFeaturizer):
        assert torch.equal(again.encode(streams(t, "x")[0]), f.encode(streams(t, "x")[0]))
        return
    x = dict(zip(f.read_widths, streams(t, "x"), strict=True))
    for group in f.groups:
        assert torch.equal(again.encode(group, x), f.encode(group, x))


def test_the_norms_of_decoders_choose_and_do_not_scale():
    """Gradients of the rule of top k are those of the pre-activations that it keeps."""
    f = featurizers.load(FIXTURES / "plt-topk")
    (x,) = streams(golden("plt-topk"), "x")
    x.requires_grad_()
    features = f.encode("features", {"in": x})
    (gradient,) = torch.autograd.grad(features.sum(), x)
    u = x * (x.pow(2).mean(dim=-1, keepdim=True) + 1e-5).rsqrt()
    pre = u @ f.W_enc["features"]["in"].T + f.b_enc["features"]
    (expected,) = torch.autograd.grad((pre * (features > 0)).sum(), x)
    same(gradient, expected, 1e-5)


HOOKS = {
    ("blocks.3.hook_resid_mid", "blocks.3.hook_mlp_out", "meta-llama/Llama-3.1-8B"): "resid.mid:3 -> mlp.out:3",
    ("blocks.3.hook_resid_mid", "blocks.3.hook_mlp_out", None): None,
    ("blocks.3.hook_resid_mid", "blocks.3.hook_mlp_out", "google/gemma-2-2b"): (
        "resid.mid:3 -> module:model.layers.3.post_feedforward_layernorm:output"
    ),
    ("blocks.3.ln2.hook_normalized", "blocks.3.hook_mlp_out", "Qwen/Qwen3-1.7B"): "resid.mid:3 -> mlp.out:3",
    ("blocks.3.ln2.hook_normalized", "blocks.3.hook_mlp_out", "owner/unknown"): None,
    ("blocks.3.ln2.hook_normalized", "blocks.3.hook_mystery", "Qwen/Qwen3-1.7B"): None,
    ("blocks.3.hook_resid_pre", "blocks.3.hook_resid_post", None): "resid.pre:3 -> resid.post:3",
}


@pytest.mark.parametrize("hooks", HOOKS, ids=str)
def test_hooks_are_sites(hooks, tmp_path):
    hook_in, hook_out, model = hooks
    folder = copied("plt-topk-plain", tmp_path / "it", hook_point_in=hook_in, hook_point_out=hook_out)
    (folder / "lm_config.json").write_text(json.dumps({"model_name": model}))
    f = featurizers.load(folder)
    assert f.sites_text == HOOKS[hooks]
    notes = f.metadata.get("notes", [])
    assert any("no sites" in note for note in notes) == (HOOKS[hooks] is None)
    assert any("centres" in note for note in notes) == (model in (None, "owner/unknown"))
    normed = HOOKS[hooks] is not None and "normalized" in hook_in
    assert f.config.reads["in"].normalize == ("rms" if normed else "none")  # else it takes what the hook has


@pytest.mark.parametrize(
    ("hook", "model", "site", "words"),
    [
        ("blocks.1.hook_mlp_out", "Qwen/Qwen3-1.7B", "mlp.out:1", []),
        ("blocks.1.hook_mlp_out", None, None, ["is not known; set f.site", "centres"]),
        ("blocks.1.attn.hook_z", "Qwen/Qwen2.5-7B", "attn.z:1", ["biases of attention's values"]),
        ("blocks.1.hook_resid_pre", "openai-community/gpt2", "resid.pre:1", ["centres"]),
    ],
)
def test_the_site_of_an_autoencoder_and_what_differs_there(hook, model, site, words, tmp_path):
    folder = copied("sae-relu", tmp_path / "it", hook_point_in=hook, hook_point_out=hook, norm_activation="inference")
    (folder / "lm_config.json").write_text(json.dumps({"model_name": model}))
    f = featurizers.load(folder)
    assert (f.site and str(f.site)) == site
    notes = f.metadata.get("notes", [])
    assert len(notes) == len(words)
    assert all(word in note for word, note in zip(words, notes, strict=True))


REFUSED = {
    "another type": ({"sae_type": "molt"}, r"sae_type is 'molt'; known are sae, clt, crosscoder, lorsa"),
    "an unknown key": ({"apply_decoder_bias_to_pre_encoder": True}, "known are the keys of llamascopium 2"),
    "batchtopk": ({"act_fn": "batchtopk"}, "depend on the others of its batch"),
    "layertopk": ({"act_fn": "layertopk"}, "early ones depend on what comes later"),
    "batch-wise": ({"norm_activation": "batch-wise"}, "batch-wise normalisation"),
    "token-wise": ({"norm_activation": "token-wise"}, "token-wise normalisation"),
    "too many": ({"top_k": 19}, "top_k is 19, and there are 18 features"),
    "a width": ({"d_model": "6"}, "d_model"),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_read_exactly_is_refused(change, message, tmp_path):
    with pytest.raises(ManifestError, match=message):
        featurizers.load(copied("plt-topk", tmp_path / "it", **change))


def test_maps_of_several_layers_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(ManifestError, match="as many hook_points_out"):
        featurizers.load(copied("clt-relu", tmp_path / "clt", hook_points_out=["blocks.0.hook_mlp_out"]))
    with pytest.raises(ManifestError, match="alone"):
        featurizers.load(copied("crosscoder-relu", tmp_path / "cc", sparsity_include_decoder_norm=False))


def test_files_that_do_not_fit_are_refused(tmp_path):
    def refused(message: str, name: str = "plt-jumprelu", **changes: Tensor | None) -> None:
        folder = copied(name, tmp_path / str(len(list(tmp_path.iterdir()))))
        retensored(folder, **changes)
        with pytest.raises(WeightsError, match=message):
            featurizers.load(folder)

    norm = "dataset_average_activation_norm.blocks.1.ln2.hook_normalized"
    refused("is missing; it must be a positive number", **{norm: None})
    refused("is 0.0; it must be a positive number", **{norm: torch.zeros(())})
    refused("is nan; it must be a positive number", **{norm: torch.tensor(torch.nan)})
    refused(r"missing or unknown tensors \['b_E'\]", b_E=None)
    refused(r"missing or unknown tensors \['W_skip'\]", W_skip=torch.zeros(D, D))
    refused(r"W_E is float32 of shape \(18, 6\), it must be floats of shape \(6, 18\)", W_E=torch.zeros(N, D))
    refused("W_E is int64", W_E=torch.zeros(D, N, dtype=torch.int64))
    refused("18 features have a decoder of zeros", W_D=torch.zeros(N, D))
    refused("NaN", b_D=torch.full((D,), torch.nan))
    refused(r"W_D\.1 is float32", "clt-relu", **{"W_D.1": torch.zeros(3, N, D)})
    folder = copied("plt-relu", tmp_path / "pt")
    (folder / "sae_weights.safetensors").rename(folder / "sae_weights.pt")
    with pytest.raises(ManifestError, match="save it again with save_pretrained"):
        featurizers.load(folder)


def test_an_edit_of_a_head_writes_its_own_layer():
    """Features are those of a run before, and a pinned edit equals hooks that replace what the blocks return."""
    f = featurizers.load(FIXTURES / "crosscoder-jumprelu")
    model = decoder("llama", hidden_size=D, num_attention_heads=3, num_key_value_heads=3)
    blocks, ids = model.model.layers, torch.arange(8)[None]
    seen: list[Tensor] = []

    def run(hook: Any) -> Tensor:
        with ExitStack() as hooks:
            for place, block in enumerate(blocks):
                hooks.callback(block.register_forward_hook(functools.partial(hook, place)).remove)
            return model(ids).logits

    def read(_place: int, _module: Any, _args: Any, out: Tensor) -> None:
        seen.append(out)

    def write(place: int, _module: Any, _args: Any, _out: Tensor) -> Tensor:
        return seen[place] + (change if place == 2 else 0)

    with torch.no_grad():
        base = run(read)
        z = f.encode("head-2", {f"head-{i}": x for i, x in enumerate(seen)})
        change = (2.0 - z[..., 5:6]) * f.W_dec["head-2"]["head-2"][5]
        expected = run(write)
        edit = {"indices": {"head-2": [5]}, "value": 2.0, "writes": "pinned"}
        with featurizers.intervene(model, featurizers.Ablate(f, later="frozen", **edit)):
            same(model(ids).logits, expected, 1e-5)
        with (
            pytest.raises(UsageError, match="later='frozen'"),
            featurizers.intervene(model, featurizers.Ablate(f, **edit)),
        ):
            model(ids)
    assert not torch.allclose(base, expected, atol=1e-3)
