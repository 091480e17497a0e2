"""Files of `torch.save`: what it wrote is read, and what a stranger made of one does no harm."""

from __future__ import annotations

import os
import pickle
import struct
import subprocess
import sys
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable
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

# What a pickle is made of, as instructions.
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


def made(path: Path, pickled: bytes, records: dict[str, bytes] | None = None) -> Path:
    """A file as torch's own writer makes it, around a pickle of ours."""
    writer = torch._C.PyTorchFileWriter(str(path))
    for name, data in {"data.pkl": b"\x80\x02" + pickled + b".", "data/0": bytes(8), **(records or {})}.items():
        writer.write_record(name, data, len(data))
    writer.write_end_of_file()
    return path


def zipped(path: Path, *names: str, method: int = zipfile.ZIP_STORED, data: bytes = b"\x80\x02N.") -> Path:
    with zipfile.ZipFile(path, "w", method) as file:
        for name in names:
            file.writestr(zipfile.ZipInfo(name), data, compress_type=method)
    return path


def edited(path: Path, change: Callable[[bytes], bytes]) -> Path:
    torch.save({"a": torch.arange(4.0)}, path)
    path.write_bytes(change(path.read_bytes()))
    return path


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def saved(path: Path, value: Any, **options: Any) -> Path:
    torch.save(value, path, **options)
    return path


def a_tar(path: Path) -> Path:
    with tarfile.open(path, "w") as file:
        file.addfile(tarfile.TarInfo("storages"), BytesIO())
    return path


def a_pipe(path: Path) -> Path:
    os.mkfifo(path)
    return path


def a_link(path: Path, target: str) -> Path:
    path.symlink_to(target)
    return path


def in_directory(raw: bytes, offset: int, value: bytes) -> bytes:
    """With other bytes in the first entry of the directory."""
    at = raw.index(b"PK\x01\x02") + offset
    return raw[:at] + value + raw[at + len(value) :]


def metadata(state: bytes) -> bytes:
    return OD + b"}" + text("_metadata") + state + b"sb"


LAUGHS = b"]q\0" + b"(h\0h\0tq\0" * 40
KEYED = b")q\0" + b"h\0h\0\x86q\0" * 40
MORE = "holds more than tensors, and nothing of it is run"
DAMAGE: dict[str, tuple[Callable[[Path], Path], str]] = {
    # what is no such file
    "empty": (lambda p: written(p, b""), "it is empty"),
    "a web page": (lambda p: written(p, b"<!doctype html><p>log in"), "it is a web page"),
    "an LFS pointer": (lambda p: written(p, b"version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
    "JSON": (lambda p: written(p, b'{"a": 1}'), "it is JSON"),
    "safetensors": (lambda p: written(p, struct.pack("<Q", 40) + b'{"a":{}}'), "it is a safetensors file"),
    "noise": (lambda p: written(p, b"\x07\x1b[31m\n" * 9), r"begins with b'\\x07\\x1b"),
    "a pickle": (lambda p: written(p, pickle.dumps({})), "it is a bare pickle, or was saved by torch before 1.6"),
    "legacy": (lambda p: saved(p, torch.ones(2), _use_new_zipfile_serialization=False), "saved by torch before 1.6"),
    "tar": (a_tar, "it is a tar archive"),
    "a pipe": (a_pipe, "is a named pipe, not a regular file"),
    "a device": (lambda p: a_link(p, "/dev/zero"), "is a device, not a regular file"),
    "a folder": (lambda p: p.mkdir() or p, "is a folder, not a regular file"),
    "nothing": (lambda p: p, "No such file"),
    "another zip": (lambda p: zipped(p, "a/data"), "torch.save did not write"),
    "two folders": (lambda p: zipped(p, "a/data.pkl", "b/data.pkl"), "torch.save did not write"),
    "TorchScript": (lambda p: torch.jit.script(nn.Linear(1, 1)).save(str(p)) or p, "it is a TorchScript program"),
    # archives
    "cut short": (lambda p: edited(p, lambda raw: raw[:-40]), "cut short"),
    "only a head": (lambda p: written(p, b"PK\x03\x04"), "cut short"),
    "appended to": (lambda p: edited(p, lambda raw: raw + b"x"), "something was added"),
    "prepended to": (lambda p: edited(p, lambda raw: b"PK\x03\x04" + raw), "is damaged"),
    "moved directory": (
        lambda p: edited(p, lambda raw: raw[:-50] + struct.pack("<Q", 7) + raw[-42:]),
        "not where it should be",
    ),
    "comment": (lambda p: edited(p, lambda raw: raw[:-2] + b"\x09\0"), "something was added"),
    "deflated": (lambda p: zipped(p, "a/data.pkl", method=zipfile.ZIP_DEFLATED), "a compressed zip archive"),
    "encrypted": (
        lambda p: edited(p, lambda raw: in_directory(raw, 8, b"\x09\x08")),
        "is encrypted; save it again, without a password",
    ),
    "other size": (lambda p: edited(p, lambda raw: in_directory(raw, 24, b"\xff\xff\xff\x7f")), "another size than"),
    "overlap": (
        lambda p: edited(p, lambda raw: in_directory(raw, 20, struct.pack("<II", 900, 900))),
        "overlaps another file",
    ),
    "twice": (lambda p: zipped(p, "a/data.pkl", "a/DATA.pkl"), "lists a file twice"),
    "a control character": (lambda p: zipped(p, "a/data.pkl", "a/\x1b[31m"), r"'a/\\x1b\[31m' in it is not printable"),
    "many entries": (lambda p: zipped(p, *(f"a/{i}" for i in range(50_001)), data=b""), "it holds 50001 files"),
    "a large pickle": (lambda p: zipped(p, "a/data.pkl", data=bytes(2**22 + 1)), "4194305 bytes, more than 4194304"),
    "a flipped bit": (
        lambda p: edited(p, lambda raw: raw.replace(b"FloatStorage", b"FloatStorag%")),
        "BadZipFile: Bad CRC-32",
    ),
    "big-endian": (lambda p: made(p, b"N", {"byteorder": b"big"}), "of a big-endian machine"),
    "bzip2": (lambda p: zipped(p, "a/data.pkl", method=zipfile.ZIP_BZIP2), "zip method 12"),
    # code, and classes
    "code": (lambda p: made(p, call("os system", text("echo"))), f"{MORE}: 'os.system'"),
    "eval": (lambda p: made(p, call("__builtin__ eval", text("1"))), f"{MORE}: '__builtin__.eval'"),
    "a whole module": (lambda p: saved(p, nn.Linear(1, 1)), f"{MORE}: 'torch.nn"),
    "sparse": (lambda p: saved(p, torch.eye(2).to_sparse()), "sparse_tensor'; save a dict of dense tensors"),
    "meta": (lambda p: saved(p, torch.ones(2, device="meta")), "meta_tensor_no_storage'; save a dict of dense"),
    "quantized": (
        lambda p: saved(p, torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.qint8)),
        "qtensor'; save a dict of dense tensors",
    ),
    "allocation": (lambda p: made(p, call("torch.storage UntypedStorage", integer(2**40))), f"{MORE}: a call of"),
    "bytearray": (lambda p: made(p, call("__builtin__ bytearray", integer(2**40))), f"{MORE}: '__builtin__.byte"),
    "a function": (lambda p: made(p, b"}" + text("a") + V2 + b"s"), f"{MORE}: a function"),
    "numbers alone": (lambda p: made(p, storage(2)), "numbers that are of no tensor"),
    "a name of torch's": (lambda p: made(p, b"ctorch\nload\n"), f"{MORE}: 'torch.load'"),
    "a made-up name": (lambda p: made(p, b"cfoo\nba\x1br\n"), r"'foo\.ba\\x1br'|Error"),
    "a very long name": (lambda p: made(p, b"cfoo\n" + b"x" * 10**6 + b"\n"), "'foo.xxx"),
    "hooks": (lambda p: made(p, tensor((2,), (1,), hooks=OD + text("a") + b"Ns")), "a tensor with hooks"),
    "hooks later": (
        lambda p: made(p, b"(" + OD + b"q\1" + tensor((2,), (1,), hooks=b"h\1") + b"h\1" + text("a") + b"Nst"),
        "a tensor with hooks",
    ),
    "attributes": (lambda p: made(p, OD + b"}" + text("items") + b"Nsb"), "an object with attributes"),
    "attributes of a tensor": (lambda p: made(p, tensor((2,), (1,)) + b"}b"), "an object with attributes"),
    "metadata of a tensor": (
        lambda p: made(p, tensor((2,), (1,)) + b"}" + text("_metadata") + b"}sb"),
        "an object with attributes",
    ),
    "metadata": (lambda p: made(p, metadata(b"N")), "a dict with attributes"),
    "metadata inside": (lambda p: made(p, metadata(b"}" + text("") + b"Ns")), "a dict with attributes"),
    # tensors
    "beyond its numbers": (lambda p: made(p, tensor((3,), (1,))), r"shape \(3,\) and strides \(1,\) in 8 bytes"),
    "offset": (lambda p: made(p, tensor((1,), (1,), offset=2)), "in 8 bytes"),
    "expanded": (lambda p: saved(p, torch.ones(2).expand(10**9, 2)), "clone it before it is saved"),
    "a negative size": (lambda p: made(p, tensor((-1,), (1,))), "impossible shape"),
    "a negative stride": (lambda p: made(p, tensor((2,), (-1,))), "impossible shape"),
    "a negative offset": (lambda p: made(p, tensor((1,), (1,), offset=-1)), "impossible shape"),
    "axes without strides": (lambda p: made(p, tensor((1, 1), (1,))), "impossible shape"),
    "many axes": (lambda p: made(p, tensor((1,) * 65, (1,) * 65)), "impossible shape"),
    "terabytes": (lambda p: made(p, tensor((2**40,), (1,), count=2**40)), "should have 4398046511104 bytes, and has 8"),
    "no numbers": (lambda p: made(p, storage(2, key="7")), "should have 8 bytes, and has none"),
    "numbers elsewhere": (lambda p: made(p, storage(2, key="../0\x1b")), r"'data/\.\./0\\x1b' in it"),
    "numbers of no kind": (lambda p: made(p, storage(2, kind=V2)), "something else than the numbers of a tensor"),
    "views of views": (
        lambda p: made(p, b"]q\1(" + tensor((2**17,), (1,), count=2**17) * 40 + b"e", {"data/0": bytes(2**19)}),
        "more than ten times larger than the file",
    ),
    # bombs
    "laughs": (lambda p: made(p, LAUGHS), "when they are written out"),
    "a long string often": (lambda p: made(p, text("x" * 10**6) + b"q\0](" + b"h\0" * 20 + b"e"), "10000000"),
    "a tuple as key": (lambda p: made(p, b"}" + KEYED + b"Ns"), "keys that are neither strings nor integers"),
    "a tuple among the keys": (lambda p: made(p, b"}(" + KEYED + b"Nu"), "keys that are neither"),
    "a tensor as key": (lambda p: made(p, b"}" + tensor((2,), (1,)) + b"Ns"), "keys that are neither"),
    "deep": (lambda p: made(p, b"N" + b"\x85" * 65), "more than 64 deep"),
    "far too deep": (lambda p: made(p, b"N" + b"\x85" * 10_000), "more than 64 deep"),
    "very deep": (lambda p: made(p, b"N" + b"\x85" * 10**6), "more than 1000000 instructions"),
    "deep by parts": (
        lambda p: made(p, b"(N" + b"\x85" * 50 + b"q\1h\1" + b"\x85" * 50 + b"t"),
        "more than 64 deep",
    ),
    "what holds itself": (lambda p: made(p, b"]q\0h\0a"), "64 deep"),
    "copies of a dict": (
        lambda p: made(p, b"](" + group(text("a"), b"N") + b"eq\1" + call("collections OrderedDict", b"h\1")),
        f"{MORE}: a call of 'collections.OrderedDict' that torch.save does not write",
    ),
    "many instructions": (lambda p: made(p, b"]" + b"Na" * 500_001), "more than 1000000 instructions"),
    "a giant number": (lambda p: made(p, integer(2**2000)), "a number of more than 64 bits"),
    "a giant number in words": (lambda p: made(p, b"I" + b"9" * 10**6 + b"\n"), "cannot be read"),
    "a string that is not there": (lambda p: made(p, b"X\xff\xff\xff\x7f"), "ValueError"),
    "half a character": (lambda p: made(p, b"X\x03\0\0\0\xed\xa0\x80"), "UnicodeEncodeError"),
    "no end": (lambda p: zipped(p, "a/data.pkl", data=b"\x80\x02N"), "cannot be read: ValueError: pickle exhausted"),
    "nothing on the stack": (lambda p: made(p, b""), "IndexError"),
    "nothing remembered": (lambda p: made(p, b"h\7"), "KeyError"),
    "protocol 4": (lambda p: saved(p, {}, pickle_protocol=4), "the instruction PROTO, which torch.save does not write"),
    "persistent": (lambda p: made(p, b"K\1Q"), "something else than the numbers of a tensor"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_or_hostile_file_is_one_clear_error(kind, tmp_path, recwarn):
    make, words = DAMAGE[kind]
    path = make(tmp_path / "ae.pt")
    recwarn.clear()
    with pytest.raises(WeightsError, match=words) as caught:
        load_torch(path, "here")
    message = str(caught.value)
    assert message.startswith("here: ae.pt ")
    assert message.isprintable()
    assert len(message) < 600
    assert not recwarn.list


def test_bombs_cost_little_memory_and_time(tmp_path):
    bombs = ("laughs", "a tuple as key", "terabytes", "allocation", "bytearray", "very deep", "many entries", "a pipe")
    bombs += ("a device", "views of views", "many instructions", "expanded", "quantized", "a giant number in words")
    for number, kind in enumerate(bombs):
        DAMAGE[kind][0](tmp_path / f"{number}.pt")
    code = f"""
import resource, pathlib, torch
from featurizers.errors import WeightsError
from featurizers.files.torch_files import load_torch
torch.load, grown = None, int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize() + 2**30
resource.setrlimit(resource.RLIMIT_AS, (grown, grown))
for number in range({len(bombs)}):
    try:
        load_torch(pathlib.Path({str(tmp_path)!r}, f"{{number}}.pt"), "here")
    except WeightsError as error:
        assert "MemoryError" not in str(error), error
    else:
        raise AssertionError(number)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


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
    same(load_torch(saved(tmp_path / "ae.pt", SOUND[kind]), "here"), SOUND[kind])


def test_tensors_are_mapped_and_share_what_they_shared(tmp_path):
    found = load_torch(saved(tmp_path / "ae.pt", SOUND["shared"]), "here")
    assert found["a"].untyped_storage().data_ptr() == found["c"].untyped_storage().data_ptr()
    found["a"] += 1  # of this process alone
    assert torch.equal(load_torch(tmp_path / "ae.pt", "here")["a"], BASE[0])


def test_as_deep_as_may_be(tmp_path):
    value: Any = 1
    for _ in range(pickles.MAX_DEPTH):
        value = [value]
    same(load_torch(saved(tmp_path / "ae.pt", value), "here"), value)
    with pytest.raises(WeightsError, match="more than 64 deep"):
        load_torch(saved(tmp_path / "ae.pt", [value]), "here")


def test_torch_looks_again(tmp_path, monkeypatch):
    monkeypatch.setattr(torch_files.PickleReader, "check", lambda *_: None)
    with pytest.raises(WeightsError, match=r"ae\.pt cannot be read: UnpicklingError"):
        load_torch(DAMAGE["code"][0](tmp_path / "ae.pt"), "here")


def test_a_name_that_cannot_be_printed(tmp_path):
    with pytest.raises(WeightsError, match=r"'a\\x1b\.pt' cannot be read") as caught:
        load_torch(written(tmp_path / "a\x1b.pt", b"x"), "here")
    assert str(caught.value).isprintable()


def test_limits_are_those_of_large_models():
    assert archives.MAX_ENTRIES >= 10_000
    assert torch_files.MAX_PART >= 2**20


@pytest.fixture(scope="module")
def valid(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("valid") / "ae.pt"
    return saved(path, {"ae": OrderedDict(w=BASE, b=nn.Parameter(BASE[0])), "k": 5, "names": ["a", "b"]}).read_bytes()


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_bytes_that_change_are_an_error_or_do_no_harm(valid, data, tmp_path_factory):
    at = data.draw(st.integers(0, len(valid) - 1))
    change = data.draw(st.sampled_from(["flip", "cut", "insert", "replace"]))
    few = data.draw(st.binary(min_size=1, max_size=8))
    raw = {
        "flip": valid[:at] + bytes([valid[at] ^ 1 << few[0] % 8]) + valid[at + 1 :],
        "cut": valid[:at],
        "insert": valid[:at] + few + valid[at:],
        "replace": valid[:at] + few + valid[at + len(few) :],
    }[change]
    harmless(written(tmp_path_factory.getbasetemp() / "changed.pt", raw))


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
    harmless(made(tmp_path_factory.getbasetemp() / "instructions.pt", b"".join(parts)))


def harmless(path: Path) -> None:
    """It is refused, or holds tensors that are no larger than what they lie in."""
    problem = ""
    try:
        found = [load_torch(path, "here")]
    except WeightsError as error:
        found, problem = [], str(error)
    assert problem == "" or (problem.isprintable() and len(problem) < 600)
    for value in found:
        if isinstance(value, Tensor):
            assert value.layout == torch.strided
            assert value.device.type == "cpu"
            assert value.numel() * value.element_size() <= value.untyped_storage().nbytes() <= path.stat().st_size
        elif isinstance(value, dict):
            found += value.values()
        elif isinstance(value, list | tuple):
            found += value
        else:
            assert value is None or isinstance(value, bool | int | float | str | torch.dtype | torch.device)
