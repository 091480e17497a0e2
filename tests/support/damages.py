"""Damages of a good artefact, and the error that each must cost; for the tests of the library and of the command."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import socket
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from featurizers.errors import ArtefactError, FeaturizerError, ManifestError, UnknownKindError, UsageError, WeightsError
from safetensors.torch import load_file, save_file

from tests.support.hub import edit

ENORMOUS = 10**12
DEEP = "[" * 600 + "]" * 600


Spoil = Callable[[Path], Any]
"""Damages the artefact in a folder."""


class Damage(NamedTuple):
    """A way to damage a good artefact, and the class and words of the error that loading it must then raise."""

    spoil: Spoil
    error: type[FeaturizerError]
    words: str


Rows = Mapping[str, tuple[Any, ...]]
"""For each damage, the arguments of a function that returns a `Spoil`, and then the words of the error."""


def _damages(error: type[FeaturizerError], function: Callable[..., Spoil], rows: Rows) -> dict[str, Damage]:
    return {name: Damage(function(*arguments), error, words) for name, (*arguments, words) in rows.items()}


# ---------------------------------------------------------------------- ways to spoil an artefact


def _write(name: str) -> Callable[[bytes | str], Spoil]:
    def function(data: bytes | str) -> Spoil:
        return lambda folder: (folder / name).write_bytes(data if isinstance(data, bytes) else data.encode())

    return function


_config, _weights = _write("config.json"), _write("model.safetensors")


def change(how: Callable[[dict[str, Any]], Any]) -> Spoil:
    def spoil(folder: Path) -> None:
        data = json.loads((folder / "config.json").read_text())
        how(data)
        (folder / "config.json").write_text(json.dumps(data))

    return spoil


def _field(name: str, value: Any) -> Spoil:
    return change(lambda data: data.update({name: value}))


def _options(changes: dict[str, Any]) -> Spoil:
    return change(lambda data: data["config"].update(changes))


def _literal(old: str, new: str) -> Spoil:
    return lambda folder: edit(folder / "config.json", old, new)


def _cut(name: str, keep: int) -> Spoil:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:keep])


def _append(name: str, data: bytes) -> Spoil:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes() + data)


def tensors(how: Callable[[dict[str, torch.Tensor]], Any]) -> Spoil:
    def spoil(folder: Path) -> None:
        given = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
        how(given)
        save_file(given, folder / "model.safetensors")

    return spoil


def basis(changed: Callable[[torch.Tensor], torch.Tensor]) -> Spoil:
    return tensors(lambda given: given.update(basis=changed(given["basis"]).contiguous()))


def _row_of(value: float) -> Spoil:
    return basis(lambda basis: basis.index_fill(0, torch.tensor(1), value))


def _header(header: bytes | dict[str, Any], size: int = 96) -> Spoil:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return _weights(struct.pack("<Q", len(raw)) + raw + bytes(size))


ENTRY = {"dtype": "F32", "shape": (8, 3), "data_offsets": (0, 96)}
"""The header's entry of a good artefact's only tensor, ``basis``."""


def _entry(changes: dict[str, Any], size: int = 96) -> Spoil:
    return _header({"basis": {**ENTRY, **changes}}, size)


def _shape_written(shape: str, offsets: str = "[0, 96]") -> Spoil:
    return _header(f'{{"basis": {{"dtype": "F32", "shape": {shape}, "data_offsets": {offsets}}}}}'.encode())


def _named(name: str) -> Spoil:
    return _header({name: ENTRY})


def _only_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _folder_named(name: str) -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return spoil


class _Bomb:
    """An object whose unpickling would end the test run."""

    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return os._exit, (3,)


def _fifo(name: str) -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return spoil


def _socket(name: str) -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / name).unlink()
        here = Path.cwd()
        os.chdir(folder)  # the path of a socket must be short
        try:
            with socket.socket(socket.AF_UNIX) as server:
                server.bind(name)
        finally:
            os.chdir(here)

    return spoil


def _link(name: str, target: str) -> Spoil:
    def spoil(folder: Path) -> None:
        moved = folder.parent / "elsewhere"
        moved.mkdir(exist_ok=True)
        (folder / name).rename(moved / name)
        (folder / name).symlink_to(target)

    return spoil


def _zip(folder: Path) -> None:
    with zipfile.ZipFile(folder / "model.safetensors", "w") as archive:
        archive.writestr("data.pkl", pickle.dumps(_Bomb()))


def _entries(count: int) -> bytes:
    return json.dumps({str(i): {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for i in range(count)}).encode()


# ---------------------------------------------------------------------- weights

WHOLE_FILES: Rows = {
    "empty": (b"", r"model.safetensors \(0 bytes\) is not a whole safetensors file"),
    "seven bytes": (b"\0" * 7, "not a whole safetensors file"),
    "no header": (b"\0" * 8, "model.safetensors has a damaged header"),
    "text": (b"<html>not found</html>", "not a whole safetensors file"),
    "pickle": (pickle.dumps(_Bomb()), "not a whole safetensors file"),
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\n", "not a whole"),
    "header too long": (struct.pack("<Q", 2**63) + b"{}", "not a whole safetensors file"),
    "a page": (b"<!DOCTYPE html><title>Log in", "not a whole .*: it is a web page"),
    "a pointer, said": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        "it is a Git-LFS pointer; fetch the file itself, with: git lfs pull",
    ),
    "a pickle, said": (pickle.dumps(_Bomb(), 4), "a pickle, which is never opened"),
    "nothing, said": (b"", "it is empty"),
}
HEADERS: Rows = {
    "header over the limit": (b'{"basis": 1}' + b" " * 10_000_000, "not a whole safetensors file"),
    "header not JSON": (b"{basis}", "damaged header: Expecting property name"),
    "header not an object": (b"[]", "damaged header"),
    "header not UTF-8": (b'{"\xff": 1}', "damaged header: 'utf-8' codec"),
    "header deeply nested": (b'{"a":' * 100_000, "damaged header: it is nested too deeply"),
    "header without tensors": ({}, 0, r"model.safetensors lacks \['basis'\]"),
    "header with a BOM": (b"\xef\xbb\xbf{}", "does not begin with '{'"),
    "header of UTF-16": ("{}".encode("utf-16-le"), "damaged header"),
    "hundreds of thousands of entries": (_entries(150_000), 0, r"unknown \['0', '1', "),
    "half a character": (b'{"\\ud800": 1}', "damaged header"),
    "half a character in a name": (
        b'{"\\ud800": {"dtype": "F32", "shape": [8, 3], "data_offsets": [0, 96]}}',
        "damaged head",
    ),
    "one name twice": (
        b'{"basis": %b, "basis": %b}' % ((json.dumps({**ENTRY, "shape": [3, 8]}).encode(),) * 2),
        "damaged header: the name 'basis' is repeated",
    ),
    "metadata of numbers": ({"__metadata__": {"a": 1}, "basis": ENTRY}, "__metadata__ is not an object of strings"),
    "metadata of a list": ({"__metadata__": [], "basis": ENTRY}, "__metadata__ is not"),
    "no offsets": ({"basis": {"dtype": "F32", "shape": [8, 3]}}, "damaged header"),
    "overlapping": ({"basis": ENTRY, "features.a": ENTRY}, "an overlap before the tensor 'features.a'"),
    "partly overlapping": (
        {"basis": ENTRY, "x": {"dtype": "F32", "shape": (8,), "data_offsets": (80, 112)}},
        112,
        "an overlap before",
    ),
}
ENTRIES: Rows = {
    "an unknown key of a tensor": ({"code": "x"}, "not a dtype, a"),
    "unknown dtype": ({"dtype": "F4"}, "damaged header.*F4"),
    "dtype of another type": ({"dtype": ["F32"]}, "damaged header"),
    "fractions": ({"shape": [8.0, 3]}, "'8.0' is not"),
    "negative shape": ({"shape": [-8, -3]}, "'-8' is not a natural number"),
    "true for a size": ({"shape": [True, 3]}, r"the shape \[True, 3\]"),
    "absurd shape": ({"shape": [2**62, 2**62]}, "bytes, but 8507059173023461"),
    "absurd and empty": ({"shape": [2**62, 0], "data_offsets": [0, 0]}, 0, r"shape \[4611686018427387904, 0\]"),
    "many axes": ({"shape": [1] * 3000, "data_offsets": [0, 4]}, 4, "has the shape"),
    "one offset": ({"data_offsets": [96]}, "damaged header"),
    "offsets before the data": ({"data_offsets": [-96, 0]}, 0, "'-96' is not a natural number"),
    "offsets too short": ({"data_offsets": [0, 92]}, 92, "92 bytes, but 96 by"),
    "offsets too long": ({"data_offsets": [0, 100]}, 100, "100 bytes, but 96 by"),
    "offsets far away": ({"data_offsets": [2**60, 2**60 + 96]}, "a gap before the tensor 'basis'"),
    "a hole": ({"data_offsets": [4, 100]}, 100, "a gap before the tensor 'basis'"),
    "ends before it begins": ({"data_offsets": [96, 0]}, "has -96 bytes"),
}
SHAPES_WRITTEN: Rows = {
    "header of NaN": ("[NaN, 3]", "'NaN' is not"),
    "minus zero": ("[8, 3]", "[-0, 96]", "'-0' is not"),
    "a size of many digits": (f"[{'9' * 5000}]", "damaged header"),
}
NAMES: Rows = {
    "a name that clears the screen": ("\x1b[2J\u202e", r"unknown \['\\x1b\[2J\\u202e'\]"),
    "a name that is a path": ("../../etc/passwd", r"unknown \['../../etc/passwd'\]"),
    "a name that is an attribute": ("__class__", r"unknown \['__class__'\]"),
    "an empty name": ("", r"unknown \[''\]"),
    "an endless name": ("a" * 1_000_000, "unknown .*a{70,80}"),
}
BASES: Rows = {
    "transposed": (lambda basis: basis.mT, r"'basis' has shape \[3, 8\], but its config implies \[8, 3\]"),
    "one axis more": (lambda basis: basis[None], r"has shape \[1, 8, 3\]"),
    "integers": (lambda basis: basis.int(), "'basis' is int32, but its config implies float32"),
    "booleans": (lambda basis: basis > 0, "'basis' is bool, but"),
    "half precision NaN": (lambda basis: basis.half() * float("nan"), "holds NaN or infinity"),
    "both infinities": (lambda basis: basis.sign() * float("inf"), "tensor 'basis' holds NaN or infinity"),
}
NONFINITE: Rows = {
    "NaN": (float("nan"), "tensor 'basis' holds NaN or infinity"),
    "infinity": (float("inf"), "tensor 'basis' holds NaN or infinity"),
    "minus infinity": (-float("inf"), "tensor 'basis' holds NaN or infinity"),
}
TENSORS: Rows = {
    "missing tensor": (lambda t: t.update(other=t.pop("basis")), r"lacks \['basis'\] and has unknown \['other'\]"),
    "extra tensor": (lambda t: t.update(extra=torch.ones(1)), r"unknown \['extra'\]"),
}
TOO_WIDE: Rows = {
    "wider config": ({"d_in": 9}, r"'basis' has shape \[8, 3\], but its config implies \[9, 3\]"),
    "largest config": ({"d_in": 2**24, "n_features": 2**24}, r"implies \[16777216, 16777216\]"),
}


def _overlapping_sets(folder: Path) -> None:
    _field("features", ["a"])(folder)
    _header({"basis": ENTRY, "features.a": ENTRY})(folder)


WEIGHTS = {
    **_damages(WeightsError, _weights, WHOLE_FILES),
    **_damages(WeightsError, _header, HEADERS),
    **_damages(WeightsError, _entry, ENTRIES),
    **_damages(WeightsError, _shape_written, SHAPES_WRITTEN),
    **_damages(WeightsError, _named, NAMES),
    **_damages(WeightsError, basis, BASES),
    **_damages(WeightsError, _row_of, NONFINITE),
    **_damages(WeightsError, tensors, TENSORS),
    **_damages(WeightsError, _options, TOO_WIDE),
    "cut in the header": Damage(_cut("model.safetensors", 20), WeightsError, "not a whole safetensors file"),
    "cut in the data": Damage(_cut("model.safetensors", -1), WeightsError, "has 223 bytes, its header promises 224"),
    "trailing bytes": Damage(_append("model.safetensors", b"\0"), WeightsError, "225 bytes, its header promises 224"),
    "zip": Damage(_zip, WeightsError, "it is a zip archive, such as torch.save writes"),
    "only pickle": Damage(
        _only_pickle, WeightsError, "model.safetensors is missing; other weight formats are not read"
    ),
    "folder": Damage(
        _folder_named("model.safetensors"), WeightsError, "model.safetensors is a folder, not a regular file"
    ),
    "overlapping, both expected": Damage(_overlapping_sets, WeightsError, "an overlap before the tensor 'features.a'"),
    "missing feature set": Damage(_field("features", ["best"]), WeightsError, r"lacks \['features.best'\]"),
}


# ---------------------------------------------------------------------- config.json

WHOLE_CONFIGS: Rows = {
    "empty": ("", "config.json is not valid JSON"),
    "not UTF-8": (b'{"id": "\xff"}', "config.json is not valid JSON: 'utf-8' codec"),
    "UTF-16": ('{"id": 1}'.encode("utf-16"), "config.json is not valid JSON"),
    "list": ("[]", "config.json was not written by featurizers"),
    "null": ("null", "config.json was not written by featurizers"),
    "deeply nested": ("[" * 100_000, "config.json is not valid JSON"),
    "deeply nested, closed": ('{"a":' * 9_000 + "1" + "}" * 9_000, "nested"),  # Python 3.13 reads it, older ones do not
    "a collection": (
        '{"library_name": "featurizers", "artefacts": {"a": {"kind": "subspace", "id": "b"}}}',
        "it holds 1 artefacts; name one with subfolder=, of 'a'",
    ),
    "a collection outside": (
        '{"library_name": "featurizers", "artefacts": {"../a": {"kind": "subspace", "id": "b"}}}',
        r"config.json: 'artefacts.../a.\[key\]': ",
    ),
    "a page": ("<html>Log in", "config.json is not valid JSON: it is a web page"),
    "a pointer": ("version https://git-lfs.github.com/spec/v1\n", "a Git-LFS pointer"),
    "nothing": (" \n", "config.json is not valid JSON: it is empty"),
    "a pickle": (pickle.dumps({}, 4), "it is a pickle, which is never opened"),
}
FIELDS: Rows = {
    "another library's": ("library_name", "peft", "there is no config.json of featurizers"),
    "unknown key": ("auto_map", "os.system", "config.json: 'auto_map': Extra inputs"),
    "a hostile key": ("\x1b[2J\u202e", 1, r"'\\x1b\[2J\\u202e': Extra inputs"),
    "an endless key": ("k" * 500_000, 1, "Extra inputs"),
    "weights elsewhere": ("weights", "../other.safetensors", "'weights': Extra inputs"),
    "a collection and an artefact": ("artefacts", {}, "Extra inputs are not permitted"),
    "config not an object": ("config", [], "config.json: 'config': .* dictionary"),
    "version 3": ("format_version", 3, "format_version 3.*pip install -U featurizers"),
    "version 2 without reads": ("format_version", 2, "format_version 2 has reads and writes and no site"),
    "reads in version 1": ("reads", {}, "format_version 1 has a site and no reads or writes"),
    "version '1'": ("format_version", "1", "'format_version': .*integer, got '1'"),
    "version 0": ("format_version", 0, "'format_version': .* equal to 1, got 0"),
    "version null": ("format_version", None, "'format_version': .*integer"),
    "minus zero for a version": ("format_version", -1, "'format_version': .*, got -1"),
    "kind torch.nn:Linear": ("kind", "torch.nn:Linear", "'kind': .*never an import path"),
    "kind with a path": ("kind", "../subspace", "'kind': .*never an import path"),
    "kind in capitals": ("kind", "Subspace", "'kind': .*never an import path"),
    "kind with a newline": ("kind", "subspace\n", "'kind': .*never an import path"),
    "kind empty": ("kind", "", "'kind': .*never an import path"),
    "kind endless": ("kind", "a" * 500_000, "'kind': .*at most 128"),
    "kind a list": ("kind", ["subspace"], "'kind': .* string"),
    "escapes": ("kind", "\x1b[2J\u202e", r"got '\\x1b\[2J\\u202e'"),
    "empty id": ("id", "", "'id': .*at least 1 character"),
    "hash too short": ("sha256", "ab", "'sha256': "),
    "a feature set twice": ("features", ["a", "a"], "'features': .*named twice"),
    "feature set outside": ("features", ["../a"], r"'features.0': "),
    "a file name for a set": ("features", ["a/b"], "'features.0': "),
    "feature sets not a list": ("features", "a", "'features': .*list"),
    "site of no kind": ("site", {"kind": "os"}, "config.json: unknown kind of site 'os'"),
    "site without a layer": ("site", {"kind": "mlp.out"}, "'mlp.out' needs a layer"),
    "site with a boolean": ("site", {"kind": "mlp.out", "layer": True}, "'site.layer'"),
    "site far away": ("site", {"kind": "mlp.out", "layer": ENORMOUS}, "'site.layer'"),
    "site as text": ("site", "mlp.out:3", "'site': "),
}
OPTIONS: Rows = {
    "boolean size": ({"d_in": True}, "'subspace' refuses its config: 'd_in': .*, got True"),
    "fraction": ({"d_in": 8.0}, "'d_in': .* integer, got 8.0"),
    "text size": ({"d_in": "8"}, "'d_in': .* integer, got '8'"),
    "negative size": ({"d_in": -8}, "'d_in': .* greater than 0, got -8"),
    "zero size": ({"n_features": 0}, "'n_features': .* greater than 0, got 0"),
    "enormous size": ({"d_in": ENORMOUS, "n_features": ENORMOUS}, f"'d_in': .* got {ENORMOUS}"),
    "a size in bytes": ({"d_in": 2**63}, "'d_in': "),
    "more features than fit": ({"n_features": 9}, "9 orthonormal directions do not fit into 8"),
    "unknown option": ({"auto_map": "os.system"}, "'auto_map': Extra inputs are not permitted"),
}
LITERALS: Rows = {
    "key twice": ('"id"', '"id": "a", "id"', "config.json is not valid JSON: the key 'id' is repeated"),
    "inner key twice": ('"d_in"', '"d_in": 8, "d_in"', "the key 'd_in' is repeated"),
    "half a character": ('"id": "subspace"', r'"id": "\ud800"', "'id': "),
    "nested id": ('"id": "subspace"', f'"id": {DEEP}', "nested more than 64 levels"),
    "nested size": ('"d_in": 8', f'"d_in": {DEEP}', "nested more than 64 levels"),
    "deep lists in metadata": ('"metadata": {}', f'"metadata": {{"x": {"[" * 70 + "]" * 70}}}', "more than 64 levels"),
    "NaN": ('"d_in": 8', '"d_in": NaN', "NaN is not a JSON number"),
    "NaN in metadata": ('"metadata": {}', '"metadata": {"x": NaN}', "NaN is not a JSON"),
    "infinity": ('"d_in": 8', '"d_in": -Infinity', "-Infinity is not a JSON number"),
    "large float": ('"d_in": 8', '"d_in": 1e999', "'1e999' is too large"),
    "number of many digits": ('"d_in": 8', f'"d_in": {"9" * 5000}', "config"),
    "an endless version": ('"format_version": 1', f'"format_version": {"9" * 4000}', "ormat"),
}
KINDS: Rows = {
    "kind os.system": ("kind", "os.system", "'os'.*the package of its author"),
    "kind not installed": ("kind", "other", "'other'.*the package of its author"),
}
LACKING: Rows = {
    "missing key": (lambda data: data.pop("kind"), "config.json: 'kind': Field required"),
    "missing option": (lambda data: data["config"].pop("d_in"), "'d_in': Field required"),
}


def _with_a_bom(folder: Path) -> None:
    _config(b"\xef\xbb\xbf" + (folder / "config.json").read_bytes())(folder)


CONFIG = {
    **_damages(ManifestError, _config, WHOLE_CONFIGS),
    **_damages(ManifestError, _field, FIELDS),
    **_damages(ManifestError, _options, OPTIONS),
    **_damages(ManifestError, _literal, LITERALS),
    **_damages(UnknownKindError, _field, KINDS),
    **_damages(ManifestError, change, LACKING),
    "missing": Damage(lambda folder: (folder / "config.json").unlink(), ManifestError, "there is no config.json"),
    "folder": Damage(_folder_named("config.json"), ManifestError, "config.json is a folder, not a regular file"),
    "truncated": Damage(_cut("config.json", 100), ManifestError, "config.json is not valid JSON"),
    "two values": Damage(_append("config.json", b"{}"), ManifestError, "config.json is not valid JSON: Extra data"),
    "too large": Damage(_append("config.json", b" " * 1_000_000), ManifestError, "config.json is larger than 1000000"),
    "BOM": Damage(_with_a_bom, ManifestError, "it begins with a byte-order mark"),
}

OTHERS = {
    "offset of text": Damage(_entry({"data_offsets": [0, "96"]}), WeightsError, "damaged header"),
    "offset null": Damage(_entry({"data_offsets": [0, None]}), WeightsError, "damaged header"),
    "not orthonormal": Damage(basis(torch.ones_like), WeightsError, "orthonormal"),
    "version true": Damage(_field("format_version", True), ManifestError, "'format_version'"),
    "version 1.0": Damage(_field("format_version", 1.0), ManifestError, "'format_version'"),
    "infinite metadata": Damage(_literal('"metadata": {}', '"metadata": {"x": 1e999}'), ManifestError, "1e999"),
}

SPECIAL = {
    f"{what}: {name}": damage
    for name, error in (("config.json", ManifestError), ("model.safetensors", WeightsError))
    for what, damage in {
        "pipe": Damage(_fifo(name), error, f"{name} is a named pipe, not a regular file"),
        "socket": Damage(_socket(name), error, f"{name} is a socket, not a regular file"),
        "link out": Damage(_link(name, f"../elsewhere/{name}"), ArtefactError, f"{name} is a link out of this folder"),
        "absolute link out": Damage(_link(name, "/etc/hostname"), ArtefactError, "link out of this folder, to '/etc"),
        "device": Damage(
            _link(name, "/dev/zero"), ArtefactError, f"{name} is a link out of this folder, to '/dev/zero'"
        ),
    }.items()
} | {
    "weights: a link to nothing": Damage(
        _link("model.safetensors", "none"), WeightsError, "model.safetensors is missing"
    ),
    "weights: a link to itself": Damage(
        _link("model.safetensors", "model.safetensors"), ArtefactError, "model.safetensors cannot be read"
    ),
    "card: a link out": Damage(_link("README.md", "/etc/hostname"), ArtefactError, "README.md is a link out of this"),
}
"""Files of the folder that are not regular files in it."""


# ---------------------------------------------------------------------- a pyvene model


def _of_json(how: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Any]:
    def spoil(folder: Path) -> None:
        data = json.loads((folder / "intervenable.json").read_text())
        how(data)
        (folder / "intervenable.json").write_text(json.dumps(data))

    return spoil


def _place(**fields: Any) -> Callable[[Path], Any]:
    return _of_json(lambda data: data["representations"][0].update(fields))


def _intervention(number: int, **fields: Any) -> Callable[[Path], Any]:
    return _of_json(lambda data: data["interventions"][number].update(fields))


def _argument(number: int, **fields: Any) -> Callable[[Path], Any]:
    return _of_json(lambda data: data["interventions"][number]["config"].update(fields))


def _written(text: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / "intervenable.json").write_text(text)


def _json_literal(old: str, new: str) -> Callable[[Path], Any]:
    return lambda folder: edit(folder / "intervenable.json", old, new)


def _own_tensors(**tensors: torch.Tensor) -> Callable[[Path], Any]:
    """Replace the interventions' own tensors, and their checksum in the record."""

    def spoil(folder: Path) -> None:
        path = folder / "intervenable.safetensors"
        save_file({name.replace("_", "."): tensor for name, tensor in tensors.items()}, path)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        _of_json(lambda data: data.update(sha256=digest))(folder)

    return spoil


def _flip(name: str) -> Callable[[Path], Any]:
    def spoil(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))

    return spoil


def _gone(name: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).unlink()


def _swapped(folder: Path) -> None:
    first, other = folder / "featurizer-0", folder / "featurizer-2"
    first.rename(folder / "x")
    other.rename(first)
    (folder / "x").rename(other)


GATE = "3_gate_logits"

INTERVENABLE = {
    "no record": Damage(_gone("intervenable.json"), ManifestError, "intervenable.json cannot be read"),
    "nothing": Damage(_written(""), ManifestError, "intervenable.json is not valid JSON: it is empty"),
    "cut": Damage(_cut("intervenable.json", 300), ManifestError, "intervenable.json is not valid JSON"),
    "a page": Damage(_written("<html>"), ManifestError, "it is a web page"),
    "a list": Damage(_written("[]"), ManifestError, 'intervenable.json lacks "library_name"'),
    "another library": Damage(_of_json(lambda d: d.update(library_name="x")), ManifestError, 'lacks "library_name"'),
    "too large": Damage(_append("intervenable.json", b" " * 1_000_000), ManifestError, "larger than 1000000 bytes"),
    "deeply nested": Damage(_argument(0, x=json.loads("[" * 70 + "]" * 70)), ManifestError, "more than 64 levels"),
    "a key twice": Damage(
        _json_literal('"mode": "parallel"', '"mode": "serial", "mode": "parallel"'), ManifestError, "'mode' is repeated"
    ),
    "newer": Damage(
        _of_json(lambda d: d.update(format_version=2)), ManifestError, "format_version 2.*pip install -U featurizers"
    ),
    "version true": Damage(_of_json(lambda d: d.update(format_version=True)), ManifestError, "'format_version'"),
    "an unknown key": Damage(_of_json(lambda d: d.update(auto_map="x")), ManifestError, "'auto_map': Extra inputs"),
    "an unknown mode": Damage(_of_json(lambda d: d.update(mode="x")), ManifestError, "'mode'"),
    "fast 1": Damage(_of_json(lambda d: d.update(use_fast=1)), ManifestError, "'use_fast'"),
    "no places": Damage(_of_json(lambda d: d.update(representations=[])), ManifestError, "'representations'"),
    "no featurizers": Damage(_of_json(lambda d: d.update(featurizers=[])), ManifestError, "'featurizers'"),
    "an intervention at no place": Damage(
        _of_json(lambda d: d["interventions"].extend([d["interventions"][0]] * 4000)),
        ManifestError,
        "the intervention 4 is at no place",
    ),
    "many parts, and the last is wrong": Damage(
        _argument(0, subspace_partition=[[0, 5]] * 80_000 + [[6]]), ManifestError, "feature index 6 is out of rang"
    ),
    "20000 places": Damage(
        _of_json(lambda d: d.update(representations=d["representations"] * 5000)), ManifestError, "larger than 1000000"
    ),
    "numbers of 10**9": Damage(
        _place(max_number_of_units=10**9, low_rank_dimension=10**9, layer=10**9), ManifestError, "less than or equal"
    ),
    "a key of a place": Damage(
        _place(intervention_type="os.system"), ManifestError, "'.*intervention_type': Extra inp"
    ),
    "a negative layer": Damage(_place(layer=-1), ManifestError, "'representations.0.layer': .* equal to 0"),
    "a layer far away": Damage(_place(layer=99), UsageError, "pyvene cannot place it in a GPT2LMHeadModel: IndexError"),
    "no units": Damage(_place(max_number_of_units=0), ManifestError, "'representations.0.max_number_of_units'"),
    "an unknown unit": Damage(_place(unit="t"), ManifestError, "'pos', 'h' or 'h.pos'"),
    "a component with code": Damage(
        _place(component="__class__.output"), ManifestError, "a component is a name of pyv"
    ),
    "a component with a call": Damage(_place(component="a().output"), ManifestError, "a component is a name of pyvene"),
    "a component without a side": Damage(_place(component="transformer.h[1]"), UsageError, "pyvene cannot place it"),
    "a component that there is not": Damage(_place(component="nowhere"), UsageError, "pyvene cannot place it"),
    "an intervention too far": Damage(_place(intervention=4), ManifestError, "there is no intervention 4; there are 4"),
    "an intervention below": Damage(_place(intervention=-1), ManifestError, "'representations.0.intervention'"),
    "a group alone": Damage(_place(group_key=1), ManifestError, "group_key is given to all representations"),
    "groups out of order": Damage(
        _of_json(lambda d: [r.update(group_key=-i) for i, r in enumerate(d["representations"])]),
        ManifestError,
        "group_key is given to all representations, as numbers or as strings in order",
    ),
    "groups of two types": Damage(
        _of_json(lambda d: [r.update(group_key=("1", 1)[i % 2]) for i, r in enumerate(d["representations"])]),
        ManifestError,
        "group_key is given to all representations",
    ),
    "a link to another": Damage(
        _of_json(lambda d: [r.update(intervention_link_key=0) for r in d["representations"]]),
        ManifestError,
        "representation 1 has the intervention 1, but is linked to a place that has 0",
    ),
    "a class path": Damage(_intervention(0, kind="os.system"), UnknownKindError, "intervention 'os.system'"),
    "a kind in capitals": Damage(_intervention(0, kind="Mask"), UnknownKindError, "never an import path"),
    "a kind that no plugin has": Damage(_intervention(0, kind="other"), UnknownKindError, "the package of its author"),
    "a kind that its plugin lacks": Damage(
        _intervention(0, kind="subspace.x"), UnknownKindError, "'subspace' registers no intervention of that name"
    ),
    "another kind": Damage(
        _intervention(3, kind="interchange"), ManifestError, "the intervention 'interchange': 'temperature': Extra inp"
    ),
    "a featurizer too far": Damage(
        _intervention(0, featurizer=3), ManifestError, "there is no featurizer 3; there are 3"
    ),
    "a featurizer below": Damage(_intervention(0, featurizer=-1), ManifestError, "'interventions.0.featurizer'"),
    "a featurizer elsewhere": Damage(
        _of_json(lambda d: d["featurizers"][0].update(subfolder="../x")), ManifestError, "'featurizers.0.subfolder'"
    ),
    "a featurizer at an absolute path": Damage(
        _of_json(lambda d: d["featurizers"][0].update(subfolder="/etc")), ManifestError, "'featurizers.0.subfolder'"
    ),
    "a featurizer that there is not": Damage(
        _of_json(lambda d: d["featurizers"][0].update(subfolder="x")), ManifestError, "x: there is no config.json"
    ),
    "two in one subfolder": Damage(
        _of_json(lambda d: d["featurizers"][0].update(subfolder="featurizer-1")), ManifestError, "in one subfolder"
    ),
    "a part too far": Damage(
        _argument(0, subspace_partition=[[0, 6]]), ManifestError, "feature index 6 is out of rang"
    ),
    "a part below": Damage(_argument(0, subspace_partition=[[-1]]), ManifestError, "subspace_partition"),
    "a part twice over": Damage(
        _argument(0, subspace_partition=[[1, 1]]), ManifestError, "index 1 .*more than once|rep"
    ),
    "parts of text": Damage(_argument(0, subspace_partition="0"), ManifestError, "'subspace_partition'"),
    "an unknown argument": Damage(_argument(0, code="x"), ManifestError, "'code': Extra inputs"),
    "a temperature NaN": Damage(
        _json_literal('"temperature": 0.3', '"temperature": NaN'), ManifestError, "NaN is not a JSON number"
    ),
    "a temperature of zero": Damage(_argument(3, temperature=0), ManifestError, "'temperature': .* greater than 0"),
    "a temperature of text": Damage(_argument(3, temperature="1"), ManifestError, "'temperature'"),
    "hard as a number": Damage(_argument(3, hard=1), ManifestError, "'hard': "),
    "no arguments": Damage(_intervention(3, config={}), ManifestError, "'temperature': Field required"),
    "another checksum": Damage(_of_json(lambda d: d.update(sha256="0" * 64)), WeightsError, "has sha256"),
    "another checksum of a featurizer": Damage(
        _of_json(lambda d: d["featurizers"][1].update(sha256="0" * 64)),
        ManifestError,
        "featurizer-1 holds another featurizer than was saved",
    ),
    "featurizers changed places": Damage(
        _swapped, ManifestError, "featurizer-0 holds another featurizer than was saved"
    ),
    "a flipped bit": Damage(_flip("intervenable.safetensors"), WeightsError, "intervenable.safetensors has sha256"),
    "a flipped bit in a featurizer": Damage(
        _flip("featurizer-1/model.safetensors"), WeightsError, "model.safetensors has sha256"
    ),
    "no tensors": Damage(_gone("intervenable.safetensors"), WeightsError, "intervenable.safetensors is missing"),
    "tensors cut": Damage(_cut("intervenable.safetensors", -1), WeightsError, "intervenable.safetensors has .* bytes"),
    "no featurizer": Damage(_gone("featurizer-1/config.json"), ManifestError, "there is no config.json"),
    "no weights": Damage(_gone("featurizer-1/model.safetensors"), WeightsError, "model.safetensors is missing"),
    "a gate too long": Damage(
        _own_tensors(**{GATE: torch.zeros(6)}),
        WeightsError,
        "'3.gate.logits' has shape .6., but its config implies .5.",
    ),
    "a gate of numbers": Damage(
        _own_tensors(**{GATE: torch.zeros(5, dtype=torch.int64)}),
        WeightsError,
        "is int64, but its config implies float",
    ),
    "a gate NaN": Damage(_own_tensors(**{GATE: torch.full((5,), float("nan"))}), WeightsError, "holds NaN"),
    "a gate of another": Damage(
        _own_tensors(**{"2_gate_logits": torch.zeros(5)}),
        WeightsError,
        r"intervenable.safetensors lacks \['3.gate.logits'\] and has unknown .*; its intervenable.json is of another",
    ),
    "no gate": Damage(_own_tensors(), WeightsError, r"lacks \['3.gate.logits'\]"),
    "record: pipe": Damage(_fifo("intervenable.json"), ManifestError, "intervenable.json is a named pipe"),
    "tensors: pipe": Damage(
        _fifo("intervenable.safetensors"), WeightsError, "intervenable.safetensors is a named pipe"
    ),
    "record: link out": Damage(
        _link("intervenable.json", "../elsewhere/intervenable.json"), ArtefactError, "is a link out of this folder"
    ),
    "tensors: link out": Damage(
        _link("intervenable.safetensors", "../elsewhere/intervenable.safetensors"),
        ArtefactError,
        "intervenable.safetensors is a link out of this folder",
    ),
}
"""Damages of what `tests.support.intervenables.several` returns, saved."""


# ---------------------------------------------------------------------- triplets and bundles of CausalAbstraction

UNIT = "ResidualStream(Layer-7,Token-last_token)"
STATE, INFO = "state_dict", "model_info"
ORIGINAL, BASE = "rotate.parametrizations.weight.original", "rotate.parametrizations.weight.0.base"


def triplet(how: Callable[[dict[str, Any]], Any], *parts: str) -> Callable[[Path], Any]:
    """Change the contents of a unit's files: those named, or else the featurizer's and the inverse's."""

    def spoil(folder: Path) -> None:
        for part in parts or ("featurizer", "inverse_featurizer"):
            path = folder / f"{UNIT}_{part}"
            given = torch.load(path, weights_only=True)
            changed = how(given)
            torch.save(changed if isinstance(changed, list) else given, path)

    return spoil


def _info(*parts: str, **values: Any) -> Callable[[Path], Any]:
    return triplet(lambda given: given[INFO].update(values), *parts)


def _state(how: Callable[[torch.Tensor], torch.Tensor], name: str = BASE, *parts: str) -> Callable[[Path], Any]:
    return triplet(lambda given: given[STATE].update({name: how(given[STATE][name])}), *parts)


def _option(**values: Any) -> Callable[[Path], Any]:
    return triplet(lambda given: given[INFO]["additional_config"].update(values))


def _indices(text: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / f"{UNIT}_indices").write_text(text)


def _file(data: bytes, part: str = "featurizer") -> Callable[[Path], Any]:
    return lambda folder: (folder / f"{UNIT}_{part}").write_bytes(data)


def _gone(*parts: str) -> Callable[[Path], Any]:
    return lambda folder: [(folder / f"{UNIT}_{part}").unlink() for part in parts]


def _as_identity(given: dict[str, Any]) -> None:
    classes = ("IdentityFeaturizerModule", "IdentityInverseFeaturizerModule")
    given[INFO] |= {"featurizer_class": classes[0], "inverse_featurizer_class": classes[1], "additional_config": {}}


def _code(given: dict[str, Any]) -> list[Any]:
    return [given, _Bomb()]


TRIPLETS = {
    "no inverse": Damage(
        _gone("inverse_featurizer"), ManifestError, "_inverse_featurizer' is missing; a unit needs both"
    ),
    "no featurizer": Damage(_gone("featurizer"), ManifestError, "_featurizer' is missing; a unit needs both"),
    "a list alone": Damage(
        _gone("featurizer", "inverse_featurizer"), ManifestError, "a list of features but no featurizer that has them"
    ),
    "the inverse of another": Damage(
        _state(lambda base: base.flip(0), BASE, "inverse_featurizer"),
        WeightsError,
        "the rotation of the inverse differs",
    ),
    "another matrix": Damage(
        triplet(lambda given: given[INFO]["additional_config"]["rotation_matrix"].neg_()),
        WeightsError,
        "the rotation of the rotation_matrix differs from the",
    ),
    "a matrix of another shape": Damage(
        _option(rotation_matrix=torch.ones(2, 2)), WeightsError, r"the rotation, \(6, 3\)"
    ),
    "a matrix of integers": Damage(
        _option(rotation_matrix=torch.ones(6, 3, dtype=torch.int)),
        WeightsError,
        r"no matrix of the shape of the rotation, \(6, 3\)",
    ),
    "no matrix": Damage(_option(rotation_matrix=None), WeightsError, "the rotation_matrix is no matrix"),
    "another option": Damage(
        _option(code="os.system"), ManifestError, "must hold rotation_matrix and requires_grad, not"
    ),
    "requires_grad of text": Damage(_option(requires_grad="yes"), ManifestError, "rotation_matrix and requires_grad"),
    "two descriptions": Damage(
        _info("inverse_featurizer", n_features=2), ManifestError, "describe different featurizers"
    ),
    "not orthonormal": Damage(
        triplet(
            lambda given: (
                given[STATE][BASE].mul_(2.0),
                given[INFO]["additional_config"]["rotation_matrix"].mul_(2.0),
            )
        ),
        WeightsError,
        "not orthonormal",
    ),
    "decayed to nothing": Damage(
        triplet(
            lambda given: (
                given[STATE][ORIGINAL].fill_diagonal_(-0.9999),
                given[INFO]["additional_config"]["rotation_matrix"].zero_(),
            )
        ),
        WeightsError,
        "not orthonormal",
    ),
    "NaN in the base": Damage(
        _state(lambda base: base * float("nan")), WeightsError, "differs from the featurizer's by nan"
    ),
    "transposed": Damage(_state(lambda original: original.mT.contiguous(), ORIGINAL), WeightsError, r"\(3, 6\)"),
    "a narrow base": Damage(_state(lambda base: base[:5, :5].clone()), WeightsError, r"\(6, 3\) and \(5, 5\)"),
    "a vector": Damage(_state(lambda base: base[0].clone()), WeightsError, "is not a matrix of real numbers"),
    "integers": Damage(_state(lambda base: base.int()), WeightsError, "is not a matrix of real numbers"),
    "no base": Damage(triplet(lambda given: given[STATE].pop(BASE)), WeightsError, "the state of a rotation holds"),
    "one tensor more": Damage(
        triplet(lambda given: given[STATE].update(x=torch.ones(1))), WeightsError, "the state of a rotation holds"
    ),
    "a number for a state": Damage(triplet(lambda given: given.update(state_dict=3)), WeightsError, "not 'int'"),
    "fewer features": Damage(_info(n_features=2), WeightsError, "says 2 features, but the rotation has 3 columns"),
    "no number of features": Damage(_info(n_features=None), WeightsError, "says None features"),
    "true features": Damage(_info(n_features=True), ManifestError, "invalid n_features: True"),
    "minus one features": Damage(_info(n_features=-1), ManifestError, "invalid n_features: -1"),
    "features without end": Damage(_info(n_features=10**30), WeightsError, "a number of more than 64 bits"),
    "a class of its own": Damage(
        _info(featurizer_class="MyModule"), ManifestError, "'MyModule'.*featurizer.py defines is never run"
    ),
    "a function for a class": Damage(_info(featurizer_class="os.system"), ManifestError, "'os.system'.*is never run"),
    "a number for a class": Damage(
        _info(inverse_featurizer_class=1), ManifestError, "invalid inverse_featurizer_class: 1"
    ),
    "one class of two": Damage(
        _info(featurizer_class="IdentityFeaturizerModule"), ManifestError, "'IdentityFeaturizerModule' and 'Subspace"
    ),
    "an identity with tensors": Damage(
        triplet(_as_identity), WeightsError, "it is an identity, which has neither options nor tensors"
    ),
    "an id of lists": Damage(_info(featurizer_id=[[]]), ManifestError, r"invalid featurizer_id: \[\[\]\]"),
    "an unknown key": Damage(_info(auto_map="x"), ManifestError, "model_info holds .*'auto_map'"),
    "a key is missing": Damage(
        triplet(lambda given: given[INFO].pop("n_features")), ManifestError, r"model_info holds \['featurizer_class'"
    ),
    "a list for a description": Damage(
        triplet(lambda given: given.update(model_info=[1])), ManifestError, "not 'list'"
    ),
    "a list of tensors for a description": Damage(
        triplet(lambda given: given.update(model_info=[torch.ones(2), torch.ones(2)])), ManifestError, "not 'list'"
    ),
    "a list": Damage(triplet(lambda given: [given]), WeightsError, "must hold model_info and state_dict, not 'list'"),
    "another file": Damage(triplet(lambda given: given.pop(STATE)), WeightsError, r"not \['model_info'\]"),
    "code": Damage(triplet(_code), WeightsError, "holds more than tensors, and nothing of it is run"),
    "a bare pickle": Damage(_file(pickle.dumps(_Bomb())), WeightsError, "it is a bare pickle"),
    "text": Damage(_file(b"version https://git-lfs.github.com/spec/v1\n"), WeightsError, "cannot be read"),
    "nothing": Damage(_file(b"", "inverse_featurizer"), WeightsError, "cannot be read"),
    "a folder": Damage(_folder_named(f"{UNIT}_featurizer"), ManifestError, "_featurizer' is missing"),
    "a pipe": Damage(_fifo(f"{UNIT}_featurizer"), WeightsError, "is a named pipe"),
    "a link out": Damage(_link(f"{UNIT}_indices", "/etc/hostname"), ManifestError, "is a link out of this folder"),
    "a feature too many": Damage(_indices("[0, 3]"), ManifestError, "the feature 3; there are 3, counted from 0"),
    "a negative feature": Damage(_indices("[-1]"), ManifestError, "the feature -1"),
    "a feature twice": Damage(_indices("[1, 1]"), ManifestError, "names a feature twice"),
    "a true feature": Damage(_indices("[true]"), ManifestError, "the feature True"),
    "half a feature": Damage(_indices("[0.0]"), ManifestError, "the feature 0.0"),
    "rows of features": Damage(_indices("[[0], [1]]"), ManifestError, r"the feature \[0\]"),
    "an object of features": Damage(_indices('{"0": 1}'), ManifestError, "not a list of features or null"),
    "text of features": Damage(_indices("0, 1"), ManifestError, "is not valid JSON"),
    "a list without end": Damage(_indices("[" + "0," * 600_000 + "0]"), ManifestError, "is larger than 1000000"),
    "deep lists": Damage(_indices(DEEP), ManifestError, "nested"),
}
"""Damages of a unit with three features of six dimensions, and a list of two of them."""


def skeleton(how: Callable[[dict[str, Any]], Any], name: str = "featurizers.meta.json") -> Callable[[Path], Any]:
    def spoil(folder: Path) -> None:
        data = json.loads((folder / name).read_text())
        how(data)
        (folder / name).write_text(json.dumps(data))

    return spoil


def _unit(**values: Any) -> Callable[[Path], Any]:
    return skeleton(lambda data: data[DAS].update(values), "units_metadata.json")


def _payload(how: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Any]:
    return skeleton(lambda data: how(data["skeleton"]["items"][DAS]["items"]))


DAS = "ResidualStream(Layer-3,block_output,Token-last_token)"
BUNDLES = {
    "another version": Damage(_unit(version="3.0"), ManifestError, "of version '3.0'; only '2.0' is read"),
    "another id": Damage(_unit(id="x"), ManifestError, "must give the unit its own name as id"),
    "no description": Damage(_unit(featurizer_info=None), ManifestError, "must give the unit its own name as id"),
    "a record of text": Damage(
        skeleton(lambda data: data.update({DAS: "x"}), "units_metadata.json"), ManifestError, "of version None"
    ),
    "features out of range": Damage(_unit(feature_indices=[2]), ManifestError, "the feature 2; there are 2"),
    "another id than its payload": Damage(
        _unit(featurizer_info={"id": "x", "n_features": 2, "is_trivial": False}),
        ManifestError,
        "describe different featurizers",
    ),
    "a featurizer that was not saved": Damage(
        skeleton(lambda data: data["skeleton"]["items"].pop(DAS)), ManifestError, "whose tensors were not saved"
    ),
    "a path for a unit": Damage(
        skeleton(lambda data: data["skeleton"]["items"].update({"../../x": {"__kind__": "scalar", "value": 1}})),
        ManifestError,
        "has the unit '../../x', which units_metadata.json lacks",
    ),
    "no skeleton": Damage(
        lambda folder: (folder / "featurizers.meta.json").unlink(), ManifestError, "no file 'featurizers.meta.json'"
    ),
    "no tensors": Damage(
        lambda folder: (folder / "featurizers.safetensors").unlink(), ManifestError, "'featurizers.safetensors'"
    ),
    "a newer skeleton": Damage(skeleton(lambda data: data.update(_format_version=2)), ManifestError, "of version 2"),
    "a skeleton of text": Damage(skeleton(lambda data: data.update(skeleton="x")), WeightsError, "no dict, list"),
    "a skeleton of a number": Damage(
        skeleton(lambda data: data.update(skeleton={"__kind__": "scalar", "value": 1})), ManifestError, "no featurizers"
    ),
    "a tensor that is not there": Damage(
        _payload(lambda items: items.update(model_info={"__tref__": "none"})), WeightsError, "lacks the tensor 'none'"
    ),
    "a node of no kind": Damage(
        _payload(lambda items: items.update(model_info={"__kind__": "code"})), WeightsError, "no dict, list, number"
    ),
    "a composition": Damage(
        _payload(lambda items: items.update(stages=items.pop("model_info"))), ManifestError, "compositions are not read"
    ),
    "another matrix": Damage(
        _payload(lambda items: items.update(inverse_state_dict=items["model_info"])), WeightsError, "holds 'rotate"
    ),
    "damaged tensors": Damage(
        lambda folder: (folder / "featurizers.safetensors").write_bytes(b"x" * 20), WeightsError, "not a whole"
    ),
}
"""Damages of a folder of format 2.0 whose first unit has two features."""
