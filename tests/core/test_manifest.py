"""Damaged and hostile artefacts: each costs one error that names the folder and what is wrong, and nothing else."""

from __future__ import annotations

import json
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import featurizers
import pytest
import torch
from featurizers.errors import FeaturizerError, ManifestError, UnknownKindError, WeightsError
from featurizers.manifest import Index, Manifest, dump, parse
from safetensors.torch import load_file, save_file

from tests.support.hub import edit, subspace

ENORMOUS = 10**12


class Damage(NamedTuple):
    """What is done to a good artefact, and what loading it must then say."""

    spoil: Callable[[Path], Any]
    error: type[FeaturizerError]
    words: str


# ---------------------------------------------------------------------- ways to spoil an artefact


def _config(data: bytes | str) -> Callable[[Path], Any]:
    return lambda folder: (folder / "config.json").write_bytes(data if isinstance(data, bytes) else data.encode())


def _change(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Any]:
    def spoil(folder: Path) -> None:
        data = json.loads((folder / "config.json").read_text())
        change(data)
        (folder / "config.json").write_text(json.dumps(data))

    return spoil


def _field(name: str, value: Any) -> Callable[[Path], Any]:
    return _change(lambda data: data.update({name: value}))


def _size(**sizes: Any) -> Callable[[Path], Any]:
    return _change(lambda data: data["config"].update(sizes))


def _literal(old: str, new: str) -> Callable[[Path], Any]:
    return lambda folder: edit(folder / "config.json", old, new)


def _weights(data: bytes) -> Callable[[Path], Any]:
    return lambda folder: (folder / "model.safetensors").write_bytes(data)


def _cut(name: str, keep: int) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:keep])


def _append(name: str, data: bytes) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes() + data)


def _tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], Any]:
    def spoil(folder: Path) -> None:
        tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return spoil


def _basis(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], Any]:
    return _tensors(lambda tensors: tensors.update(basis=change(tensors["basis"]).contiguous()))


def _with(value: float) -> Callable[[Path], Any]:
    return _basis(lambda basis: basis.index_fill(0, torch.tensor(1), value))


def _header(header: bytes | dict[str, Any], size: int = 96) -> Callable[[Path], Any]:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return _weights(struct.pack("<Q", len(raw)) + raw + bytes(size))


def _tensor(dtype: Any = "F32", shape: Any = (8, 3), offsets: Any = (0, 96)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def _only_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _folder_named(name: str) -> Callable[[Path], Any]:
    def spoil(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return spoil


class _Bomb:
    """Unpickling it would end the test run."""

    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return os._exit, (3,)


DEEP = "[" * 600 + "]" * 600

WEIGHTS = {
    "empty": Damage(_weights(b""), WeightsError, r"model.safetensors \(0 bytes\) is not a whole safetensors file"),
    "seven bytes": Damage(_weights(b"\0" * 7), WeightsError, "not a whole safetensors file"),
    "no header": Damage(_weights(b"\0" * 8), WeightsError, "model.safetensors has a damaged header"),
    "cut in the header": Damage(_cut("model.safetensors", 20), WeightsError, "not a whole safetensors file"),
    "cut in the data": Damage(_cut("model.safetensors", -1), WeightsError, "has 167 bytes, its header promises 168"),
    "trailing bytes": Damage(_append("model.safetensors", b"\0"), WeightsError, "169 bytes, its header promises 168"),
    "text": Damage(_weights(b"<html>not found</html>"), WeightsError, "not a whole safetensors file"),
    "pickle": Damage(_weights(pickle.dumps(_Bomb())), WeightsError, "not a whole safetensors file"),
    "a pointer": Damage(_weights(b"version https://git-lfs.github.com/spec/v1\n"), WeightsError, "not a whole"),
    "header too long": Damage(_weights(struct.pack("<Q", 2**63) + b"{}"), WeightsError, "not a whole safetensors file"),
    "header over the limit": Damage(
        _header(b'{"basis": 1}' + b" " * 10_000_000), WeightsError, "not a whole safetensors file"
    ),
    "header not JSON": Damage(_header(b"{basis}"), WeightsError, "damaged header: Expecting property name"),
    "header not an object": Damage(_header(b"[]"), WeightsError, "damaged header"),
    "header not UTF-8": Damage(_header(b'{"\xff": 1}'), WeightsError, "damaged header: 'utf-8' codec"),
    "header deeply nested": Damage(
        _header(b'{"a":' * 100_000), WeightsError, "damaged header: it is nested too deeply"
    ),
    "header without tensors": Damage(_header({}, 0), WeightsError, r"model.safetensors lacks \['basis'\]"),
    "no offsets": Damage(_header({"basis": {"dtype": "F32", "shape": [8, 3]}}), WeightsError, "damaged header"),
    "one offset": Damage(_header({"basis": _tensor(offsets=[96])}), WeightsError, "damaged header"),
    "offsets before the data": Damage(
        _header({"basis": _tensor(offsets=[-96, 0])}, 0), WeightsError, "'-96' is not a natural number"
    ),
    "offsets too short": Damage(_header({"basis": _tensor(offsets=[0, 92])}, 92), WeightsError, "92 bytes, but 96 by"),
    "fractions": Damage(_header({"basis": _tensor(shape=[8.0, 3])}), WeightsError, "'8.0' is not"),
    "negative shape": Damage(_header({"basis": _tensor(shape=[-8, -3])}), WeightsError, "'-8' is not a natural number"),
    "unknown dtype": Damage(_header({"basis": _tensor("F4")}), WeightsError, "damaged header.*F4"),
    "dtype of another type": Damage(_header({"basis": _tensor(["F32"])}), WeightsError, "damaged header"),
    "overlapping": Damage(
        _header({"basis": _tensor(), "features.a": _tensor()}),
        WeightsError,
        "an overlap before the tensor 'features.a'",
    ),
    "overlapping, both expected": Damage(
        lambda folder: (
            _field("features", ["a"])(folder),
            _header({"basis": _tensor(), "features.a": _tensor()})(folder),
        ),
        WeightsError,
        "an overlap before the tensor 'features.a'",
    ),
    "one name twice": Damage(
        _header(b'{"basis": %b, "basis": %b}' % ((json.dumps(_tensor(shape=[3, 8])).encode(),) * 2)),
        WeightsError,
        "damaged header: the name 'basis' is repeated",
    ),
    "missing tensor": Damage(
        _tensors(lambda t: t.update(other=t.pop("basis"))),
        WeightsError,
        r"lacks \['basis'\] and has unknown \['other'\]",
    ),
    "extra tensor": Damage(_tensors(lambda t: t.update(extra=torch.ones(1))), WeightsError, r"unknown \['extra'\]"),
    "missing feature set": Damage(_field("features", ["best"]), WeightsError, r"lacks \['features.best'\]"),
    "transposed": Damage(
        _basis(lambda basis: basis.mT), WeightsError, r"'basis' has shape \[3, 8\], but its config implies \[8, 3\]"
    ),
    "one axis more": Damage(_basis(lambda basis: basis[None]), WeightsError, r"has shape \[1, 8, 3\]"),
    "integers": Damage(
        _basis(lambda basis: basis.int()), WeightsError, "'basis' is int32, but its config implies float32"
    ),
    "booleans": Damage(_basis(lambda basis: basis > 0), WeightsError, "'basis' is bool, but"),
    "NaN": Damage(_with(float("nan")), WeightsError, "tensor 'basis' holds NaN or infinity"),
    "infinity": Damage(_with(float("inf")), WeightsError, "tensor 'basis' holds NaN or infinity"),
    "minus infinity": Damage(_with(-float("inf")), WeightsError, "tensor 'basis' holds NaN or infinity"),
    "half precision NaN": Damage(_basis(lambda b: b.half() * float("nan")), WeightsError, "holds NaN or infinity"),
    "both infinities": Damage(
        _basis(lambda basis: basis.sign() * float("inf")), WeightsError, "tensor 'basis' holds NaN or infinity"
    ),
    "only pickle": Damage(
        _only_pickle, WeightsError, "model.safetensors is missing; other weight formats are not read"
    ),
    "folder": Damage(
        _folder_named("model.safetensors"), WeightsError, "model.safetensors is a folder, not a regular file"
    ),
    "wider config": Damage(_size(d_in=9), WeightsError, r"'basis' has shape \[8, 3\], but its config implies \[9, 3\]"),
    "largest config": Damage(_size(d_in=2**24, n_features=2**24), WeightsError, r"implies \[16777216, 16777216\]"),
}

CONFIG = {
    "missing": Damage(lambda folder: (folder / "config.json").unlink(), ManifestError, "there is no config.json"),
    "folder": Damage(_folder_named("config.json"), ManifestError, "config.json is a folder, not a regular file"),
    "empty": Damage(_config(""), ManifestError, "config.json is not valid JSON"),
    "truncated": Damage(_cut("config.json", 100), ManifestError, "config.json is not valid JSON"),
    "BOM": Damage(lambda f: _config(b"\xef\xbb\xbf" + (f / "config.json").read_bytes())(f), ManifestError, "BOM"),
    "not UTF-8": Damage(_config(b'{"id": "\xff"}'), ManifestError, "config.json is not valid JSON: 'utf-8' codec"),
    "UTF-16": Damage(_config('{"id": 1}'.encode("utf-16")), ManifestError, "config.json is not valid JSON"),
    "two values": Damage(_append("config.json", b"{}"), ManifestError, "config.json is not valid JSON: Extra data"),
    "list": Damage(_config("[]"), ManifestError, "config.json was not written by featurizers"),
    "null": Damage(_config("null"), ManifestError, "config.json was not written by featurizers"),
    "another library's": Damage(
        _field("library_name", "peft"), ManifestError, "there is no config.json of featurizers"
    ),
    "key twice": Damage(
        _literal('"id"', '"id": "a", "id"'), ManifestError, "config.json is not valid JSON: the key 'id' is repeated"
    ),
    "inner key twice": Damage(_literal('"d_in"', '"d_in": 8, "d_in"'), ManifestError, "the key 'd_in' is repeated"),
    "too large": Damage(_append("config.json", b" " * 1_000_000), ManifestError, "config.json is larger than 1000000"),
    "deeply nested": Damage(_config("[" * 100_000), ManifestError, "config.json is not valid JSON"),
    "deeply nested, closed": Damage(_config('{"a":' * 9_000 + "1" + "}" * 9_000), ManifestError, "not valid JSON"),
    "nested id": Damage(_literal('"id": "subspace"', f'"id": {DEEP}'), ManifestError, "nested more than 64 levels"),
    "nested size": Damage(_literal('"d_in": 8', f'"d_in": {DEEP}'), ManifestError, "nested more than 64 levels"),
    "NaN": Damage(_literal('"d_in": 8', '"d_in": NaN'), ManifestError, "NaN is not a JSON number"),
    "infinity": Damage(_literal('"d_in": 8', '"d_in": -Infinity'), ManifestError, "-Infinity is not a JSON number"),
    "NaN in metadata": Damage(_literal('"metadata": {}', '"metadata": {"x": NaN}'), ManifestError, "NaN is not a JSON"),
    "number of many digits": Damage(_literal('"d_in": 8', f'"d_in": {"9" * 5000}'), ManifestError, "config"),
    "large float": Damage(_literal('"d_in": 8', '"d_in": 1e999'), ManifestError, "'1e999' is too large"),
    "boolean size": Damage(_size(d_in=True), ManifestError, "'subspace' refuses its config: 'd_in': .*, got True"),
    "fraction": Damage(_size(d_in=8.0), ManifestError, "'d_in': .* integer, got 8.0"),
    "text size": Damage(_size(d_in="8"), ManifestError, "'d_in': .* integer, got '8'"),
    "negative size": Damage(_size(d_in=-8), ManifestError, "'d_in': .* greater than 0, got -8"),
    "zero size": Damage(_size(n_features=0), ManifestError, "'n_features': .* greater than 0, got 0"),
    "enormous size": Damage(_size(d_in=ENORMOUS, n_features=ENORMOUS), ManifestError, f"'d_in': .* got {ENORMOUS}"),
    "more features than fit": Damage(_size(n_features=9), ManifestError, "9 orthonormal directions do not fit into 8"),
    "unknown option": Damage(_size(auto_map="os.system"), ManifestError, "'auto_map': Extra inputs are not permitted"),
    "unknown key": Damage(_field("auto_map", "os.system"), ManifestError, "config.json: 'auto_map': Extra inputs"),
    "missing key": Damage(_change(lambda data: data.pop("kind")), ManifestError, "config.json: 'kind': Field required"),
    "missing option": Damage(_change(lambda data: data["config"].pop("d_in")), ManifestError, "'d_in': Field required"),
    "config not an object": Damage(_field("config", []), ManifestError, "config.json: 'config': .* dictionary"),
    "version 2": Damage(_field("format_version", 2), ManifestError, "format_version 2.*pip install -U featurizers"),
    "version '1'": Damage(_field("format_version", "1"), ManifestError, "'format_version': .*integer, got '1'"),
    "version 0": Damage(_field("format_version", 0), ManifestError, "'format_version': .* equal to 1, got 0"),
    "version null": Damage(_field("format_version", None), ManifestError, "'format_version': .*integer"),
    "kind os.system": Damage(_field("kind", "os.system"), UnknownKindError, "'os'.*the package of its author"),
    "kind torch.nn:Linear": Damage(_field("kind", "torch.nn:Linear"), ManifestError, "'kind': .*never an import path"),
    "kind with a path": Damage(_field("kind", "../subspace"), ManifestError, "'kind': .*never an import path"),
    "kind in capitals": Damage(_field("kind", "Subspace"), ManifestError, "'kind': .*never an import path"),
    "kind with a newline": Damage(_field("kind", "subspace\n"), ManifestError, "'kind': .*never an import path"),
    "kind empty": Damage(_field("kind", ""), ManifestError, "'kind': .*never an import path"),
    "kind endless": Damage(_field("kind", "a" * 500_000), ManifestError, "'kind': .*at most 128"),
    "kind not installed": Damage(_field("kind", "other"), UnknownKindError, "'other'.*the package of its author"),
    "kind a list": Damage(_field("kind", ["subspace"]), ManifestError, "'kind': .* string"),
    "empty id": Damage(_field("id", ""), ManifestError, "'id': .*at least 1 character"),
    "hash too short": Damage(_field("sha256", "ab"), ManifestError, "'sha256': "),
    "feature set outside": Damage(_field("features", ["../a"]), ManifestError, r"'features.0': "),
    "feature sets not a list": Damage(_field("features", "a"), ManifestError, "'features': .*list"),
    "site of no kind": Damage(_field("site", {"kind": "os"}), ManifestError, "config.json: unknown kind of site 'os'"),
    "site without a layer": Damage(_field("site", {"kind": "mlp.out"}), ManifestError, "'mlp.out' needs a layer"),
    "site with a boolean": Damage(_field("site", {"kind": "mlp.out", "layer": True}), ManifestError, "'site.layer'"),
    "site far away": Damage(_field("site", {"kind": "mlp.out", "layer": ENORMOUS}), ManifestError, "'site.layer'"),
    "site as text": Damage(_field("site", "mlp.out:3"), ManifestError, "'site': "),
    "escapes": Damage(_field("kind", "\x1b[2J\u202e"), ManifestError, r"got '\\x1b\[2J\\u202e'"),
    "a collection": Damage(
        _config('{"library_name": "featurizers", "artefacts": {"a": {"kind": "subspace", "id": "b"}}}'),
        ManifestError,
        "it holds 1 artefacts; name one with subfolder=, of 'a'",
    ),
    "a collection outside": Damage(
        _config('{"library_name": "featurizers", "artefacts": {"../a": {"kind": "subspace", "id": "b"}}}'),
        ManifestError,
        r"config.json: 'artefacts.../a.\[key\]': ",
    ),
    "a collection and an artefact": Damage(_field("artefacts", {}), ManifestError, "Extra inputs are not permitted"),
}

OTHERS = {
    "offset of text": Damage(_header({"basis": _tensor(offsets=[0, "96"])}), WeightsError, "damaged header"),
    "offset null": Damage(_header({"basis": _tensor(offsets=[0, None])}), WeightsError, "damaged header"),
    "not orthonormal": Damage(_basis(torch.ones_like), WeightsError, "orthonormal"),
    "version true": Damage(_field("format_version", True), ManifestError, "'format_version'"),
    "version 1.0": Damage(_field("format_version", 1.0), ManifestError, "'format_version'"),
    "infinite metadata": Damage(_literal('"metadata": {}', '"metadata": {"x": 1e999}'), ManifestError, "1e999"),
}


def _check(folder: Path, damage: Damage) -> None:
    with pytest.raises(FeaturizerError, match=damage.words) as caught:
        featurizers.load(folder)
    assert type(caught.value) is damage.error
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 800
    if damage.error is not UnknownKindError:  # what is missing is not in the folder
        assert message.startswith(f"{folder}: ")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return subspace().save_pretrained(tmp_path_factory.mktemp("whole") / "a")


@pytest.fixture
def folder(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "a"))


@pytest.mark.parametrize("damage", WEIGHTS)
def test_weights(folder, damage):
    WEIGHTS[damage].spoil(folder)
    _check(folder, WEIGHTS[damage])


@pytest.mark.parametrize("damage", CONFIG)
def test_config(folder, damage):
    CONFIG[damage].spoil(folder)
    _check(folder, CONFIG[damage])


@pytest.mark.parametrize("damage", OTHERS)
def test_what_only_looks_right(folder, damage):
    OTHERS[damage].spoil(folder)
    _check(folder, OTHERS[damage])


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_every_way_to_cut_a_file_short(folder, name):
    whole = (folder / name).read_bytes()
    for size in range(0, len(whole) - 1, 7):
        (folder / name).write_bytes(whole[:size])
        with pytest.raises((ManifestError, WeightsError), match=name):
            featurizers.load(folder)


# ---------------------------------------------------------------------- compositions


@pytest.fixture(scope="module")
def whole_composition(tmp_path_factory):
    stages = subspace() >> subspace(d_in=3, n_features=2)
    return stages.save_pretrained(tmp_path_factory.mktemp("whole") / "a")


@pytest.fixture
def composition(whole_composition, tmp_path):
    return Path(shutil.copytree(whole_composition, tmp_path / "a"))


def _stage(index: int, **changes: Any) -> Callable[[Path], Any]:
    return _change(lambda data: data["config"]["stages"][index].update(changes))


def _stage_size(index: int, **changes: Any) -> Callable[[Path], Any]:
    return _change(lambda data: data["config"]["stages"][index]["config"].update(changes))


STAGES = {
    "weights of another shape": Damage(_stage_size(0, d_in=9), WeightsError, r"'stages.0.basis' has shape \[8, 3\]"),
    "largest": Damage(_stage_size(0, d_in=2**24), WeightsError, r"implies \[16777216, 3\]"),
    "too few": Damage(_change(lambda d: d["config"]["stages"].pop()), ManifestError, "'stages': .*at least 2"),
    "too many": Damage(
        _change(lambda d: d["config"].update(stages=d["config"]["stages"] * 100)),
        ManifestError,
        "'stages': .*at most 64",
    ),
    "unknown key": Damage(_stage(0, code="x"), ManifestError, "'stages.0.code': Extra inputs"),
    "kind os.system": Damage(_stage(1, kind="os.system"), UnknownKindError, "'os'.*the package of its author"),
    "kind torch.nn:Linear": Damage(_stage(1, kind="torch.nn:Linear"), UnknownKindError, "never an import path"),
}
FAULTY_STAGES = {
    "negative": Damage(_stage_size(0, d_in=-8), ManifestError, "'d_in': .* greater than 0"),
    "enormous": Damage(_stage_size(0, d_in=ENORMOUS), ManifestError, "'d_in': "),
    "that do not fit": Damage(_stage_size(1, d_in=4), ManifestError, "cannot compose"),
    "that nest": Damage(_stage(1, kind="composition"), ManifestError, "not a composition itself"),
}


@pytest.mark.parametrize("damage", STAGES)
def test_stages(composition, damage):
    STAGES[damage].spoil(composition)
    _check(composition, STAGES[damage])


@pytest.mark.parametrize("damage", FAULTY_STAGES)
def test_faulty_stages(composition, damage):
    FAULTY_STAGES[damage].spoil(composition)
    _check(composition, FAULTY_STAGES[damage])


# ---------------------------------------------------------------------- what a kind promises of its tensors


def test_a_basis_that_is_not_orthonormal(folder):
    _basis(lambda basis: 1.1 * basis)(folder)
    with pytest.raises(FeaturizerError, match="not orthonormal"):
        featurizers.load(folder)


def test_a_deviation_that_is_not_positive(tmp_path):
    stages = featurizers.create("standardize", d_in=8) >> subspace()
    folder = stages.save_pretrained(tmp_path / "a")
    _tensors(lambda tensors: tensors["stages.0.std"].zero_())(folder)
    with pytest.raises(FeaturizerError, match="standard deviation is not positive"):
        featurizers.load(folder)


# ---------------------------------------------------------------------- the records themselves


def test_a_large_sum_is_not_taken_for_infinity(tmp_path):
    f = featurizers.create("standardize", d_in=8)
    f.mean += 3e38
    assert featurizers.load(f.save_pretrained(tmp_path / "a")).mean.equal(f.mean)


def test_a_record_is_read_as_it_was_written():
    manifest = Manifest(kind="subspace", id="a", config={"d_in": 8}, sha256="0" * 64, metadata={"é": [1.5, None]})
    assert parse(dump(manifest), "here") == manifest
    index = Index.model_validate({"artefacts": {"a/b": {"kind": "subspace", "id": "c", "site": "embed"}}})
    assert parse(dump(index), "here") == index


def test_a_config_is_readable_by_people():
    lines = dump(Manifest(kind="subspace", id="性", config={"d_in": 8}, sha256="0" * 64)).decode().splitlines()
    assert lines[:5] == [
        "{",
        '  "library_name": "featurizers",',
        '  "format_version": 1,',
        '  "kind": "subspace",',
        '  "id": "性",',
    ]
