"""Gemma Scope 2's maps of several layers, compared with circuit-tracer's loader, with formulas and with plain hooks."""

from __future__ import annotations

import json
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import featurizers
import pytest
import torch
from featurizers.errors import ConversionError, FeatureIndexError, ManifestError, UsageError, WeightsError
from featurizers_transcoder import Crosscoder, CrossLayerTranscoder
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.support.sae_lens import D, gemma, same

FIXTURES = Path(__file__).parents[2] / "fixtures/gemma-scope-2"
NAMES = ("width_60_l0_big", "width_60_l0_big_affine")
LAYERS, N = 3, 20
IDS = {"input_ids": torch.randint(0, 50, (2, 7), generator=torch.Generator().manual_seed(0))}
CLT_POINTS = [f"model.layers.{{all}}.{norm}_feedforward_layernorm.output" for norm in ("pre", "post")]


def write(folder: Path, layers: int, *, causal: bool, affine: bool = False, config: Any = None) -> list[dict[str, Any]]:
    """Write random weights as a map of several layers, and return those of each layer."""
    g = torch.Generator().manual_seed(0)
    folder.mkdir(parents=True)
    params = []
    for place in range(layers):
        shapes = {"w_enc": (D, N), "w_dec": (N, layers, D), "b_enc": (N,), "b_dec": (D,), "threshold": (N,)}
        shapes |= {"affine_skip_connection": (D, D)} if affine else {}
        one = {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}
        one["w_dec"][:, :place] *= not causal
        save_file(one, folder / f"params_layer_{place}.safetensors")
        params.append(one)
    if config is not None:
        (folder / "config.json").write_text(json.dumps({"architecture": "jump_relu", **config}))
    return params


def clt_config(**keys: Any) -> dict[str, Any]:
    points = {"hf_hook_point_in": CLT_POINTS[0], "hf_hook_point_out": CLT_POINTS[1]}
    return {"type": "clt", "model_name": "gemma-v3-1b-pt", **points, **keys}


def crosscoder_config(layers: str) -> dict[str, Any]:
    point = f"model.layers.{{{layers}}}.output"
    return {
        "type": "crosscoder",
        "model_name": "gemma-v3-1b-pt",
        "hf_hook_point_in": point,
        "hf_hook_point_out": point,
    }


def features(params: list[dict[str, Tensor]], x: list[Tensor]) -> list[Tensor]:
    """Return the features of each layer by the formula of Google's tutorial: JumpReLU."""
    pre = [one @ p["w_enc"] + p["b_enc"] for one, p in zip(x, params, strict=True)]
    return [(h > p["threshold"]) * torch.relu(h) for h, p in zip(pre, params, strict=True)]


def outputs(params: list[dict[str, Tensor]], z: list[Tensor], x: list[Tensor]) -> list[Tensor]:
    """Return the output of each layer by the formula of Google's tutorial, which adds up all layers."""
    total = sum(torch.einsum("...n,nld->...ld", one, p["w_dec"]) for one, p in zip(z, params, strict=True))
    y = [total[..., place, :] + p["b_dec"] for place, p in enumerate(params)]
    return [
        out + one @ p["affine_skip_connection"] if "affine_skip_connection" in p else out
        for out, one, p in zip(y, x, params, strict=True)
    ]


@pytest.mark.parametrize("name", NAMES)
def test_the_numbers_are_circuit_tracers(name):
    f = featurizers.load(FIXTURES / "clt" / name)
    golden = load_file(FIXTURES / "golden.safetensors")
    x, z, y = (golden[f"{name}/{key}"] for key in ("x", "features", "y"))
    found, error = f.featurize({f"in-{i}": x[i] for i in range(LAYERS)}, {f"out-{i}": y[i] for i in range(LAYERS)})
    for layer in range(LAYERS):
        torch.testing.assert_close(found[f"layer-{layer}"], z[layer], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(error[f"out-{layer}"], torch.zeros_like(y[layer]), rtol=0, atol=1e-5)
    assert z.any()
    assert isinstance(f, CrossLayerTranscoder)
    assert f.id == name
    assert f.config.groups["layer-1"].writes == ["out-1", "out-2"]
    norm = "module:model.layers.{}.post_feedforward_layernorm:output"
    assert f.sites_text == f"mlp.in:0 … mlp.in:2 -> {norm.format(0)} … {norm.format(2)}"
    assert {site.model for site in f.sites.values()} == {"google/gemma-3-270m"}
    assert "notes" not in f.metadata


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("causal", [True, False])
def test_decoders_to_earlier_layers_are_kept_unless_they_are_zero(causal, affine, tmp_path):
    params = write(tmp_path / "it", LAYERS, causal=causal, affine=affine, config=clt_config(affine_connection=affine))
    f = featurizers.load(tmp_path / "it")
    x = [torch.randn(5, D) for _ in range(LAYERS)]
    z = features(params, x)
    by_read = {f"in-{i}": one for i, one in enumerate(x)}
    found = {group: f.encode(group, by_read) for group in f.groups}
    for layer, expected in enumerate(outputs(params, z, x)):
        same(found[f"layer-{layer}"], z[layer])
        same(f.decode(f"out-{layer}", found, by_read), expected, 1e-5)
    assert len(f.decoders) == (6 if causal else 9)
    assert f.metadata.get("writes_earlier_layers") == (None if causal else {"layer-1": [0], "layer-2": [0, 1]})
    assert any("not causal" in note for note in f.metadata.get("notes", [])) != causal


def base_run(model: Any, modules: list[Any]) -> tuple[Tensor, list[Tensor]]:
    """Return the logits, and what each module returns."""
    seen: list[Tensor] = []
    with ExitStack() as hooks:
        for module in modules:
            hook = module.register_forward_hook(lambda _module, _args, out: seen.append(out))
            hooks.callback(hook.remove)
        logits = model(**IDS).logits
    return logits, seen


def with_added(model: Any, modules: list[Any], added: list[Tensor], instead: list[Tensor] | None = None) -> Tensor:
    """Return the logits of a run in which each module returns its output, or another tensor, with a tensor added."""
    with ExitStack() as hooks:
        for place, module in enumerate(modules):
            hook = module.register_forward_hook(
                lambda _m, _a, out, place=place: (out if instead is None else instead[place]) + added[place]
            )
            hooks.callback(hook.remove)
        return model(**IDS).logits


def test_a_map_that_is_not_causal_is_edited_frozen_alone(tmp_path):
    params = write(tmp_path / "it", LAYERS, causal=False, config=clt_config())
    f, model = featurizers.load(tmp_path / "it"), gemma(3)
    blocks = model.model.layers
    with torch.no_grad():
        base, x = base_run(model, [block.pre_feedforward_layernorm for block in blocks])
        z = features(params, x)
        change = torch.zeros_like(z[2])
        change[..., 7] = 3.0 - z[2][..., 7]
        added = [change @ params[2]["w_dec"][:, to] for to in range(LAYERS)]
        expected = with_added(model, [block.post_feedforward_layernorm for block in blocks], added)
        edit = {"indices": {"layer-2": [7]}, "value": 3.0, "writes": "additive"}
        with featurizers.intervene(model, featurizers.Ablate(f, later="frozen", **edit)):
            same(model(**IDS).logits, expected, 1e-5)
        with (
            pytest.raises(UsageError, match="later='frozen'"),
            featurizers.intervene(model, featurizers.Ablate(f, **edit)),
        ):
            model(**IDS)
    assert not torch.allclose(base, expected, atol=1e-3)


@pytest.mark.parametrize("config", [True, False], ids=["config.json", "names of folders"])
def test_crosscoders_read_and_write_the_stream(config, tmp_path):
    folder = tmp_path / "gemma-scope-2-1b-pt/crosscoder/layer_0_2_width_40_l0_big"
    params = write(folder, 2, causal=True, config=crosscoder_config("0,2") if config else None)
    f, model = featurizers.load(folder), gemma(3)
    assert isinstance(f, Crosscoder)
    assert {name: str(site) for name, site in f.reads.items()} == {"layer-0": "resid.post:0", "layer-2": "resid.post:2"}
    assert f.reads == f.writes
    assert {site.model for site in f.reads.values()} == {"google/gemma-3-1b-pt"}
    assert sorted(f.decoders) == [("layer-0", "layer-0"), ("layer-0", "layer-2"), ("layer-2", "layer-2")]
    blocks = [model.model.layers[0], model.model.layers[2]]
    with torch.no_grad():
        base, x = base_run(model, blocks)
        z = features(params, x)
        for place, (name, y) in enumerate(zip(f.reads, outputs(params, z, x), strict=True)):
            by_name = dict(zip(f.reads, x, strict=True))
            same(f.encode(name, by_name), z[place], 1e-5)
            same(f.decode(name, dict(zip(f.groups, z, strict=True)), by_name), y, 1e-5)
        change = torch.zeros_like(z[0])
        change[..., 4] = 2.0 - z[0][..., 4]
        added = [change @ params[0]["w_dec"][:, to] for to in range(2)]
        expected = with_added(model, blocks, added, instead=x)
        edit = featurizers.Ablate(f, indices={"layer-0": [4]}, value=2.0, writes="pinned")
        with featurizers.intervene(model, edit):
            same(model(**IDS).logits, expected, 1e-5)
    assert not torch.allclose(base, expected, atol=1e-3)


def test_a_slice_reads_its_own_rows_and_files(tmp_path):
    folder = tmp_path / "slice"
    shutil.copytree(FIXTURES / "clt" / NAMES[1], folder)
    whole = featurizers.load(folder)
    golden = load_file(FIXTURES / "golden.safetensors")
    x = {f"in-{i}": golden[f"{NAMES[1]}/x"][i] for i in range(LAYERS)}
    (folder / "params_layer_0.safetensors").write_bytes(b"")  # opening it would be an error
    part = featurizers.load(folder, indices={"layer-1": [17, 3]})
    assert part.numbers("layer-1").tolist() == [17, 3]
    assert (list(part.reads), list(part.writes)) == (["in-1", "in-2"], ["out-1", "out-2"])
    same(part.encode("layer-1", x), whole.encode("layer-1", x)[:, [17, 3]])
    change = torch.randn(5, 2)
    for write_name in part.writes:
        expected = whole.decode_change(write_name, "layer-1", change, torch.tensor([17, 3]))
        assert torch.equal(part.decode_change(write_name, "layer-1", change), expected)
        assert torch.equal(part.b_dec[write_name], whole.b_dec[write_name])
    assert torch.equal(part.skip_change("out-2", x), whole.skip_change("out-2", x))
    groups = featurizers.load(folder, indices={"layer-1": None, "layer-2": [0]})
    assert {name: group.n_features for name, group in groups.groups.items()} == {"layer-1": N, "layer-2": 1}
    same(groups.encode("layer-1", x), whole.encode("layer-1", x))
    with pytest.raises(WeightsError):
        featurizers.load(folder)


def test_a_slice_is_causal_if_its_own_features_are(tmp_path):
    params = write(tmp_path / "it", 2, causal=False, config=crosscoder_config("0,2"))
    params[1]["w_dec"][:9, 0] = 0
    save_file(params[1], tmp_path / "it/params_layer_1.safetensors")
    for indices, causal in (([3, 8], True), ([3, 9], False)):
        part = featurizers.load(tmp_path / "it", indices={"layer-2": indices})
        assert part.groups["layer-2"].n_features == 2
        assert (part.config.groups["layer-2"].writes == ["layer-2"]) == causal
        assert ("writes_earlier_layers" in part.metadata) != causal
        assert list(part.writes) == ["layer-0", "layer-2"]


def test_features_are_asked_for_by_layer():
    folder = FIXTURES / "clt" / NAMES[0]
    for indices, error in (([1], UsageError), ({"layer-7": [1]}, UsageError), ({"layer-0": [N]}, FeatureIndexError)):
        with pytest.raises(error):
            featurizers.load(folder, indices=indices)


CONFIGS = {
    "another architecture": (clt_config(architecture="topk"), "'topk' of Gemma Scope 2 is not known"),
    "a transcoder": (clt_config(type="transcoder"), "of a type 'clt' or 'crosscoder', not 'transcoder'"),
    "nothing": ({}, "not None"),
    "points of a crosscoder": (clt_config(type="crosscoder"), "a crosscoder does not read"),
    "points of a transcoder": ({**crosscoder_config("0,1,2"), "type": "clt"}, "a clt does not read"),
    "fewer layers": (crosscoder_config("0,2"), r"files of 3 layers, and the layers \[0, 2\]"),
    "layers in another order": (crosscoder_config("0,2,1"), "in ascending order"),
    "no layers": (crosscoder_config("x"), "must have the same layers"),
    "other layers": (clt_config(hf_hook_point_in="model.layers.{0,1,2}.mlp.input"), "must have the same layers"),
    "no braces": (clt_config(hf_hook_point_in="model.layers.3.mlp.input"), "must have the same layers"),
    "no layers of a crosscoder": ({"type": "crosscoder"}, "says which layers it reads"),
    "a skip connection": (clt_config(affine_connection=True), "says affine_connection"),
}


@pytest.mark.parametrize(("config", "message"), CONFIGS.values(), ids=CONFIGS)
def test_a_config_that_does_not_fit_is_refused(config, message, tmp_path):
    write(tmp_path / "it", LAYERS, causal=True, config=config)
    with pytest.raises((ManifestError, WeightsError), match=message):
        featurizers.load(tmp_path / "it")


def test_hook_points_that_are_no_sites_leave_a_map_without_sites(tmp_path):
    config = clt_config(hf_hook_point_in="model.layers.{all}.mystery.output")
    write(tmp_path / "it", LAYERS, causal=True, config=config)
    f = featurizers.load(tmp_path / "it")
    assert f.sites_text is None
    assert any("no sites" in note for note in f.metadata["notes"])


def test_files_that_do_not_fit_are_refused(tmp_path):
    def refused(message: str, place: int = 1, **changes: Tensor | None) -> None:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        params = write(folder, LAYERS, causal=True, config=clt_config())
        changed = {name: tensor for name, tensor in {**params[place], **changes}.items() if tensor is not None}
        save_file(changed, folder / f"params_layer_{place}.safetensors")
        with pytest.raises(WeightsError, match=message):
            featurizers.load(folder)

    refused(r"missing or unknown tensors \['threshold'\]", threshold=None)
    refused(r"missing or unknown tensors \['W_skip'\]", W_skip=torch.zeros(D, D))
    refused("some layers have affine_skip_connection", affine_skip_connection=torch.zeros(D, D))
    refused(r"w_dec has shape \(20, 2, 16\), it must be \(20, 3, 16\)", w_dec=torch.zeros(N, 2, D))
    refused("b_enc must be floats", b_enc=torch.zeros(N, dtype=torch.int64))
    refused("w_dec must be floats with 3 axes", w_dec=torch.zeros(N, D))
    refused("b_dec has shape", b_dec=torch.zeros(D + 1))
    refused("NaN", b_dec=torch.full((D,), torch.nan))
    write(tmp_path / "missing", LAYERS, causal=True, config=clt_config())
    (tmp_path / "missing/params_layer_1.safetensors").unlink()
    with pytest.raises(ManifestError, match=r"params_layer_1\.safetensors is missing"):
        featurizers.load(tmp_path / "missing")


def test_circuit_tracer_gets_a_causal_map_alone(tmp_path):
    f = featurizers.load(FIXTURES / "clt" / NAMES[0])
    assert featurizers.convert(f, tmp_path / "a", to="circuit-tracer") == ["The metadata 'gemma_scope_2' are not kept."]
    again, x = featurizers.load(tmp_path / "a"), {f"in-{i}": torch.randn(4, 6) for i in range(LAYERS)}
    assert torch.equal(again.encode("layer-1", x), f.encode("layer-1", x))
    assert (again.reads, again.writes) == (f.reads, f.writes)
    write(tmp_path / "it", LAYERS, causal=False, config=clt_config())
    with pytest.raises(ConversionError, match="reads layer 1 and writes layer 0"):
        featurizers.convert(featurizers.load(tmp_path / "it"), tmp_path / "b", to="circuit-tracer")
