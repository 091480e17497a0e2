"""Crosscoders of plugin dictionary-learning compared with golden tensors of the fork that has the classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import featurizers
import pytest
import torch
from featurizers.errors import ManifestError, UsageError, WeightsError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

GOLDEN = Path(__file__).parents[2] / "fixtures/dictionary-learning/crosscoders.safetensors"
RESULTS = ("x", "features", "x_hat")
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "normalized": {"target_rms": 3.0},
    "batch": {"k": 4},
    "batch-sae": {"k": 4, "code_normalization": "SAE"},
    "batch-none": {"k": 4, "code_normalization": "NONE"},
    "batch-unset": {"k": 4},
    "some-layers": {"encoder_layers": [2, 0]},
}
FORMS = ("hub", "trainer", "compiled")


def golden(kind: str) -> dict[str, Tensor]:
    start = f"{kind}/"
    return {n.removeprefix(start): t for n, t in load_file(GOLDEN).items() if n.startswith(start)}


def write(folder: Path, kind: str, form: str = "hub", **changes: Any) -> Path:
    folder.mkdir()
    state = {n: t for n, t in golden(kind).items() if n not in RESULTS}
    state |= {n: t for n, t in changes.items() if isinstance(t, Tensor)}
    options = {"activation_dim": 6, "dict_size": 20, **KINDS[kind]}
    options |= {n: t for n, t in changes.items() if not isinstance(t, Tensor)}
    if form == "hub":
        save_file(state, folder / "model.safetensors")
        config = {"num_layers": 3, **options}
    else:
        state = {f"_orig_mod.{n}" if form == "compiled" else n: t for n, t in state.items()}
        torch.save(state, folder / "model_final.pt")
        name = "BatchTopKCrossCoder" if kind.startswith("batch") else "CrossCoder"
        config = {"trainer": {"dict_class": name, "layer": 13, "lm_name": "a-b", **options}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_numbers_are_the_forks(kind, form, tmp_path):
    f, t = featurizers.load(write(tmp_path / "it", kind, form)), golden(kind)
    x = {f"layer-{layer}": t["x"][:, layer] for layer in range(3)}
    features, error = f.featurize(x, x)
    torch.testing.assert_close(features["features"], t["features"], rtol=1e-5, atol=1e-5)
    for layer in range(3):
        x_hat = t["x"][:, layer] - error[f"layer-{layer}"]
        torch.testing.assert_close(x_hat, t["x_hat"][:, layer], rtol=1e-5, atol=2e-5)
    live = (t["features"] > 0).float().mean()
    assert 0.05 < live < 0.95
    assert (f.kind, f.id, f.sites_text) == ("transcoder.crosscoder", "it", None)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["normalized", "batch"])
def test_a_slice_has_the_features_of_the_whole(kind, form, tmp_path):
    f, t = featurizers.load(write(tmp_path / "it", kind, form), indices=[17, 3]), golden(kind)
    x = {f"layer-{layer}": t["x"][:, layer] for layer in range(3)}
    torch.testing.assert_close(f.encode("features", x), t["features"][:, [17, 3]], rtol=1e-5, atol=1e-5)
    assert f.numbers("features").tolist() == [17, 3]
    g = featurizers.load(tmp_path / "it").take([17, 3])
    assert all(torch.equal(tensor, g.state_dict()[name]) for name, tensor in f.state_dict().items())


def test_an_edit_adds_the_rows_of_the_file_over_the_scale(tmp_path):
    f, t = featurizers.load(write(tmp_path / "it", "normalized")), golden("normalized")
    torch.manual_seed(0)
    sizes = {"n_layer": 3, "n_embd": 6, "n_head": 2, "vocab_size": 30, "n_positions": 16}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=None, eos_token_id=None)).eval()
    f.reads = f.writes = {f"layer-{layer}": f"resid.post:{layer}" for layer in range(3)}
    ids = torch.randint(0, 30, (1, 7))
    out: list[Tensor] = []
    hook = model.transformer.h[2].register_forward_hook(
        lambda *args: out.append(args[2] if isinstance(args[2], Tensor) else args[2][0])
    )
    edit = featurizers.Ablate(f, indices=[3], value=2.0, positions=[-1], later="frozen", writes="pinned")
    with torch.no_grad():
        stream = model(ids, output_hidden_states=True).hidden_states
        z = f.encode("features", {f"layer-{i}": stream[i + 1] for i in range(2)} | {"layer-2": out[0]})[0, -1, 3]
        hook.remove()
        with featurizers.intervene(model, edit):
            logits = model(ids).logits[0, -1]
        scale = t["activation_global_scale"] + 1e-8
        expected = model.lm_head(model.transformer.ln_f(out[0] + (2 - z) * t["decoder.weight"][2, 3] / scale))[0, -1]
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


WRONG: dict[str, tuple[str, dict[str, Any], type[Exception], str]] = {
    "another width": ("plain", {"activation_dim": 7}, ManifestError, "activation_dim is 7"),
    "another number": ("plain", {"dict_size": 21}, ManifestError, "dict_size is 21"),
    "other layers": ("plain", {"num_layers": 2}, ManifestError, "num_layers is 2"),
    "encoder of some": ("some-layers", {"encoder_layers": None}, ManifestError, "reads 2 of 3 layers"),
    "encoder of others": ("some-layers", {"encoder_layers": [0, 5]}, ManifestError, "reads 2 of 3 layers"),
    "an unknown tensor": ("plain", {"gate": torch.zeros(3)}, WeightsError, "'gate' is not a crosscoder's"),
    "a short bias": ("plain", {"encoder.bias": torch.zeros(3)}, WeightsError, "encoder.bias has shape"),
    "no layers": ("plain", {"decoder.weight": torch.zeros(20, 6)}, WeightsError, "must have 3 axes"),
    "decoupled": ("batch", {"code_normalization_id": torch.tensor(5)}, ManifestError, "DECOUPLED cannot be read"),
    "mixed": ("batch", {"code_normalization_id": torch.tensor(3)}, ManifestError, "MIXED cannot be read"),
    "two ids": ("batch", {"code_normalization": "SAE"}, ManifestError, "but the weights have CROSSCODER"),
    "an unknown id": ("batch", {"code_normalization_id": torch.tensor(9)}, WeightsError, "id is not known"),
    "thresholds": ("batch", {"threshold": torch.zeros(3)}, WeightsError, "must be one number"),
    "no scale": ("normalized", {"activation_global_scale": torch.tensor(0.0)}, WeightsError, "positive number"),
    "not finite": ("plain", {"encoder.bias": torch.full((20,), torch.inf)}, WeightsError, "NaN or infinity"),
}


@pytest.mark.parametrize(("kind", "changes", "error", "words"), WRONG.values(), ids=WRONG)
def test_what_does_not_fit_is_named(kind, changes, error, words, tmp_path):
    with pytest.raises(error, match=words):
        featurizers.load(write(tmp_path / "it", kind, **changes))


def test_a_group_that_it_lacks_is_refused(tmp_path):
    with pytest.raises((ManifestError, UsageError), match="'features' alone"):
        featurizers.load(write(tmp_path / "it", "plain"), indices={"layer-0": [1]})
