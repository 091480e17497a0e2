"""Folders of dictionary_learning, read and written by its plugin."""

from __future__ import annotations

import json

import featurizers
import featurizers_dictionary_learning as dl
import pytest
import torch
from featurizers.errors import ConversionError, FeatureIndexError, ManifestError, UsageError, WeightsError
from safetensors.torch import load_file, save_file

from tests.support.dictionaries import RULES, dictionary
from tests.support.dictionary_learning import GOLDEN, NAMES, D, F, K, close, golden, saved


def rewrite(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_is_read(name, tmp_path):
    _, expected = golden(name)
    f = featurizers.load(saved(tmp_path / "it", name, trained_on="the Pile"))
    features, error = f.featurize(expected["x"])
    close(features, expected["features"])
    close(expected["x"] - error, expected["x_hat"], 1e-5)
    close(f.in_units("decoder-norm").encode(expected["x"]), features * f.W_dec.norm(dim=-1))
    assert f.config.units == "raw"
    assert f.metadata["units"].startswith("raw")
    assert f.metadata["dictionary_learning"]["trainer"]["trained_on"] == "the Pile"  # the whole file is kept
    assert f.metadata.get("buffers", {}).get("k") == (K if "TopK" in name else None)
    again = featurizers.load(f.save_pretrained(tmp_path / "artefact"))
    assert torch.equal(again.encode(expected["x"]), features)
    assert again.metadata == f.metadata
    half = featurizers.load(tmp_path / "it", dtype=torch.float16)
    assert half.W_enc.dtype == torch.float16
    autoencoder, config = dl.load_dictionary(tmp_path / "it", device="cpu")
    assert type(autoencoder).__name__ == name
    assert config["buffer"] == {"ctx_len": 128, "io": "out"}
    close(autoencoder.encode(expected["x"]), expected["features"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [name for name in NAMES if name != "JumpAutoEncoder"])  # no release has that class
def test_weights_in_half_precision_are_computed_in_float32(name, dtype, tmp_path):
    """As dictionary_learning does, which copies the weights into modules of float32."""
    state, expected = golden(name)
    half = load_file(GOLDEN.with_name("half-precision.safetensors"))
    features, x_hat = (half[f"{name}/{str(dtype).removeprefix('torch.')}/{what}"] for what in ("features", "x_hat"))
    rounded = {key: tensor.to(dtype) if tensor.is_floating_point() else tensor for key, tensor in state.items()}
    folder = saved(tmp_path / "it", name, rounded)
    f = featurizers.load(folder)
    assert {tensor.dtype for tensor in f.parameters()} == {torch.float32}
    found, error = f.featurize(expected["x"])
    close(found, features)
    close(expected["x"] - error, x_hat, 1e-5)
    if name != "AutoEncoderTopK":
        fires = (features > 0).any(0).nonzero()[:3, 0].tolist()
        close(featurizers.load(folder, indices=fires).collect(expected["x"]), features[:, fires])
    assert featurizers.load(folder, dtype=dtype).W_dec.dtype == dtype


@pytest.mark.parametrize("name", [name for name in NAMES if name != "AutoEncoderTopK"])
def test_some_features_are_read_alone(name, tmp_path):
    _, expected = golden(name)
    folder, source = saved(tmp_path / "it", name), expected["x"].flip(0)
    some = (expected["features"] > 0).any(0).nonzero()[:, 0].tolist()[5:1:-2]
    part, whole = featurizers.load(folder, indices=some), featurizers.load(folder)
    assert part.numbers.tolist() == some
    close(part.collect(expected["x"]), expected["features"][:, some])
    close(part.collect(expected["x"], some[1:]), expected["features"][:, some[1:]])
    edited = whole.interchange(expected["x"], source, some[:1])
    close(part.interchange(expected["x"], source, some[:1]), edited, 1e-5)
    assert not torch.equal(edited, expected["x"])
    with pytest.raises(FeatureIndexError, match="64"):
        featurizers.load(folder, indices=[64])


def test_topk_is_loaded_whole(tmp_path):
    with pytest.raises(UsageError, match="it: the rule 'topk' compares all features"):
        featurizers.load(saved(tmp_path / "it", "AutoEncoderTopK"), indices=[1])
    identity = saved(tmp_path / "identity", "IdentityDict", {}, activation_dim=None, dict_size=None)
    f = featurizers.load(identity)
    assert (f.kind, f.d_in) == ("identity", None)
    for indices in ([1], [100_000]):  # it has no width
        with pytest.raises(UsageError, match="an IdentityDict is loaded whole"):
            featurizers.load(identity, indices=indices)


@pytest.mark.parametrize(
    ("trainer", "site"),
    [
        ({}, "resid.post:12"),
        ({"submodule_name": "mlp_out_layer_12"}, "mlp.out:12"),
        ({"submodule_name": "attn_out_layer12"}, "attn.out:12"),
        ({"submodule_name": "resid_post"}, "resid.post:12"),
        ({"submodule_name": None}, None),
        ({"submodule_name": "resid_post_layer_3"}, None),
        ({"submodule_name": "not_resid_post"}, None),
        ({"layer": "12"}, None),
        ({"layer": True, "submodule_name": "resid_post"}, None),
        ({"layer": -1, "submodule_name": "resid_post"}, None),
        ({"buffer": {"io": "in"}}, None),
    ],
    ids=str,
)
def test_a_site_is_what_the_file_says_and_no_guess(trainer, site, tmp_path):
    f = featurizers.load(saved(tmp_path / "it", "AutoEncoder", wandb_name="mine", **trainer))
    assert f.id == "mine"
    assert f.site == (site and featurizers.Site.parse(site))
    assert f.site is None or f.site.model == "google/gemma-2-2b"


@pytest.mark.parametrize("name", [name for name in NAMES if "scaled" in golden(name)[1]])
def test_the_backup_of_a_training_takes_activations_as_the_model_has_them(name, tmp_path):
    """An interrupted trainSAE leaves biases for normalised activations, and the factor of the normalisation."""
    state, expected = golden(name)
    optimizer = torch.optim.Adam(torch.nn.Linear(2, 2).parameters()).state_dict()
    dump = {"step": 7, "ae": state, "optimizer": optimizer, "config": {"lr": 1e-3}, "norm_factor": 2.0}
    folder = saved(tmp_path / "it", name, dump)
    f = featurizers.load(folder)
    close(f.encode(expected["x"]), expected["scaled"])
    assert f.metadata["buffers"]["norm_factor"] == 2.0
    close(dl.load_dictionary(folder)[0].encode(expected["x"]), expected["scaled"])
    assert torch.equal(torch.load(folder / "ae.pt")["ae"]["b_dec" if "b_dec" in state else "encoder.weight"],
                       state["b_dec" if "b_dec" in state else "encoder.weight"])  # fmt: skip


@pytest.mark.parametrize("name", ["BatchTopKSAE", "MatryoshkaBatchTopKSAE"])
def test_batchtopk_without_a_threshold_is_relu(name, tmp_path):
    state, expected = golden(name)
    f = featurizers.load(saved(tmp_path / "it", name, {**state, "threshold": torch.tensor(-1.0)}))
    w, b = (state[n] for n in (("encoder.weight", "encoder.bias") if "encoder.bias" in state else ("W_enc", "b_enc")))
    p = (expected["x"] - state["b_dec"]) @ (w.T if name == "BatchTopKSAE" else w) + b
    close(f.encode(expected["x"]), p.relu())


# ---------------------------------------------------------------------- writing


@pytest.mark.parametrize("name", NAMES)
def test_it_is_written_as_it_was_read(name, tmp_path):
    state, _ = golden(name)
    f = featurizers.load(saved(tmp_path / "it", name, lr=1e-3, **({"k": K} if "TopK" in name else {})))
    for again in (f, featurizers.load(f.save_pretrained(tmp_path / "artefact"))):
        target = tmp_path / f"back-{again is f}"
        assert featurizers.convert(again, target, "dictionary-learning") == []
        written = torch.load(target / "ae.pt", weights_only=True)
        assert written.keys() == state.keys()
        assert all(torch.equal(written[n], t) and written[n].dtype == t.dtype for n, t in state.items())
        first, second = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "it", target))
        assert first.keys() == second.keys()
        assert first["trainer"].items() <= second["trainer"].items()
        assert featurizers.load(target).site == f.site


@pytest.mark.parametrize("pre_bias", [True, False])
@pytest.mark.parametrize("rule", [rule for rule in RULES if rule not in ("abstopk", "groupmax", "identity")])
def test_a_dictionary_is_written_for_its_class(rule, pre_bias, tmp_path):
    f = dictionary(rule, pre_bias=pre_bias)
    f.site = featurizers.Site("resid.post", 3)
    lost = featurizers.convert(f, tmp_path / "it", "dictionary-learning")
    exact = rule == "relu" or pre_bias != (rule == "jumprelu")
    assert [len(lost), "to rounding" in "".join(lost)] == ([0, False] if exact else [1, True])
    trainer = json.loads((tmp_path / "it/config.json").read_text())["trainer"]
    assert ("k" in trainer) == (rule == "topk")
    autoencoder = getattr(dl, trainer["dict_class"]).from_pretrained(tmp_path / "it/ae.pt")
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    features, error = f.featurize(x)
    close(autoencoder.encode(x), features, 1e-5)
    close(autoencoder(x), x - error, 1e-5)
    back = featurizers.load(tmp_path / "it")
    assert (back.site, back.id) == (f.site, f.id)
    close(back.encode(x), features, 1e-5)


def test_what_is_lost_is_said(tmp_path):
    f = dictionary("relu", normalize="scale", input_scale=3.0, n_heads=2, special_tokens=[5]).in_units("decoder-norm")
    f = f.take([7, 2])
    f.site, f.metadata = featurizers.Site("embed"), {"found": "here"}
    lost = featurizers.convert(f, tmp_path / "it", "dictionary-learning")
    for words in ("numbers", "norms", "factor 3.0", "heads", "special tokens [5]", "'embed'", "'found'"):
        assert sum(words in sentence for sentence in lost) == 1, (words, lost)
    assert len(lost) == 7
    x = torch.randn(5, 8)
    close(featurizers.load(tmp_path / "it").encode(x), f.encode(x), 1e-5)
    close(x - featurizers.load(tmp_path / "it").featurize(x)[1], x - f.featurize(x)[1], 1e-5)
    for other, words in (
        (dictionary("groupmax"), "no class for the rule 'groupmax'"),
        (dictionary("abstopk", pre_bias=True), "no class for the rule 'abstopk'"),
        (dictionary("identity", pre_bias=True), "no class for the rule 'identity'"),
        (dictionary("relu", normalize="layer-norm"), "does not normalise activations by 'layer-norm'"),
        (featurizers.create("identity", d_in=3), "not the kind 'identity'"),
    ):
        with pytest.raises(ConversionError, match=words):
            featurizers.convert(other, tmp_path / "no", "dictionary-learning")
        assert not (tmp_path / "no").exists()


def test_units_are_in_the_weights_or_said_to_be_raw(tmp_path):
    x = torch.randn(5, 8)
    for units in ("folded", "decoder-norm"):
        f = dictionary("gated", pre_bias=True).in_units(units)
        lost = featurizers.convert(f, tmp_path / units, "dictionary-learning")
        assert lost == ["The norms of the raw decoder rows are not kept; they are in the weights."]
        close(featurizers.load(tmp_path / units).encode(x), f.encode(x), 1e-5)
        if units == "folded":
            assert torch.equal(featurizers.load(tmp_path / units).W_enc, f.W_enc), "norms are folded once"
    f = dictionary("topk", pre_bias=True)
    lost = featurizers.convert(f.in_units("decoder-norm"), tmp_path / "topk", "dictionary-learning")
    assert lost == ["The features are in raw units: the weights of the rule 'topk' cannot hold the norms."]
    close(featurizers.load(tmp_path / "topk").encode(x), f.encode(x))


@pytest.mark.parametrize("change", ["units", "slice"])
@pytest.mark.parametrize("name", ["BatchTopKSAE", "MatryoshkaBatchTopKSAE"])
def test_thresholds_that_are_no_longer_one_make_another_class(name, change, tmp_path):
    _, expected = golden(name)
    f = featurizers.load(saved(tmp_path / "it", name, k=K))
    f = f.in_units("folded") if change == "units" else f.take([7, 2])
    f.site = f.site.at(model_revision="0" * 40)
    lost = featurizers.convert(f, tmp_path / "back", "dictionary-learning")
    for words in (f"The class is JumpReluAutoEncoder, not {name}", "to rounding", "revision"):
        assert sum(words in sentence for sentence in lost) == 1, (words, lost)
    back = featurizers.load(tmp_path / "back")
    close(back.encode(expected["x"]), f.encode(expected["x"]), 1e-5)
    assert "k" not in back.metadata["dictionary_learning"]["trainer"]


# ---------------------------------------------------------------------- refusals

DUMP = {"step": 1, "ae": golden("AutoEncoder")[0], "norm_factor": 2.0}
STATE = golden("AutoEncoder")[0]
WRONG = {
    "an unknown class": ({"dict_class": "HyperEncoder"}, "the dict_class 'HyperEncoder' is not known; known are Auto"),
    "no class": ({"dict_class": None}, "the dict_class None is not known"),
    "a list for a class": ({"dict_class": ["AutoEncoder"]}, "is not known"),
    "a crosscoder": ({"dict_class": "CrossCoder"}, r"crosscoder's|several"),
    "another crosscoder": ({"dict_class": "BatchTopKCrossCoder"}, r"crosscoder's|several"),
    "a crosscoder by its weights": (
        {"state": {**STATE, "encoder.weight": torch.zeros(2, D, F)}},
        r"not a crosscoder's|several layers",
    ),
    "a transcoder": ({"buffer": {"io": "in_and_out"}}, "reads one site and writes another"),
    "weights of another class": ({"name": "GatedAutoEncoder", "state": STATE}, "the state dict of a GatedAutoEncoder"),
    "an unknown tensor": ({"state": {**STATE, "activation_mean": torch.zeros(D)}}, 'Unexpected key.*"activation_mean"'),
    "another width": ({"activation_dim": 17}, "activation_dim 16, but config.json says 17"),
    "a number as text": ({"dict_size": "64"}, "dict_size 64, but config.json says '64'"),
    "another k": ({"name": "BatchTopKSAE", "k": 6}, "has k 5, but config.json says 6"),
    "other groups": ({"name": "MatryoshkaBatchTopKSAE", "group_sizes": [32, 32]}, r"group_sizes \[16, 16, 32\], but"),
    "not finite": ({"state": {**STATE, "bias": torch.full((D,), torch.inf)}}, "'bias' holds NaN or infinity"),
    "a list": ({"state": [1, 2]}, "no state dict of a AutoEncoder"),
    "a factor of text": ({"state": {**DUMP, "norm_factor": "2"}}, "norm_factor '2'"),
    "a factor of zero": ({"state": {**DUMP, "norm_factor": 0.0}}, "norm_factor 0.0"),
    "an unknown key of a backup": (
        {"state": {**DUMP, "scale": 2.0}},
        "backup of a training, with unknown keys .'scale'",
    ),
    "another class's backup": (
        {"name": "AutoEncoderNew", "state": {**DUMP, "ae": golden("AutoEncoderNew")[0]}},
        "norm_factor 2.0, which a AutoEncoderNew cannot undo",
    ),
}


@pytest.mark.parametrize(("changes", "words"), WRONG.values(), ids=WRONG)
def test_what_is_not_known_is_named(changes, words, tmp_path):
    folder = saved(tmp_path / "it", **{"name": "AutoEncoder", **changes})
    for load in (featurizers.load, dl.load_dictionary):
        with pytest.raises((ManifestError, WeightsError), match=words) as caught:
            load(folder)
        assert str(folder) in str(caught.value)


def test_a_name_that_only_mentions_crosscoders_is_no_crosscoder(tmp_path):
    f = featurizers.load(saved(tmp_path / "it", "AutoEncoder", wandb_name="baseline of the CrossCoder"))
    assert f.n_features == F


def test_a_folder_without_a_trainer_is_named(tmp_path):
    folder = rewrite(saved(tmp_path / "it", "AutoEncoder"), trainer=["AutoEncoder"])
    with pytest.raises(ManifestError, match=r"no object 'trainer', whose dict_class names the class of ae\.pt"):
        featurizers.load(folder)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"dict_class": "GatedAutoEncoder"}, "class 'GatedAutoEncoder', but no ae.pt: a folder of a fork"),
        ({}, "class None, but no ae.pt"),
    ],
    ids=str,
)
def test_folders_of_a_fork_are_refused(config, words, tmp_path):
    save_file({"encoder.weight": torch.zeros(4, 8)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"activation_dim": 4, "dict_size": 8, **config}))
    with pytest.raises(ManifestError, match=words):
        featurizers.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 4}))  # of another library
    with pytest.raises(ManifestError, match="no installed plugin knows the format"):
        featurizers.load(tmp_path)


def test_pickled_objects_are_not_run(tmp_path):
    class Mischief:
        def __reduce__(self):
            return (open, (str(tmp_path / "was-here"), "w"))

    folder = saved(tmp_path / "it", "AutoEncoder", {"encoder.weight": Mischief()})
    for load in (featurizers.load, dl.load_dictionary, lambda folder: dl.AutoEncoder.from_pretrained(folder / "ae.pt")):
        with pytest.raises(WeightsError, match="holds more than tensors, and nothing of it is run"):
            load(folder)
    assert not (tmp_path / "was-here").exists()
    (folder / "ae.pt").write_bytes(b"<html>log in</html>")
    with pytest.raises(WeightsError, match=r"ae\.pt"):
        featurizers.load(folder)


def test_a_file_that_was_saved_on_a_gpu_is_read_without_one(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:7")
        folder = saved(tmp_path / "it", "AutoEncoder")
    with pytest.raises(RuntimeError, match="CUDA"):
        torch.load(folder / "ae.pt")
    _, expected = golden("AutoEncoder")
    close(featurizers.load(folder).encode(expected["x"]), expected["features"])
    close(dl.AutoEncoder.from_pretrained(folder / "ae.pt").encode(expected["x"]), expected["features"])
    close(dl.load_dictionary(folder)[0].encode(expected["x"]), expected["features"])
