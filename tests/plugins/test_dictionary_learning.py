"""The dictionary-learning plugin beside golden tensors of dictionary_learning itself, and its formulas."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import featurizers
import featurizers_dictionary_learning as dl
import pytest
import torch
from featurizers.errors import ConfigError, ConversionError, FeatureIndexError, ManifestError, UsageError, WeightsError
from safetensors.torch import load_file
from torch import Tensor

from tests.support.dictionaries import RULES, dictionary

GOLDEN = Path(__file__).parents[1] / "fixtures/dictionary-learning/golden.safetensors"
LINEAR = ("AutoEncoder", "AutoEncoderNew", "GatedAutoEncoder", "AutoEncoderTopK", "BatchTopKSAE")
NAMES = (*LINEAR, "JumpReluAutoEncoder", "MatryoshkaBatchTopKSAE")
D, F = 16, 64


def golden(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The state dict of a class, and what it computed."""
    found = {n.removeprefix(f"{name}/"): t for n, t in load_file(GOLDEN).items() if n.startswith(f"{name}/")}
    state = {n.removeprefix("state/"): t for n, t in found.items() if n.startswith("state/")}
    return state, {n: t for n, t in found.items() if not n.startswith("state/")}


def saved(folder: Path, name: str, state: Any = None, **trainer: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(golden(name)[0] if state is None else state, folder / "ae.pt")
    common = {"dict_class": name, "activation_dim": D, "dict_size": F, "layer": 12, "lm_name": "google/gemma-2-2b"}
    config = {"trainer": {**common, **trainer}, "buffer": {"ctx_len": 128}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def close(found: Tensor, expected: Tensor, tolerance: float = 2e-6) -> None:
    __tracebackhide__ = True
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))
    assert float(expected.abs().max()) > 0


def random_jump() -> dl.JumpAutoEncoder:
    torch.manual_seed(0)
    autoencoder = dl.JumpAutoEncoder(D, F)
    with torch.no_grad():
        for parameter in autoencoder.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return autoencoder


# ---------------------------------------------------------------------- the classes


@pytest.mark.parametrize("name", NAMES)
def test_the_classes_are_those_of_dictionary_learning(name, tmp_path):
    state, expected = golden(name)
    path = tmp_path / "ae.pt"
    torch.save(state, path)
    autoencoder = getattr(dl, name).from_pretrained(str(path), device="cpu")
    assert {n: t.shape for n, t in autoencoder.state_dict().items()} == {n: t.shape for n, t in state.items()}
    x = expected["x"]
    close(autoencoder.encode(x), expected["features"])
    close(autoencoder(x), expected["x_hat"])
    close(autoencoder.decode(expected["features"]), expected["x_hat"])
    x_hat, f = autoencoder(x, output_features=True)
    close(x_hat, expected["x_hat"])
    if name in ("GatedAutoEncoder", "AutoEncoderNew"):  # of these two forward gives other units than encode
        close(f, expected["features"] * state["decoder.weight"].norm(dim=0))
    else:
        close(f, expected["features"])
    if "batch_features" in expected:
        close(autoencoder.encode(x, use_threshold=False), expected["batch_features"])
        _, active, p = autoencoder.encode(x, return_active=True)
        assert torch.equal(active, (expected["features"] > 0).any(0))
        assert (p > 0).sum() > (expected["features"] > 0).sum()


def test_ghost_mode_gates_and_scales():
    state, expected = golden("AutoEncoder")
    autoencoder = dl.AutoEncoder.from_state(state, "here")
    mask = torch.arange(F) % 3 == 0
    x_hat, x_ghost = autoencoder(expected["x"], ghost_mask=mask)
    close(x_hat, expected["x_hat"])
    close(x_ghost, expected["x_ghost"])
    close(autoencoder(expected["x"], output_features=True, ghost_mask=mask)[2], expected["features"])
    autoencoder.scale_biases(2.0)
    close(autoencoder.encode(expected["x"]), expected["scaled"])
    state, expected = golden("GatedAutoEncoder")
    f, gate = dl.GatedAutoEncoder.from_state(state, "here").encode(expected["x"], return_gate=True)
    close(f, expected["features"])
    close(gate, expected["gate"])


def test_the_jump_is_an_offset():
    autoencoder = random_jump()
    x = torch.randn(6, D)
    p = torch.relu((x - autoencoder.bias) @ autoencoder.encoder.weight.T + autoencoder.encoder.bias)
    f, pre_jump = autoencoder.encode(x, output_pre_jump=True)
    close(pre_jump, p)
    close(f, torch.where(p > 0, p + autoencoder.jump, torch.zeros(())))
    x_hat, f2, pre2 = autoencoder(x, output_pre_jump=True)
    assert torch.equal(f2, f)
    assert torch.equal(pre2, pre_jump)
    close(x_hat, f @ autoencoder.decoder.weight.T + autoencoder.bias)
    assert len(autoencoder(x, output_features=True)) == 2


def test_identity():
    identity = dl.IdentityDict(4)
    x = torch.randn(2, 4)
    assert identity(x) is x
    assert identity(x, output_features=True) == (x, x)
    assert identity.dict_size == 4
    assert identity.as_featurizer().kind == "identity"


def test_units_are_raw_and_the_other_is_offered(tmp_path):
    state, expected = golden("AutoEncoder")
    torch.save(state, tmp_path / "ae.pt")
    raw = dl.AutoEncoder.from_pretrained(tmp_path / "ae.pt")
    normalized = dl.AutoEncoder.from_pretrained(tmp_path / "ae.pt", normalize_decoder=True)
    norms = state["decoder.weight"].norm(dim=0)
    close(normalized.encode(expected["x"]), expected["features"] * norms, 1e-5)
    close(normalized(expected["x"]), expected["x_hat"], 1e-5)
    close(raw.as_featurizer().in_units("folded").encode(expected["x"]), normalized.encode(expected["x"]), 1e-5)


@pytest.mark.parametrize("batch_mode", [False, True])
def test_three_axes_are_tokens_like_any_other(batch_mode):
    """Upstream silences positions of the sequence instead of features, and counts k a sequence."""
    state, expected = golden("MatryoshkaBatchTopKSAE")
    autoencoder = dl.MatryoshkaBatchTopKSAE.from_state(state, "here")
    for groups in (1, 3):
        autoencoder.active_groups = groups
        flat = autoencoder.encode(expected["x"], use_threshold=not batch_mode)
        apart = autoencoder.encode(expected["x"].reshape(2, 3, D), use_threshold=not batch_mode)
        assert torch.equal(apart.reshape(6, F), flat)
        assert (flat[:, : [16, 64][groups > 1]] != 0).any(dim=-1).any()
        assert (flat[:, [16, 64][groups > 1] :] == 0).all()
    first = dl.MatryoshkaBatchTopKSAE.from_state(state, "here")
    first.active_groups = 2
    f = first.as_featurizer()
    assert f.n_features == 32
    close(f.encode(expected["x"]), expected["features"][:, :32])


@pytest.mark.parametrize("name", [*NAMES, "JumpAutoEncoder"])
def test_a_class_and_its_featurizer_are_one_map(name):
    autoencoder = random_jump() if name == "JumpAutoEncoder" else getattr(dl, name).from_state(golden(name)[0], "here")
    x, source = torch.randn(2, 6, D, generator=torch.Generator().manual_seed(0))
    f = autoencoder.as_featurizer()
    features, error = f.featurize(x)
    close(features, autoencoder.encode(x))
    x_hat = autoencoder.decode(autoencoder.encode(x))
    close(x - error, x_hat, 1e-5)
    mixed = autoencoder.encode(x)
    mixed[:, [3, 40]] = autoencoder.encode(source)[:, [3, 40]]
    close(f.interchange(x, source, [3, 40]), autoencoder.decode(mixed) + x - x_hat, 1e-5)
    grads = []
    for encode in (autoencoder.encode, f.encode):
        leaf = x.clone().requires_grad_()
        (encode(leaf) * torch.linspace(-1, 1, F)).sum().backward()
        grads.append(leaf.grad)
    close(grads[1], grads[0], 1e-5)


def test_an_alias_serves_code_written_for_the_package(monkeypatch):
    package = types.ModuleType("dictionary_learning")
    monkeypatch.setitem(sys.modules, "dictionary_learning", package)
    monkeypatch.setitem(sys.modules, "dictionary_learning.dictionary", dl)
    from dictionary_learning.dictionary import AutoEncoder

    assert AutoEncoder is dl.AutoEncoder


# ---------------------------------------------------------------------- files


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_is_read(name, tmp_path):
    _, expected = golden(name)
    f = featurizers.load(saved(tmp_path / "it", name))
    features, error = f.featurize(expected["x"])
    close(features, expected["features"])
    close(expected["x"] - error, expected["x_hat"], 1e-5)
    assert f.site == featurizers.Site("resid.post", 12)
    assert f.site.model == "google/gemma-2-2b"
    assert f.config.units == "raw"
    again = featurizers.load(f.save_pretrained(tmp_path / "ours"))
    assert torch.equal(again.encode(expected["x"]), f.encode(expected["x"]))
    if name != "AutoEncoderTopK":
        part = featurizers.load(tmp_path / "it", indices=[40, 3])
        close(part.collect(expected["x"]), expected["features"][:, [40, 3]])
        with pytest.raises(FeatureIndexError):
            featurizers.load(tmp_path / "it", indices=[64])


def test_the_seeds_own_classes_are_read(tmp_path):
    jump = random_jump()
    f = featurizers.load(
        saved(tmp_path / "jump", "JumpAutoEncoder", jump.state_dict(), submodule_name="mlp_out_layer_12")
    )
    x = torch.randn(3, D)
    close(f.encode(x), jump.encode(x))
    assert str(f.site) == "mlp.out:12"
    identity = featurizers.load(saved(tmp_path / "identity", "IdentityDict", {}, activation_dim=None, dict_size=None))
    assert identity.kind == "identity"


def test_a_training_that_broke_off_is_scaled(tmp_path):
    state, expected = golden("AutoEncoder")
    f = featurizers.load(saved(tmp_path / "it", "AutoEncoder", {"state_dict": state, "norm_factor": 2.0}))
    close(f.encode(expected["x"]), expected["scaled"])


def test_batchtopk_without_a_threshold_is_relu(tmp_path):
    state, expected = golden("BatchTopKSAE")
    f = featurizers.load(saved(tmp_path / "it", "BatchTopKSAE", {**state, "threshold": torch.tensor(-1.0)}))
    p = (expected["x"] - state["b_dec"]) @ state["encoder.weight"].T + state["encoder.bias"]
    close(f.encode(expected["x"]), p.relu())


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule not in ("abstopk", "groupmax", "identity")])
def test_a_dictionary_is_written_for_its_class(rule, tmp_path):
    f = dictionary(rule, pre_bias=True)
    f.site = featurizers.Site("resid.post", 3)
    lost = featurizers.convert(f, tmp_path / "it", "dictionary-learning")
    assert len(lost) == (1 if rule == "jumprelu" else 0)
    trainer = json.loads((tmp_path / "it/config.json").read_text())["trainer"]
    autoencoder = getattr(dl, trainer["dict_class"]).from_pretrained(tmp_path / "it/ae.pt")
    x = torch.randn(5, 8)
    features, error = f.featurize(x)
    close(autoencoder.encode(x), features, 1e-5)
    close(autoencoder(x), x - error, 1e-5)
    back = featurizers.load(tmp_path / "it")
    assert back.site == f.site
    close(back.encode(x), features, 1e-5)


def test_what_is_lost_is_said(tmp_path):
    f = dictionary("relu", normalize="scale", input_scale=3.0, n_heads=2, special_tokens=[5]).in_units("decoder-norm")
    f = f.take([7, 2])
    f.site, f.metadata = featurizers.Site("embed"), {"found": "here"}
    lost = featurizers.convert(f, tmp_path / "it", "dictionary-learning")
    for words in ("numbers", "norms", "factor 3.0", "heads", "special tokens [5]", "'embed'", "'found'"):
        assert sum(words in sentence for sentence in lost) == 1, (words, lost)
    x = torch.randn(5, 8)
    close(featurizers.load(tmp_path / "it").encode(x), f.encode(x), 1e-5)
    for other, words in (
        (dictionary("groupmax"), "has a pre-bias"),
        (dictionary("groupmax", pre_bias=True), "no class for the rule 'groupmax'"),
        (dictionary("relu", normalize="layer-norm"), "does not normalise activations by 'layer-norm'"),
        (featurizers.create("identity", d_in=3), "not the kind 'identity'"),
    ):
        with pytest.raises(ConversionError, match=words):
            featurizers.convert(other, tmp_path / "no", "dictionary-learning")


# ---------------------------------------------------------------------- refusals


def test_what_is_not_known_is_named(tmp_path):
    state, _ = golden("AutoEncoder")
    cases: dict[str, tuple[Path, str]] = {
        "class": (
            saved(tmp_path / "a", "AutoEncoder", dict_class="HyperEncoder"),
            "the dict_class 'HyperEncoder' is not",
        ),
        "crosscoder": (saved(tmp_path / "b", "AutoEncoder", dict_class="CrossCoder"), "several layers at once"),
        "batch crosscoder": (saved(tmp_path / "c", "AutoEncoder", dict_class="BatchTopKCrossCoder"), "several layers"),
        "another class's weights": (saved(tmp_path / "d", "GatedAutoEncoder", state), "the state dict of a GatedAuto"),
        "another width": (saved(tmp_path / "e", "AutoEncoder", activation_dim=17), "activation_dim 16, but config"),
        "another k": (saved(tmp_path / "f", "BatchTopKSAE", k=6), "has k 5, but config.json says 6"),
        "not finite": (
            saved(tmp_path / "g", "AutoEncoder", {**state, "bias": torch.full((D,), torch.inf)}),
            "'bias' holds NaN or infinity",
        ),
        "a list": (saved(tmp_path / "h", "AutoEncoder", [1, 2]), "no state dict of a AutoEncoder"),
        "a factor of text": (
            saved(tmp_path / "i", "AutoEncoder", {"state_dict": state, "norm_factor": "2"}),
            "norm_factor '2'",
        ),
    }
    for name, (folder, words) in cases.items():
        with pytest.raises((ManifestError, WeightsError), match=words) as caught:
            featurizers.load(folder)
        assert str(folder) in str(caught.value), name
    with pytest.raises(UsageError, match="compares all features"):
        featurizers.load(saved(tmp_path / "j", "AutoEncoderTopK"), indices=[1])
    with pytest.raises(ConfigError, match="sum to dict_size 64"):
        dl.MatryoshkaBatchTopKSAE(D, F, 3, [1, 2])
    with pytest.raises(ConfigError, match="k is a positive integer, not 0"):
        dl.BatchTopKSAE(D, F, 0)


def test_pickled_objects_are_not_run(tmp_path):
    class Mischief:
        def __reduce__(self):
            return (open, (str(tmp_path / "was-here"), "w"))

    folder = saved(tmp_path / "it", "AutoEncoder", {"encoder.weight": Mischief()})
    with pytest.raises(WeightsError, match="holds more than tensors, and nothing of it is run"):
        featurizers.load(folder)
    with pytest.raises(WeightsError, match="holds more than tensors"):
        dl.AutoEncoder.from_pretrained(folder / "ae.pt")
    assert not (tmp_path / "was-here").exists()
    (folder / "ae.pt").write_bytes(b"<html>log in</html>")
    with pytest.raises(WeightsError, match=r"ae\.pt"):
        featurizers.load(folder)


def test_a_file_of_another_device_is_read_on_this_one(tmp_path, monkeypatch):
    """A CUDA tensor in a file names its device; it is read on the CPU whatever it says."""
    import featurizers.foreign

    seen = {}
    load = torch.load

    def watched(*args: Any, **kwargs: Any) -> Any:
        seen.update(kwargs)
        return load(*args, **kwargs)

    monkeypatch.setattr(torch, "load", watched)
    featurizers.load(saved(tmp_path / "it", "AutoEncoder"))
    assert seen["map_location"] == "cpu"
    assert seen["weights_only"] is True
