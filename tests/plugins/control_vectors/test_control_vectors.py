"""Control vectors against the package gguf, plain torch hooks, and files that are wrong in one way each."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import featurizers
import numpy as np
import pytest
import torch
from featurizers import Ablate, Interchange, Steer
from featurizers.errors import (
    ArtefactError,
    ConversionError,
    FeaturizerError,
    LoweringError,
    ManifestError,
    WeightsError,
)

from tests.support.nnsight_models import model_of

gguf = pytest.importorskip("gguf", reason="gguf is not installed")
plugin = pytest.importorskip("featurizers_control_vectors")

IDS = torch.arange(1, 13).reshape(2, 6)


def subspace(seed: int = 0) -> featurizers.Featurizer:
    return featurizers.create("subspace", d_in=32, n_features=3, seed=seed)


def sae() -> featurizers.Featurizer:
    torch.manual_seed(1)
    tensors = {"W_enc": torch.randn(16, 32), "W_dec": torch.randn(16, 32), "b_enc": torch.randn(16)}
    return featurizers.DictionaryFeaturizer.from_tensors(**tensors, b_dec=torch.randn(32), rule="relu")


def edits() -> dict[str, Any]:
    return {
        "resid.post:2": [Steer(subspace(), delta=2.0), Steer(subspace(1), delta=torch.tensor([1.0, 0.0, -1.0]))],
        "resid.post:1": Steer(sae(), delta=3.0, indices=[4, 9]),
    }


def vectors() -> dict[str, torch.Tensor]:
    """Return what is added at each layer, by the matrices alone."""
    first, second = (subspace(seed).encode(torch.eye(32)).T for seed in (0, 1))
    return {
        "direction.1": 3.0 * sae().W_dec[[4, 9]].sum(0),
        "direction.2": 2.0 * first.sum(0) + second[0] - second[2],
    }


def test_the_package_gguf_reads_what_is_written(tmp_path: Path) -> None:
    plugin.to_gguf(edits(), path := tmp_path / "vector.gguf", model_hint="llama")
    reader = gguf.GGUFReader(path)
    texts = {name: bytes(field.parts[-1]).decode() for name, field in reader.fields.items() if "hint" in name}
    architecture = reader.fields["general.architecture"]
    assert bytes(architecture.parts[-1]).decode() == "controlvector"
    assert texts == {"controlvector.model_hint": "llama"}
    assert int(reader.fields["controlvector.layer_count"].parts[-1][0]) == 2
    found = {tensor.name: torch.tensor(np.array(tensor.data)) for tensor in reader.tensors}
    assert list(found) == ["direction.1", "direction.2"]  # block 0 has none
    for name, vector in vectors().items():
        assert torch.allclose(found[name], vector, atol=1e-5), name


def test_a_steer_of_several_layers_comes_back_as_the_same_edit_of_a_model(tmp_path: Path) -> None:
    model = model_of("llama")
    plugin.to_gguf(edits(), path := tmp_path / "vector.gguf")
    again = {site: Steer(f, delta=1.0) for site, f in plugin.read_gguf(path).items()}
    with featurizers.intervene(model, again):
        logits = model(IDS).logits
    handles = []
    for layer, vector in zip((1, 2), vectors().values(), strict=True):
        hook = lambda _, __, output, vector=vector: output + vector  # noqa: E731
        handles.append(model.model.layers[layer].register_forward_hook(hook))
    assert torch.allclose(logits, model(IDS).logits, atol=1e-5)
    for handle in handles:
        handle.remove()
    assert (logits - model(IDS).logits).abs().max() > 0.1
    plugin.to_gguf(again, other := tmp_path / "again.gguf")
    assert {n: f.W_dec.tolist() for n, f in plugin.read_gguf(other).items()} == {
        n: f.W_dec.tolist() for n, f in plugin.read_gguf(path).items()
    }


def test_a_control_vector_is_an_artefact_that_is_attached_and_back(tmp_path: Path) -> None:
    f = sae()
    f.site, f.edits = "resid.post:1", [Steer(f, delta=3.0, indices=[4, 9])]
    model = model_of("llama")
    with featurizers.intervene(model, f.edits):
        expected = model(IDS).logits
    lost = featurizers.convert(f, tmp_path / "gguf", "control-vectors")  # of sixteen features, by its edits
    assert not [sentence for sentence in lost if "edits" in sentence]
    loaded = featurizers.load(tmp_path / "gguf")
    assert torch.allclose(loaded.attach(model)({"input_ids": IDS}).logits, expected, atol=1e-4)
    again = featurizers.load(loaded.save_pretrained(tmp_path / "artefact"))
    assert torch.allclose(again.attach(model)({"input_ids": IDS}).logits, expected, atol=1e-4)
    plugin.to_gguf([again], tmp_path / "again.gguf")
    ((site, read),) = plugin.read_gguf(tmp_path / "again.gguf").items()
    assert str(site) == "resid.post:1"
    assert torch.allclose(read.W_dec[0], 3.0 * f.W_dec[[4, 9]].sum(0), atol=1e-5)


def test_a_file_that_llama_cpp_writes_is_read(tmp_path: Path) -> None:
    """The generator of llama.cpp writes a signed count and every layer but the first."""
    writer = gguf.GGUFWriter(path := tmp_path / "c.gguf", "controlvector")
    writer.add_string("controlvector.model_hint", "llama")
    writer.add_int32("controlvector.layer_count", 2)
    writer.add_array("general.tags", ["a", "b"])
    writer.add_array("general.numbers", [1, 2, 3])
    rows = torch.randn(2, 7)
    for layer, row in enumerate(rows, 1):
        writer.add_tensor(f"direction.{layer}", row.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = plugin.read_gguf(path)
    assert [str(site) for site in found] == ["resid.post:1", "resid.post:2"]
    for row, f in zip(rows, found.values(), strict=True):
        assert torch.equal(f.W_dec[0], row)
        assert torch.allclose(f.encode(2.5 * row), torch.tensor([2.5]))  # a feature is the coefficient of its direction


def test_convert_writes_one_direction_and_load_reads_it(tmp_path: Path) -> None:
    f = featurizers.create("subspace", d_in=32, n_features=1, seed=0)
    f.site = featurizers.Site("resid.post", 5)
    lost = featurizers.convert(f, tmp_path / "vector", to="control-vectors")
    assert any("How the feature is read" in sentence for sentence in lost)
    again, x = featurizers.load(str(tmp_path / "vector")), torch.randn(4, 32)
    assert again.site == f.site
    assert torch.allclose(again.steer(x, 2.0), f.steer(x, 2.0), atol=1e-6)
    assert torch.allclose(again.encode(x), f.encode(x), atol=1e-5)  # a unit vector is read as it is written


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda f: {"resid.post:0": Steer(f, delta=1.0)}, "no direction for block 0"),
        (lambda f: {"resid.pre:2": Steer(f, delta=1.0)}, "output of block N - 1"),
        (lambda f: {"mlp.out:2": Steer(f, delta=1.0)}, "outputs of blocks"),
        (lambda f: {"resid.post:2": Ablate(f)}, "depends on them"),
        (lambda f: {"resid.post:2": Interchange(f, source=torch.ones(1, 32))}, "depends on them"),
        (lambda f: {"resid.post:2": Interchange(f, source={"input_ids": IDS})}, "reads its source from the model"),
        (lambda f: {"resid.post:2": Steer(f, delta=1.0, positions=[-1])}, "has positions"),
        (lambda f: [Steer(f, delta=1.0)], "where it belongs"),
        (
            lambda f: {"resid.post:2": replace(featurizers.lower(Steer(f, delta=1.0)), special_tokens=(1,))},
            "all_tokens",
        ),
        (lambda f: {}, "no edits"),
        (
            lambda f: {
                "resid.post:1": Steer(f, delta=1.0),
                "resid.post:2": Steer(featurizers.create("identity", d_in=8), delta=1.0),
            },
            "one width",
        ),
    ],
)
def test_what_is_no_addition_to_a_block_is_refused(make: Any, reason: str, tmp_path: Path) -> None:
    with pytest.raises(LoweringError, match=reason):
        plugin.to_gguf(make(subspace()), tmp_path / "vector.gguf")
    assert not (tmp_path / "vector.gguf").exists()


def test_featurizers_that_are_no_direction_are_not_converted(tmp_path: Path) -> None:
    three, elsewhere = subspace(), featurizers.create("subspace", d_in=32, n_features=1)
    elsewhere.site = featurizers.Site("mlp.out", 3)
    for f, reason in ((three, "has 3 features"), (elsewhere, "outputs of blocks")):
        with pytest.raises(ConversionError, match=reason):
            featurizers.convert(f, tmp_path / "vector", to="control-vectors")


def test_a_file_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "vector.gguf").write_text("mine")
    with pytest.raises(ArtefactError, match="a file already"):
        plugin.to_gguf(edits(), tmp_path / "vector.gguf")
    assert (tmp_path / "vector.gguf").read_text() == "mine"


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def file_of(
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    tensors: int = 1,
    pairs: int = 1,
    metadata: bytes = text("general.architecture") + struct.pack("<I", 8) + text("controlvector"),
    places: bytes = text("direction.1") + struct.pack("<IQIQ", 1, 2, 0, 0),
    data: bytes = struct.pack("<2f", 1.0, 2.0),
) -> bytes:
    """Return a control vector of two numbers, or one that is wrong somewhere."""
    head = magic + struct.pack("<IQQ", version, tensors, pairs) + metadata + places
    return head + bytes(-len(head) % 32) + data


ARCHITECTURE = text("general.architecture") + struct.pack("<I", 8) + text("controlvector")
WRONG: dict[str, tuple[bytes, str]] = {
    "no magic": (file_of(magic=b"GGML"), "no GGUF file"),
    "version": (file_of(version=9), "version 9"),
    "architecture": (file_of(metadata=ARCHITECTURE.replace(b"controlvector", b"llamallamalla")), "no control vector"),
    "cut": (file_of()[:-3], "ends before its data"),
    "endless tensors": (file_of(tensors=1 << 62), "ends before|more than|unknown|named|axes|not UTF-8"),
    "endless pairs": (file_of(pairs=1 << 62), "ends before|unknown"),
    "endless array": (
        file_of(pairs=2, metadata=ARCHITECTURE + text("a") + struct.pack("<IIQ", 9, 0, 1 << 62)),
        "ends before",
    ),
    "endless strings": (
        file_of(pairs=2, metadata=ARCHITECTURE + text("a") + struct.pack("<IIQ", 9, 8, 1 << 62)),
        "ends before|not UTF-8",
    ),
    "array of arrays": (
        file_of(pairs=2, metadata=ARCHITECTURE + text("a") + struct.pack("<IIQ", 9, 9, 1)),
        "array of arrays",
    ),
    "long text": (file_of(metadata=struct.pack("<Q", 1 << 63)), "ends before"),
    "text": (file_of(metadata=struct.pack("<Q", 2) + b"\xff\xfe"), "not UTF-8"),
    "type": (file_of(metadata=text("a") + struct.pack("<I", 77)), "unknown type 77"),
    "alignment": (
        file_of(pairs=2, metadata=ARCHITECTURE + text("general.alignment") + struct.pack("<II", 4, 0)),
        "alignment",
    ),
    "layer 0": (file_of(places=text("direction.0") + struct.pack("<IQIQ", 1, 2, 0, 0)), "direction.0"),
    "name": (file_of(places=text("blk.0.weight") + struct.pack("<IQIQ", 1, 2, 0, 0)), "blk.0.weight"),
    "axes": (file_of(places=text("direction.1") + struct.pack("<IQQIQ", 2, 1, 2, 0, 0)), "vector of float32"),
    "many axes": (file_of(places=text("direction.1") + struct.pack("<I", 1 << 31)), "axes"),
    "float16": (file_of(places=text("direction.1") + struct.pack("<IQIQ", 1, 2, 1, 0)), "vector of float32"),
    "offset": (file_of(places=text("direction.1") + struct.pack("<IQIQ", 1, 2, 0, 1 << 60)), "ends before"),
    "width": (file_of(places=text("direction.1") + struct.pack("<IQIQ", 1, 1 << 60, 0, 0)), "ends before"),
    "no numbers": (file_of(places=text("direction.1") + struct.pack("<IQIQ", 1, 0, 0, 0)), "widths"),
    "no tensor": (file_of(tensors=0, places=b""), "widths"),
    "twice": (file_of(tensors=2, places=2 * (text("direction.1") + struct.pack("<IQIQ", 1, 2, 0, 0))), "two tensors"),
    "nan": (file_of(data=struct.pack("<2f", 1.0, float("nan"))), "NaN"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_file_is_refused_by_one_error(name: str, tmp_path: Path) -> None:
    raw, problem = WRONG[name]
    (tmp_path / "it.gguf").write_bytes(raw)
    with pytest.raises(WeightsError, match=problem):
        plugin.read_gguf(tmp_path / "it.gguf")
    with pytest.raises(FeaturizerError):
        featurizers.load(str(tmp_path))


def test_the_file_that_is_right_in_all_ways_is_read(tmp_path: Path) -> None:
    (tmp_path / "it.gguf").write_bytes(file_of())
    ((site, f),) = plugin.read_gguf(tmp_path / "it.gguf").items()
    assert (str(site), f.W_dec.tolist()) == ("resid.post:1", [[1.0, 2.0]])
    assert featurizers.load(str(tmp_path)).site == site


def test_a_vector_of_several_layers_is_no_single_featurizer(tmp_path: Path) -> None:
    plugin.to_gguf(edits(), tmp_path / "vector.gguf")
    with pytest.raises(ManifestError, match=r"2 layers.*read_gguf"):
        featurizers.load(str(tmp_path))


def test_models_in_gguf_are_left_to_others(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(FeaturizerError) as caught:
        featurizers.load(str(tmp_path))
    assert "architecture" not in str(caught.value)


def test_no_file_at_all_is_told(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="cannot be read"):
        plugin.read_gguf(tmp_path / "missing.gguf")
