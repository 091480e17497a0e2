"""Plugin circuit-tracer compared with folders and golden tensors of circuit-tracer itself."""

from __future__ import annotations

import shutil
from pathlib import Path

import featurizers
import pytest
import torch
import yaml
from featurizers.errors import (
    ConversionError,
    FeatureIndexError,
    FeaturizerError,
    ManifestError,
    SourceError,
    UsageError,
    WeightsError,
)
from featurizers.format import ExternalFiles
from featurizers.store import of_folder
from featurizers_circuit_tracer.reading import resolve
from featurizers_transcoder import CrossLayerTranscoder, Transcoder
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

FIXTURES = Path(__file__).parents[2] / "fixtures/circuit-tracer"
NAMES = ("set-relu", "set-jumprelu-skip", "clt-relu", "clt-jump_relu")
D, N, LAYERS = 6, 20, 3


def golden(name: str) -> dict[str, Tensor]:
    return {n.removeprefix(f"{name}/"): t for n, t in load_file(FIXTURES / "golden.safetensors").items() if name in n}


def inputs(t: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"in-{layer}": t["x"][layer] for layer in range(LAYERS)}


def copied(name: str, folder: Path, **config: object) -> Path:
    shutil.copytree(FIXTURES / name, folder)
    path = folder / "config.yaml"
    changed = {**yaml.safe_load(path.read_text()), **config}
    path.write_text(yaml.safe_dump({key: value for key, value in changed.items() if value is not None}))
    return folder


def retensored(path: Path, **changes: Tensor | None) -> None:
    tensors = {**load_file(path), **changes}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": D, "intermediate_size": 12, "num_attention_heads": 2, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=LAYERS, vocab_size=40, head_dim=4, **sizes)).eval()


@pytest.mark.parametrize("name", NAMES)
def test_the_numbers_are_circuit_tracers(name):
    f, t = featurizers.load(FIXTURES / name), golden(name)
    x = inputs(t)
    features, error = f.featurize(x, {f"out-{layer}": t["y"][layer] for layer in range(LAYERS)})
    for layer in range(LAYERS):
        torch.testing.assert_close(features[f"layer-{layer}"], t["features"][layer], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(error[f"out-{layer}"], torch.zeros(7, D), rtol=0, atol=1e-5)
    assert t["features"].any()
    assert (f.kind, f.id) == ("transcoder.cross-layer", name)
    assert f.sites_text == "mlp.in:0 … mlp.in:2 -> mlp.out:0 … mlp.out:2"
    assert {site.model for site in f.sites.values()} == {"owner/tiny"}


@pytest.mark.parametrize("name", NAMES)
def test_a_slice_has_the_features_and_edits_of_the_whole(name):
    whole, t = featurizers.load(FIXTURES / name), golden(name)
    part = featurizers.load(FIXTURES / name, indices={"layer-1": [17, 3], "layer-2": [0]})
    assert {group: own.n_features for group, own in part.groups.items()} == {"layer-1": 2, "layer-2": 1}
    assert part.numbers("layer-1").tolist() == [17, 3]
    x = inputs(t)
    torch.testing.assert_close(part.encode("layer-1", x), t["features"][1][:, [17, 3]], rtol=1e-6, atol=1e-6)
    model, edit = llama(), {"layer-1": [3], "layer-2": [0]}
    with torch.no_grad():
        logits = []
        for f in (whole, part):
            with featurizers.intervene(model, featurizers.Ablate(f, indices=edit, value=2.0, writes="additive")):
                logits.append(model(torch.arange(8)[None]).logits)
        base = model(torch.arange(8)[None]).logits
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(base, logits[0], atol=1e-3)


def test_a_whole_group_beside_a_slice(tmp_path):
    whole, t = featurizers.load(FIXTURES / "set-relu"), golden("set-relu")
    whole.save_pretrained(tmp_path / "artefact")
    for folder in (FIXTURES / "set-relu", tmp_path / "artefact"):
        part = featurizers.load(folder, indices={"layer-1": None, "layer-2": [3]})
        assert {name: group.n_features for name, group in part.groups.items()} == {"layer-1": 20, "layer-2": 1}
        assert [group.slice_of for group in part.config.groups.values()] == [None, 20]
        for layer, columns in ((1, slice(None)), (2, [3])):
            found = part.encode(f"layer-{layer}", {f"in-{layer}": t["x"][layer]})
            wanted = whole.encode(f"layer-{layer}", {f"in-{layer}": t["x"][layer]})[:, columns]
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    with pytest.raises(UsageError, match="there is no group 'layer-7'"):
        featurizers.load(FIXTURES / "set-relu", indices={"layer-7": None})
    with pytest.raises(UsageError, match="the indices name no group"):
        featurizers.load(FIXTURES / "set-relu", indices={})


def test_a_slice_of_a_set_needs_no_file_of_other_layers(tmp_path):
    folder = copied("set-jumprelu-skip", tmp_path / "set")
    for layer in (0, 2):  # not a safetensors file, so that opening it would be an error
        (folder / f"layer_{layer}.safetensors").write_bytes(b"")
    part = featurizers.load(folder, indices={"layer-1": [3]})
    assert (list(part.reads), list(part.writes)) == (["in-1"], ["out-1"])
    with pytest.raises(WeightsError):
        featurizers.load(folder)


def repository(root: Path, indices: Tensor | None = None):
    def files(repo_id: str, subfolder: str | None = None, revision: str | None = None) -> ExternalFiles:
        return of_folder(root / repo_id.partition("/")[2] / (subfolder or ""), indices)

    return files


def test_one_layer_by_its_name():
    t, files = golden("set-jumprelu-skip"), repository(FIXTURES)
    f = resolve("owner/set-jumprelu-skip/layer-2", files)
    assert isinstance(f, Transcoder)
    features, error = f.featurize({"in": t["x"][2]}, {"out": t["y"][2]})
    torch.testing.assert_close(features["features"], t["features"][2], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(error["out"], torch.zeros(7, D), rtol=0, atol=1e-5)
    assert (f.sites_text, f.id) == ("mlp.in:2 -> mlp.out:2", "set-jumprelu-skip/layer-2")
    part = resolve("owner/set-jumprelu-skip/layer-2", repository(FIXTURES, torch.tensor([4, 1])))
    torch.testing.assert_close(part.encode("features", {"in": t["x"][2]}), t["features"][2][:, [4, 1]])
    g = resolve("owner/clt-relu/layer-1", files)
    assert isinstance(g, CrossLayerTranscoder)
    assert (list(g.groups), list(g.reads), list(g.writes)) == (["layer-1"], ["in-1"], ["out-1", "out-2"])
    whole = resolve("owner/clt-relu", files)
    assert list(whole.groups) == ["layer-0", "layer-1", "layer-2"]
    for reference, message in {
        "owner": "write 'circuit-tracer:owner/name'",
        "owner/set-relu/layer-3": "the layers 0 to 2, not 3",
    }.items():
        with pytest.raises(SourceError, match=message):
            resolve(reference, files)


HOOKS = {
    ("hook_resid_mid", "hook_mlp_out", "meta-llama/Llama-3.2-1B"): ("resid.mid:1", "mlp.out:1"),
    ("mlp.hook_in", "mlp.hook_out", "Qwen/Qwen3-4B"): ("mlp.in:1", "mlp.out:1"),
    ("mlp.hook_in", "mlp.hook_out", None): ("mlp.in:1", "mlp.out:1"),
    ("hook_resid_mid", "hook_mlp_out", "google/gemma-2-2b"): (
        "resid.mid:1",
        "module:model.layers.1.post_feedforward_layernorm:output",
    ),
    ("mlp.hook_in", "hook_mlp_out", "google/gemma-3-4b-it"): (
        "mlp.in:1",
        "module:model.language_model.layers.1.post_feedforward_layernorm:output",
    ),
    ("mlp.hook_in", "hook_mlp_out", "google/gemma-3-270m"): (
        "mlp.in:1",
        "module:model.layers.1.post_feedforward_layernorm:output",
    ),
    ("ln2.hook_normalized", "hook_mlp_out", "google/gemma-2-2b"): (
        "resid.mid:1",
        "module:model.layers.1.post_feedforward_layernorm:output",
    ),
    ("mlp.hook_in", "hook_mlp_out", None): ("mlp.in:1", None),
    ("mlp.hook_in", "hook_mlp_out", "allenai/OLMo-2-0425-1B"): ("mlp.in:1", None),
    ("mlp.hook_in", "hook_mlp_out", "google/gemma-2b"): ("mlp.in:1", "mlp.out:1"),
    ("hook_resid_pre", "hook_resid_post", "gpt2"): (None, None),
}


@pytest.mark.parametrize("hooks", HOOKS, ids=str)
def test_hooks_are_sites(hooks, tmp_path):
    reads, writes, model = hooks
    folder = copied(
        "set-relu", tmp_path / "set", feature_input_hook=reads, feature_output_hook=writes, model_name=model
    )
    f = featurizers.load(folder)
    found = f.reads.get("in-1"), f.writes.get("out-1")
    assert tuple(site and str(site) for site in found) == HOOKS[hooks]


def test_normalised_reads_are_divided_by_their_root_mean_square(tmp_path):
    gemma = {"feature_input_hook": "ln2.hook_normalized", "model_name": "google/gemma-2-2b"}
    f, t = featurizers.load(copied("set-relu", tmp_path / "set", **gemma)), golden("set-relu")
    x = t["x"][1]
    normalized = x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    plain = featurizers.load(FIXTURES / "set-relu")
    torch.testing.assert_close(f.encode("layer-1", {"in-1": x}), plain.encode("layer-1", {"in-1": normalized}))
    with pytest.raises(ManifestError, match="inside the norm"):
        featurizers.load(copied("set-relu", tmp_path / "other", feature_input_hook="ln2.hook_normalized"))


@pytest.mark.parametrize("name", NAMES)
def test_written_files_are_the_same(name, tmp_path):
    f = featurizers.load(FIXTURES / name)
    assert featurizers.convert(f, tmp_path / "out", to="circuit-tracer") == []
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {path.name for path in (FIXTURES / name).iterdir()}
    for path in (FIXTURES / name).glob("*.safetensors"):
        ours, theirs = load_file(tmp_path / "out" / path.name), load_file(path)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    config = yaml.safe_load((tmp_path / "out/config.yaml").read_text())
    assert config == {**yaml.safe_load((FIXTURES / name / "config.yaml").read_text()), "scan": name}


def test_what_circuit_tracer_has_no_room_for_is_refused(tmp_path):
    def refused(f, message):
        with pytest.raises(ConversionError, match=message):
            featurizers.convert(f, tmp_path / "out", to="circuit-tracer")

    f = Transcoder.from_weights(torch.randn(5, 4), torch.randn(5, 4))
    refused(f, "set f.reads and f.writes")
    f.reads, f.writes = {"in": "mlp.in:3"}, {"out": "mlp.out:3"}
    refused(f, "from 0 on")
    f.reads, f.writes = {"in": "mlp.in:0"}, {"out": "mlp.act:0"}
    refused(f, "no hook for writes such as 'mlp.act:0'")
    f.writes = {"out": "mlp.out:0"}
    f.metadata = {"note": 1}
    assert featurizers.convert(f, tmp_path / "one", to="circuit-tracer") == ["The metadata 'note' are not kept."]
    topk = Transcoder.from_weights(torch.randn(5, 4), torch.randn(5, 4), rule="topk", rule_options={"k": 2})
    topk.reads, topk.writes = f.reads, f.writes
    refused(topk, "relu and jumprelu")
    refused(featurizers.create("identity", d_in=4), "transcoders only")


def test_centres_and_missing_decoders_are_folded(tmp_path):
    torch.manual_seed(1)
    groups = {
        f"layer-{i}": {"reads": [f"in-{i}"], "writes": writes, "n_features": 5}
        for i, writes in enumerate([["out-0", "out-2"], ["out-1"], ["out-2"]])
    }
    reads = {f"in-{i}": {"width": 4, "centre": i == 1} for i in range(3)}
    f_config = {"reads": reads, "writes": {f"out-{i}": 4 for i in range(3)}, "groups": groups}
    tensors = {f"W_enc.layer-{i}.in-{i}": torch.randn(5, 4) for i in range(3)} | {"centre.in-1": torch.randn(4)}
    tensors |= {f"W_dec.{g}.{w}": torch.randn(5, 4) for g, own in groups.items() for w in own["writes"]}
    f = CrossLayerTranscoder.from_tensors(f_config, tensors)
    f.reads = {f"in-{i}": f"resid.mid:{i}" for i in range(3)}
    f.writes = {f"out-{i}": f"mlp.out:{i}" for i in range(3)}
    f.id = "folded"
    lost = featurizers.convert(f, tmp_path / "out", to="circuit-tracer")
    assert [sentence.split(".")[0][:18] for sentence in lost] == ["What is subtracted", "Groups have decode"]
    g, x = featurizers.load(tmp_path / "out"), {f"in-{i}": torch.randn(9, 4) for i in range(3)}
    y = {f"out-{i}": torch.zeros(9, 4) for i in range(3)}
    for ours, theirs in zip(f.featurize(x, y), g.featurize(x, y), strict=True):
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-5)
    assert (g.reads, g.writes, g.id) == (f.reads, f.writes, "folded")


BAD_YAML = {
    "an alias": "model_kind: &a [x]\nscan: *a\n",
    "a tag": "model_kind: !!python/object/apply:os.system [ls]\n",
    "deep": "model_kind: " + "[" * 20_000,
    "not text": b"\xff\xfe\x00",
    "no kind": "model_name: x\n",
    "another kind": "model_kind: sae\nfeature_input_hook: a\nfeature_output_hook: b\n",
    "no hooks": "model_kind: transcoder_set\n",
    "a list": "- 1\n",
    "too large": "#" * 300_000,
    "files elsewhere": "model_kind: transcoder_set\nfeature_input_hook: a\nfeature_output_hook: b\n"
    "transcoders: [hf://google/gemma-scope/params.npz]\n",
}


@pytest.mark.parametrize("text", BAD_YAML.values(), ids=BAD_YAML)
def test_a_config_that_is_not_valid_is_refused(text, tmp_path):
    folder = copied("set-relu", tmp_path / "set")
    (folder / "config.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ManifestError, match=r"config\.yaml") as raised:
        featurizers.load(folder)
    assert len(str(raised.value)) < 2000


def test_listed_files_of_the_folder_are_read(tmp_path):
    folder = copied("set-relu", tmp_path / "set", transcoders=["b.safetensors", "a.safetensors"])
    for layer, name in enumerate("ba"):
        (folder / f"layer_{layer}.safetensors").rename(folder / f"{name}.safetensors")
    f, whole = featurizers.load(folder), featurizers.load(FIXTURES / "set-relu")
    assert list(f.groups) == ["layer-0", "layer-1"]
    torch.testing.assert_close(f.W_enc["layer-1"]["in-1"], whole.W_enc["layer-1"]["in-1"])


def test_weights_that_do_not_fit_are_refused(tmp_path):
    def refused(name: str, file: str, message: str, error: type[FeaturizerError] = WeightsError, **changes):
        folder = copied(name, tmp_path / str(len(list(tmp_path.iterdir()))))
        retensored(folder / file, **changes)
        with pytest.raises(error, match=message):
            featurizers.load(folder)

    one, threshold = "layer_1.safetensors", {"activation_function.threshold": -torch.ones(N)}
    refused("set-jumprelu-skip", one, "negative threshold", **threshold)
    refused("set-relu", one, "W_enc must be floats", W_enc=None)
    refused("set-relu", one, "W_enc must be floats", W_enc=torch.zeros(N, D, dtype=torch.int64))
    refused("set-relu", one, "it must be", b_enc=torch.zeros(N + 1))
    refused("set-relu", one, "'log_thresholds', which is not known", log_thresholds=torch.zeros(N))
    refused("set-relu", one, "NaN", b_dec=torch.full((D,), torch.nan))
    refused("clt-relu", "W_enc_1.safetensors", "some layers have thresholds", threshold_1=torch.ones(N))
    refused("clt-jump_relu", "W_enc_2.safetensors", "negative threshold", threshold_2=-torch.ones(N))
    refused("clt-relu", "W_dec_1.safetensors", "it must be", W_dec_1=torch.zeros(N, 3, D))
    for missing in ("set-relu/layer_1", "clt-relu/W_enc_0", "clt-relu/W_dec_1"):
        name, _, file = missing.partition("/")
        folder = copied(name, tmp_path / f"missing-{file}")
        (folder / f"{file}.safetensors").unlink()
        with pytest.raises(ManifestError, match=r"missing|no file"):
            featurizers.load(folder)


def test_features_are_asked_for_by_layer():
    for indices, error in (([1], UsageError), ({"layer-7": [1]}, UsageError), ({"layer-0": [N]}, FeatureIndexError)):
        with pytest.raises(error):
            featurizers.load(FIXTURES / "set-relu", indices=indices)
