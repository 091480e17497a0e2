"""Files of `torch.save`: sound ones are read, damaged and hostile ones are refused."""

from __future__ import annotations

import os
import pickle
import struct
import tarfile
import zipfile
from collections import OrderedDict
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from featurizers.errors import WeightsError
from featurizers.files import archives, pickles, torch_files
from featurizers.files.torch_files import load_torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.support.archives import (
    Maker,
    changed,
    check_limits,
    check_refused,
    edited,
    in_directory,
    linked,
    maker,
    read_or_refused,
    written,
    zipped,
)

# Instructions of a pickle.
FLOAT, OD = b"ctorch\nFloatStorage\n", b"ccollections\nOrderedDict\n)R"
V2, UNTYPED = b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch.storage\nUntypedStorage\n"


def text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def integer(value: int) -> bytes:
    raw = value.to_bytes((value.bit_length() + 8) // 8, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def group(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def storage(count: int, kind: bytes = FLOAT, key: str = "0") -> bytes:
    return group(text("storage"), kind, text(key), text("cpu"), integer(count)) + b"Q"


def tensor(
    size: tuple[int, ...], stride: tuple[int, ...], offset: int = 0, count: int = 2, hooks: bytes = OD, kind: bytes = V2
) -> bytes:
    sizes, strides = group(*map(integer, size)), group(*map(integer, stride))
    return kind + group(storage(count), integer(offset), sizes, strides, b"\x89", hooks) + b"R"


def call(function: str, *args: bytes) -> bytes:
    return b"c" + function.replace(" ", "\n").encode() + b"\n" + group(*args) + b"R"


def made(pickled: bytes, records: dict[str, bytes] | None = None) -> Maker:
    """Make a file as torch's own writer does, with a pickle of this test."""

    def write(path: Path) -> None:
        writer = torch._C.PyTorchFileWriter(str(path))
        for name, data in {"data.pkl": b"\x80\x02" + pickled + b".", "data/0": bytes(8), **(records or {})}.items():
            writer.write_record(name, data, len(data))
        writer.write_end_of_file()

    return maker(write)


def empty(*names: str, method: int = zipfile.ZIP_STORED, data: bytes = b"\x80\x02N.") -> Maker:
    """Make an archive whose files all hold a pickle of None."""
    return zipped(*((name, data) for name in names), method=method)


def saved(value: Any, **options: Any) -> Maker:
    return maker(lambda path: torch.save(value, path, **options))


def a_tar(path: Path) -> None:
    with tarfile.open(path, "w") as file:
        file.addfile(tarfile.TarInfo("storages"), BytesIO())


def metadata(state: bytes) -> bytes:
    return OD + b"}" + text("_metadata") + state + b"sb"


LAUGHS = b"]q\0" + b"(h\0h\0tq\0" * 40
KEYED = b")q\0" + b"h\0h\0\x86q\0" * 40
MORE = "holds more than tensors, and nothing of it is run"
SOUND_FILE = saved({"a": torch.arange(4.0)})
DAMAGE: dict[str, tuple[Maker, str]] = {
    # other files
    "empty": (written(b""), "it is empty"),
    "a web page": (written(b"<!doctype html><p>log in"), "it is a web page"),
    "an LFS pointer": (written(b"version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
    "JSON": (written(b'{"a": 1}'), "it is JSON"),
    "safetensors": (written(struct.pack("<Q", 40) + b'{"a":{}}'), "it is a safetensors file"),
    "noise": (written(b"\x07\x1b[31m\n" * 9), r"begins with b'\\x07\\x1b"),
    "a pickle": (written(pickle.dumps({})), "it is a bare pickle, or was saved by torch before 1.6"),
    "legacy": (saved(torch.ones(2), _use_new_zipfile_serialization=False), "saved by torch before 1.6"),
    "tar": (maker(a_tar), "it is a tar archive"),
    "a pipe": (maker(os.mkfifo), "is a named pipe, not a regular file"),
    "a device": (linked("/dev/zero"), "is a device, not a regular file"),
    "a folder": (maker(Path.mkdir), "is a folder, not a regular file"),
    "nothing": (maker(lambda _: None), "No such file"),
    "another zip": (empty("a/data"), "torch.save did not write"),
    "two folders": (empty("a/data.pkl", "b/data.pkl"), "torch.save did not write"),
    "TorchScript": (
        maker(lambda path: torch.jit.script(nn.Linear(1, 1)).save(str(path))),
        "it is a TorchScript program",
    ),
    # archives
    "cut short": (edited(SOUND_FILE, lambda raw: raw[:-40]), "cut short"),
    "only a head": (written(b"PK\x03\x04"), "cut short"),
    "appended to": (edited(SOUND_FILE, lambda raw: raw + b"x"), "extra bytes at its end"),
    "prepended to": (edited(SOUND_FILE, lambda raw: b"PK\x03\x04" + raw), "is damaged"),
    "moved directory": (
        edited(SOUND_FILE, lambda raw: raw[:-50] + struct.pack("<Q", 7) + raw[-42:]),
        "not where it should be",
    ),
    "comment": (edited(SOUND_FILE, lambda raw: raw[:-2] + b"\x09\0"), "extra bytes at its end"),
    "deflated": (empty("a/data.pkl", method=zipfile.ZIP_DEFLATED), "a compressed zip archive"),
    "encrypted": (
        edited(SOUND_FILE, in_directory(8, b"\x09\x08")),
        "is encrypted; save it again, without a password",
    ),
    "other size": (edited(SOUND_FILE, in_directory(24, b"\xff\xff\xff\x7f")), "another size than"),
    "overlap": (
        edited(SOUND_FILE, in_directory(20, struct.pack("<II", 900, 900))),
        "overlaps another file",
    ),
    "twice": (empty("a/data.pkl", "a/DATA.pkl"), "lists a file twice"),
    "a control character": (empty("a/data.pkl", "a/\x1b[31m"), r"'a/\\x1b\[31m' in it is not printable"),
    "many entries": (empty(*(f"a/{i}" for i in range(50_001)), data=b""), "it holds 50001 files"),
    "a large pickle": (empty("a/data.pkl", data=bytes(2**22 + 1)), "4194305 bytes, more than 4194304"),
    "a flipped bit": (
        edited(SOUND_FILE, lambda raw: raw.replace(b"FloatStorage", b"FloatStorag%")),
        "BadZipFile: Bad CRC-32",
    ),
    "big-endian": (made(b"N", {"byteorder": b"big"}), "on a big-endian machine"),
    "bzip2": (empty("a/data.pkl", method=zipfile.ZIP_BZIP2), "zip method 12"),
    # code, and classes
    "code": (made(call("os system", text("echo"))), f"{MORE}: 'os.system'"),
    "eval": (made(call("__builtin__ eval", text("1"))), f"{MORE}: '__builtin__.eval'"),
    "a whole module": (saved(nn.Linear(1, 1)), f"{MORE}: 'torch.nn"),
    "sparse": (saved(torch.eye(2).to_sparse()), "sparse_tensor'; save a dict of dense tensors"),
    "meta": (saved(torch.ones(2, device="meta")), "meta_tensor_no_storage'; save a dict of dense"),
    "quantized": (
        maker(lambda path: torch.save(torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.qint8), path)),
        "qtensor'; save a dict of dense tensors",
    ),
    "allocation": (made(call("torch.storage UntypedStorage", integer(2**40))), f"{MORE}: a call of"),
    "bytearray": (made(call("__builtin__ bytearray", integer(2**40))), f"{MORE}: '__builtin__.byte"),
    "a function": (made(b"}" + text("a") + V2 + b"s"), f"{MORE}: a function"),
    "numbers alone": (made(storage(2)), "data that belongs to no tensor"),
    "a name of torch's": (made(b"ctorch\nload\n"), f"{MORE}: 'torch.load'"),
    "a made-up name": (made(b"cfoo\nba\x1br\n"), r"'foo\.ba\\x1br'|Error"),
    "a very long name": (made(b"cfoo\n" + b"x" * 10**6 + b"\n"), "'foo.xxx"),
    "hooks": (made(tensor((2,), (1,), hooks=OD + text("a") + b"Ns")), "a tensor with hooks"),
    "hooks later": (
        made(b"(" + OD + b"q\1" + tensor((2,), (1,), hooks=b"h\1") + b"h\1" + text("a") + b"Nst"),
        "a tensor with hooks",
    ),
    "attributes": (made(OD + b"}" + text("items") + b"Nsb"), "an object with attributes"),
    "attributes of a tensor": (made(tensor((2,), (1,)) + b"}b"), "an object with attributes"),
    "metadata of a tensor": (
        made(tensor((2,), (1,)) + b"}" + text("_metadata") + b"}sb"),
        "an object with attributes",
    ),
    "metadata": (made(metadata(b"N")), "a dict with attributes"),
    "metadata inside": (made(metadata(b"}" + text("") + b"Ns")), "a dict with attributes"),
    # tensors
    "beyond its numbers": (made(tensor((3,), (1,))), r"shape \(3,\) and strides \(1,\) in 8 bytes"),
    "offset": (made(tensor((1,), (1,), offset=2)), "in 8 bytes"),
    "expanded": (saved(torch.ones(2).expand(10**9, 2)), "clone it before it is saved"),
    "a negative size": (made(tensor((-1,), (1,))), "impossible shape"),
    "a negative stride": (made(tensor((2,), (-1,))), "impossible shape"),
    "a negative offset": (made(tensor((1,), (1,), offset=-1)), "impossible shape"),
    "axes without strides": (made(tensor((1, 1), (1,))), "impossible shape"),
    "many axes": (made(tensor((1,) * 65, (1,) * 65)), "impossible shape"),
    "terabytes": (made(tensor((2**40,), (1,), count=2**40)), "should have 4398046511104 bytes, and has 8"),
    "no numbers": (made(storage(2, key="7")), "should have 8 bytes, and has none"),
    "numbers elsewhere": (made(storage(2, key="../0\x1b")), r"'data/\.\./0\\x1b' in it"),
    "numbers of no kind": (made(storage(2, kind=V2)), "something other than the data of a tensor"),
    "views of views": (
        made(b"]q\1(" + tensor((2**17,), (1,), count=2**17) * 40 + b"e", {"data/0": bytes(2**19)}),
        "more than ten times larger than the file",
    ),
    # bombs
    "laughs": (made(LAUGHS), "it would expand to more than 10000000 values"),
    "a long string often": (made(text("x" * 10**6) + b"q\0](" + b"h\0" * 20 + b"e"), "10000000"),
    "a tuple as key": (made(b"}" + KEYED + b"Ns"), "keys that are neither strings nor integers"),
    "a tuple among the keys": (made(b"}(" + KEYED + b"Nu"), "keys that are neither"),
    "a tensor as key": (made(b"}" + tensor((2,), (1,)) + b"Ns"), "keys that are neither"),
    "deep": (made(b"N" + b"\x85" * 65), "nested more than 64 deep"),
    "far too deep": (made(b"N" + b"\x85" * 10_000), "nested more than 64 deep"),
    "very deep": (made(b"N" + b"\x85" * 10**6), "more than 1000000 instructions"),
    "deep by parts": (
        made(b"(N" + b"\x85" * 50 + b"q\1h\1" + b"\x85" * 50 + b"t"),
        "nested more than 64 deep",
    ),
    "what holds itself": (made(b"]q\0h\0a"), "64 deep"),
    "copies of a dict": (
        made(b"](" + group(text("a"), b"N") + b"eq\1" + call("collections OrderedDict", b"h\1")),
        f"{MORE}: a call of 'collections.OrderedDict' that torch.save does not write",
    ),
    "many instructions": (made(b"]" + b"Na" * 500_001), "more than 1000000 instructions"),
    "a giant number": (made(integer(2**2000)), "a number of more than 64 bits"),
    "a giant number in words": (made(b"I" + b"9" * 10**6 + b"\n"), "cannot be read"),
    "a string that is not there": (made(b"X\xff\xff\xff\x7f"), "ValueError"),
    "half a character": (made(b"X\x03\0\0\0\xed\xa0\x80"), "UnicodeEncodeError"),
    "no end": (empty("a/data.pkl", data=b"\x80\x02N"), "cannot be read: ValueError: pickle exhausted"),
    "nothing on the stack": (made(b""), "IndexError"),
    "nothing remembered": (made(b"h\7"), "KeyError"),
    "protocol 4": (saved({}, pickle_protocol=4), "the instruction PROTO, which torch.save does not write"),
    "persistent": (made(b"K\1Q"), "something other than the data of a tensor"),
}


HOSTILE = ["laughs", "a tuple as key", "terabytes", "allocation", "bytearray", "very deep", "many entries", "a pipe"]
HOSTILE += ["a device", "views of views", "many instructions", "expanded", "quantized", "a giant number in words"]


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_or_hostile_file_is_one_clear_error(kind, tmp_path, recwarn):
    make, words = DAMAGE[kind]
    check_refused(load_torch, make(tmp_path / "ae.pt"), words, recwarn)


def test_bombs_cost_little_memory_and_time(tmp_path):
    check_limits(load_torch, {kind: DAMAGE[kind][0] for kind in HOSTILE}, tmp_path / "ae.pt", extra=2**30)


BASE = torch.arange(24.0).reshape(4, 6)
SOUND: dict[str, Any] = {
    "a tensor": BASE,
    "a dict": {"a": {"b": BASE, "c": [1, -2.5, True, None, "ü", (1, (2,)), 2**63, -(2**40)]}, "empty": {}, 7: ()},
    "a state dict": nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).state_dict(),
    "parameters": OrderedDict(a=nn.Parameter(torch.ones(3)), b=nn.Parameter(torch.ones(2), requires_grad=False)),
    "an optimizer": torch.optim.Adam([nn.Parameter(torch.ones(3))]).state_dict(),
    "shared": {"a": BASE[0], "b": BASE[1:], "c": BASE},
    "views": {"t": BASE.T, "step": BASE[::2, 1::3], "one": BASE[0].expand(1, 6), "scalar": BASE[2, 3]},
    "nothing in it": {"a": torch.zeros(0), "b": torch.zeros(3, 0, 2), "c": BASE[:0]},
    "dtypes": {
        name: torch.tensor([0, 1, 1]).to(getattr(torch, name))
        for name in [
            "float64",
            "float16",
            "bfloat16",
            "int8",
            "uint8",
            "bool",
            "int64",
            "int16",
            "int32",
            "complex64",
            "uint16",
            "float8_e4m3fn",
        ]
    },
    "descriptions": {"dtype": torch.bfloat16, "device": torch.device("cuda", 1), "shape": torch.Size([2, 3])},
}


def same(found: Any, expected: Any) -> None:
    assert type(found) is type(expected)
    if isinstance(expected, Tensor):
        assert (found.dtype, found.shape, found.device) == (expected.dtype, expected.shape, expected.device)
        assert found.requires_grad == expected.requires_grad
        assert found.tolist() == expected.tolist()
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        assert getattr(found, "_metadata", None) == getattr(expected, "_metadata", None)
        for key, value in expected.items():
            same(found[key], value)
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            same(one, other)
    else:
        assert found == expected


@pytest.mark.parametrize("kind", SOUND)
def test_what_torch_saved_is_read(kind, tmp_path):
    same(load_torch(saved(SOUND[kind])(tmp_path / "ae.pt"), "here"), SOUND[kind])


def test_tensors_are_mapped_and_share_what_they_shared(tmp_path):
    found = load_torch(saved(SOUND["shared"])(tmp_path / "ae.pt"), "here")
    assert found["a"].untyped_storage().data_ptr() == found["c"].untyped_storage().data_ptr()
    found["a"] += 1  # of this process alone
    assert torch.equal(load_torch(tmp_path / "ae.pt", "here")["a"], BASE[0])


def test_as_deep_as_may_be(tmp_path):
    value: Any = 1
    for _ in range(pickles.MAX_DEPTH):
        value = [value]
    same(load_torch(saved(value)(tmp_path / "ae.pt"), "here"), value)
    with pytest.raises(WeightsError, match="nested more than 64 deep"):
        load_torch(saved([value])(tmp_path / "ae.pt"), "here")


def test_torch_looks_again(tmp_path, monkeypatch):
    monkeypatch.setattr(torch_files.PickleReader, "check", lambda *_: None)
    with pytest.raises(WeightsError, match=r"ae\.pt cannot be read: UnpicklingError"):
        load_torch(DAMAGE["code"][0](tmp_path / "ae.pt"), "here")


def test_a_name_that_cannot_be_printed(tmp_path):
    with pytest.raises(WeightsError, match=r"'a\\x1b\.pt' cannot be read") as caught:
        load_torch(written(b"x")(tmp_path / "a\x1b.pt"), "here")
    assert str(caught.value).isprintable()


def test_limits_are_those_of_large_models():
    assert archives.MAX_ENTRIES >= 10_000
    assert torch_files.MAX_PART >= 2**20


@pytest.fixture(scope="module")
def valid(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("valid") / "ae.pt"
    state = {"ae": OrderedDict(w=BASE, b=nn.Parameter(BASE[0])), "k": 5, "names": ["a", "b"]}
    return saved(state)(path).read_bytes()


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_bytes_that_change_are_an_error_or_do_no_harm(valid, data, tmp_path_factory):
    harmless(written(changed(valid, data))(tmp_path_factory.getbasetemp() / "changed.pt"))


INSTRUCTIONS = [text("a"), text("storage"), FLOAT, OD, V2, UNTYPED, storage(2), tensor((2,), (1,)), integer(3)]
INSTRUCTIONS += [bytes([code]) for code in b"NQRbtuaes()]}\x85\x86\x87\x88\x89"] + [
    b"q\0",
    b"h\0",
    b"q\1",
    b"h\1",
    b"K\2",
]


@settings(max_examples=300, deadline=None)
@given(parts=st.lists(st.sampled_from(INSTRUCTIONS), max_size=12))
def test_any_instructions_are_an_error_or_do_no_harm(parts, tmp_path_factory):
    harmless(made(b"".join(parts))(tmp_path_factory.getbasetemp() / "instructions.pt"))


def harmless(path: Path) -> None:
    """Check that a file is refused, or that its tensors are no larger than their storages, and these than the file."""
    values = read_or_refused(load_torch, path)
    for value in values:
        if isinstance(value, Tensor):
            assert value.layout == torch.strided
            assert value.device.type == "cpu"
            assert value.numel() * value.element_size() <= value.untyped_storage().nbytes() <= path.stat().st_size
        elif isinstance(value, dict):
            values += value.values()
        elif isinstance(value, list | tuple):
            values += value
        else:
            assert value is None or isinstance(value, bool | int | float | str | torch.dtype | torch.device)
