"""Transcoders of plugin sparsify compared with golden tensors of sparsify itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import featurizers
import pytest
import torch
from featurizers.errors import ConversionError, UsageError, WeightsError
from featurizers.store import of_folder
from featurizers_sparsify import featurizers_resolve
from featurizers_transcoder import Transcoder
from safetensors.torch import load_file, save_file
from torch import Tensor

GOLDEN = Path(__file__).parents[2] / "fixtures/sparsify/transcoders.safetensors"
KINDS: dict[str, dict[str, Any]] = {
    "transcode": {"transcode": True},
    "transcode-skip": {"transcode": True, "skip_connection": True},
    "skip": {"skip_connection": True},
    "groupmax": {"transcode": True, "skip_connection": True, "activation": "groupmax"},
}
RESULTS = ("x", "features", "y")


def golden(kind: str) -> dict[str, Tensor]:
    start = f"{kind}/"
    return {n.removeprefix(start): t for n, t in load_file(GOLDEN).items() if n.startswith(start)}


def write(folder: Path, kind: str, **changes: Any) -> Path:
    folder.mkdir(parents=True)
    save_file({n: t for n, t in golden(kind).items() if n not in RESULTS}, folder / "sae.safetensors")
    cfg = {"d_in": 6, "num_latents": 20, "k": 5, **KINDS[kind], **changes}
    (folder / "cfg.json").write_text(json.dumps(cfg))
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_the_numbers_are_sparsifys(kind, tmp_path):
    f, t = featurizers.load(write(tmp_path / "layers.5.mlp", kind)), golden(kind)
    features, error = f.featurize({"in": t["x"]}, {"out": t["y"]})
    torch.testing.assert_close(features["features"], t["features"], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(error["out"], torch.zeros(7, 6), rtol=0, atol=1e-5)
    assert (t["features"] > 0).any()
    assert (f.kind, f.id, f.sites_text) == ("transcoder", "layers.5.mlp", "mlp.in:5 -> mlp.out:5")


@pytest.mark.parametrize("kind", KINDS)
def test_written_files_are_read_again(kind, tmp_path):
    f = featurizers.load(write(tmp_path / "layers.5.mlp", kind))
    assert featurizers.convert(f, tmp_path / "again/layers.5.mlp", to="sparsify") == []
    g = featurizers.load(tmp_path / "again/layers.5.mlp")
    assert (g.sites, g.config) == (f.sites, f.config)
    old, new = f.state_dict(), g.state_dict()
    assert all(torch.equal(old[name], new[name]) for name in old)


def test_a_centre_and_other_maps(tmp_path):
    torch.manual_seed(0)
    rule = {"rule": "topk", "rule_options": {"k": 2}}
    f = Transcoder.from_weights(torch.randn(9, 4), torch.randn(9, 4), centre=torch.randn(4), **rule)
    (lost,) = featurizers.convert(f, tmp_path / "centred", to="sparsify")
    assert "in the encoder's bias" in lost
    x, g = torch.randn(8, 4), featurizers.load(tmp_path / "centred")
    torch.testing.assert_close(g.encode("features", {"in": x}), f.encode("features", {"in": x}), rtol=1e-5, atol=1e-5)
    for other, words in {
        Transcoder.from_weights(torch.randn(9, 4), torch.randn(9, 4)): "topk and groupmax, not 'relu'",
        Transcoder.from_weights(torch.randn(9, 4), torch.randn(9, 3), **rule): "one width",
        Transcoder.from_weights(torch.randn(9, 4), torch.randn(9, 4), normalize="rms", **rule): "normalises no",
    }.items():
        with pytest.raises(ConversionError, match=words):
            featurizers.convert(other, tmp_path / "no", to="sparsify")


@pytest.mark.parametrize(
    ("hookpoint", "sites"),
    [
        ("layers.3", "resid.pre:3 -> resid.post:3"),
        ("model.layers.3.mlp", "mlp.in:3 -> mlp.out:3"),
        ("layers.3.self_attn", None),
        ("layers.3.mlp.gate_proj", None),
    ],
)
def test_a_hookpoint_is_the_input_and_output_of_a_module(hookpoint, sites, tmp_path):
    assert featurizers.load(write(tmp_path / hookpoint, "transcode")).sites_text == sites


def test_an_old_transcoder_without_a_skip_is_told_by_its_repository(tmp_path):
    write(tmp_path / "layers.5.mlp", "skip", skip_connection=False)
    path = tmp_path / "layers.5.mlp/sae.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}  # and not mapped: it is replaced
    skip = tensors.pop("W_skip")
    save_file(tensors, path)

    def files(repo_id: str, subfolder: str | None = None, revision: str | None = None):
        return of_folder(tmp_path / (subfolder or ""), None)

    for transcode in (True, False):
        (tmp_path / "config.json").write_text(json.dumps({"transcode": transcode}))
        f, t = featurizers_resolve("owner/name/layers.5.mlp", files), golden("skip")
        if not transcode:
            assert (f.kind, str(f.site)) == ("dictionary", "mlp.out:5")
            continue
        features, error = f.featurize({"in": t["x"]}, {"out": t["y"]})
        torch.testing.assert_close(features["features"], t["features"], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(error["out"], t["x"] @ skip.T, rtol=1e-5, atol=1e-5)


def test_what_does_not_fit_is_refused(tmp_path):
    with pytest.raises(UsageError, match="compares all features"):
        featurizers.load(write(tmp_path / "a", "transcode"), indices=[1])
    with pytest.raises(WeightsError, match="its config implies"):
        featurizers.load(write(tmp_path / "b", "transcode", skip_connection=True))
    with pytest.raises(WeightsError, match="its config implies"):
        featurizers.load(write(tmp_path / "c", "skip", skip_connection=False))
