"""Files of `numpy.savez`: sound ones are read, damaged and hostile ones are refused."""

from __future__ import annotations

import os
import struct
import zipfile
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from featurizers.files import numpy_files
from featurizers.files.numpy_files import load_npz
from hypothesis import given, settings
from hypothesis import strategies as st

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

ONES = np.arange(6, dtype=np.float32).reshape(2, 3)


def npy(array: Any = ONES) -> bytes:
    stream = BytesIO()
    np.lib.format.write_array(stream, np.asanyarray(array))
    return stream.getvalue()


def headed(header: str, numbers: bytes = bytes(24), version: int = 1) -> bytes:
    raw = header.encode("latin-1")
    return b"\x93NUMPY" + bytes([version, 0]) + struct.pack("<H" if version == 1 else "<I", len(raw)) + raw + numbers


def described(descr: str, shape: str = "(2, 3)", fortran: str = "False") -> str:
    return f"{{'descr': {descr}, 'fortran_order': {fortran}, 'shape': {shape}}}"


def holding(data: bytes, method: int = zipfile.ZIP_STORED) -> Maker:
    return zipped(("W.npy", data), method=method)


def saved(array: Any) -> Maker:
    return maker(lambda path: np.savez(path, W=array))


def bomb(size: int, count: int = 1) -> Maker:
    """Make an archive of zeros that decompresses to a thousand times its size."""

    def make(path: Path) -> Path:
        data = headed(described("'|u1'", f"({size},)"), bytes(size))
        return zipped(*((f"{number}.npy", data) for number in range(count)), method=zipfile.ZIP_DEFLATED)(path)

    return make


SOUND_FILE = saved(ONES)
COMPRESSED = maker(lambda path: np.savez_compressed(path, W=np.random.default_rng(0).normal(size=99)))
SHORT = headed(described("'<f4'"), bytes(8))
DAMAGE: dict[str, tuple[Maker, str]] = {
    "empty": (written(b""), "it is empty"),
    "a web page": (written(b"<!doctype html>"), "it is a web page"),
    "an LFS pointer": (written(b"version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
    "one array": (written(npy()), "it is a numpy array"),
    "noise": (written(b"\x07\x1b[31m\n" * 9), r"begins with b'\\x07\\x1b"),
    "a pipe": (maker(os.mkfifo), "is a named pipe, not a regular file"),
    "a device": (linked("/dev/zero"), "is a device, not a regular file"),
    "cut short": (edited(SOUND_FILE, lambda raw: raw[:-30]), "cut short"),
    "only a head": (written(b"PK\x03\x04 and no more"), "cut short"),
    "appended to": (edited(SOUND_FILE, lambda raw: raw + b"x"), "extra bytes at its end"),
    "moved directory": (edited(SOUND_FILE, lambda raw: raw[:-22] + bytes(8) + raw[-22:]), "not where it should be"),
    "encrypted": (edited(SOUND_FILE, in_directory(8, b"\1\0")), "is encrypted; save it again, without a password"),
    "bzip2": (holding(npy(), zipfile.ZIP_BZIP2), "zip method 12"),
    "other size": (edited(SOUND_FILE, in_directory(24, b"\xff\xff\xff\x7f")), "another size than listed"),
    "a larger size": (edited(SOUND_FILE, in_directory(20, struct.pack("<II", 153, 153))), "BadZipFile"),
    "a flipped bit": (edited(SOUND_FILE, lambda raw: raw.replace(b"\x40\x40", b"\x41\x40")), "BadZipFile: Bad CRC-32"),
    "a broken stream": (edited(COMPRESSED, lambda raw: raw[:60] + b"\xff" * 20 + raw[80:]), "cannot be read"),
    "twice": (zipped(("W.npy", npy()), ("W.npy", npy())), "lists a file twice"),
    "a path": (zipped(("../W.npy", npy())), r"'\.\./W\.npy' in it is not an array"),
    "a control character": (zipped(("\x1b[31mW.npy", npy())), r"'\\x1b\[31mW\.npy' in it is not"),
    "another suffix": (zipped(("W.txt", npy())), r"'W\.txt' in it is not an array"),
    "many arrays": (zipped(*((f"{i}.npy", b"") for i in range(1001))), "holds 1001 arrays"),
    "many files": (zipped(*((f"{i}.npy", b"") for i in range(50_001))), "it holds 50001 files"),
    "no array": (holding(b"hello"), "is not an array"),
    "nothing": (holding(b""), "is not an array"),
    "a magic alone": (holding(b"\x93NUMPY\1\0"), "struct.error|error: unpack"),
    "version 9": (holding(headed(described("'<f4'"), version=9)), "is not an array"),
    "objects": (saved(np.array([{}], dtype=object)), "an array of '.O', which are objects"),
    "structures": (saved(np.zeros(3, dtype=[("a", "f4")])), r"an array of \[\('a', '<f4'\)\], which torch does not"),
    "strings": (saved(np.array(["a"])), "an array of '<U1', which torch does not have"),
    "dates": (saved(np.array(["2020-01-01"], dtype="M8[D]")), r"which torch does not have"),
    "complex": (saved(np.zeros(2, dtype=complex)), "an array of '<c16', which torch does not have"),
    "long doubles": (saved(np.zeros(2, dtype=np.longdouble)), "an array of '<f16', which torch does not have"),
    "big-endian": (saved(np.zeros(2, dtype=">f4")), "an array of '>f4', which are big-endian"),
    "unknown key": (holding(headed(described("'<f4'")[:-1] + ", 'x': 1}")), "a header that numpy does not write"),
    "no dict": (holding(headed("[1]")), "a header that numpy does not write"),
    "a call": (holding(headed(described("__import__('os').system('true')"))), "ValueError: malformed node"),
    "no python": (holding(headed("{'descr")), "SyntaxError"),
    "nested": (holding(headed("(" * 5000)), "cannot be read"),
    "signs": (holding(headed("-" * 9000 + "1")), "cannot be read"),
    "a long header": (holding(headed(" " * 10_001, version=2)), "a header of 10001 bytes"),
    "an endless header": (holding(b"\x93NUMPY\2\0\xff\xff\xff\xff{}"), "a header of 4294967295 bytes"),
    "more numbers": (holding(headed(described("'<f4'"), bytes(25))), "by its own header, but is"),
    "fewer numbers": (holding(headed(described("'<f4'"), bytes(23))), "by its own header, but is"),
    "a stream that ends early": (
        edited(holding(SHORT, zipfile.ZIP_DEFLATED), in_directory(24, struct.pack("<I", len(SHORT) + 16))),
        "is shorter than listed",
    ),
    "exabytes": (holding(headed(described("'<f4'", "(281474976710655,) * 3"))), "ValueError: malformed node"),
    "many exabytes": (holding(headed(described("'<f4'", "(281474976710655,) "))), "should be 112589990684"),
    "a huge axis": (holding(headed(described("'<f4'", "(0, 9999999999999999999)"))), "the impossible shape"),
    "a negative axis": (holding(headed(described("'<f4'", "(-2, -3)"))), "the impossible shape"),
    "a true axis": (holding(headed(described("'<f4'", "(True, 6)"))), "the impossible shape"),
    "a broken axis": (holding(headed(described("'<f4'", "(2.0, 3)"))), "the impossible shape"),
    "a list of axes": (holding(headed(described("'<f4'", "[2, 3]"))), "the impossible shape"),
    "many axes": (holding(headed(described("'<f4'", f"({'1,' * 65})"))), "the impossible shape"),
    "an order": (holding(headed(described("'<f4'", fortran="7"))), "the impossible shape"),
    "a bomb": (bomb(2**27), "once it is decompressed, more than 67108864"),
    "more bombs": (bomb(2**24, 5), "once it is decompressed"),
}
HOSTILE = ["a bomb", "more bombs", "many exabytes", "an endless header", "many files", "a pipe", "a device", "signs"]


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_or_hostile_file_is_one_clear_error(kind, tmp_path, recwarn):
    make, words = DAMAGE[kind]
    check_refused(load_npz, make(tmp_path / "params.npz"), words, recwarn)


def test_bombs_cost_little_memory_and_time(tmp_path):
    files = {kind: DAMAGE[kind][0] for kind in HOSTILE}
    files["a bomb that claims to be small"] = edited(bomb(2**27), in_directory(24, struct.pack("<I", 1000)))
    check_limits(load_npz, files, tmp_path / "params.npz", extra=2**29, exempt=["signs"])


SOUND = {
    "float32": ONES,
    "float64": ONES.astype(np.float64),
    "float16": ONES.astype(np.float16),
    "int64": ONES.astype(np.int64),
    "uint8": ONES.astype(np.uint8),
    "uint16": ONES.astype(np.uint16),
    "bool": ONES > 2,
    "columns": np.asfortranarray(ONES),
    "columns of three axes": np.asfortranarray(np.arange(24.0).reshape(2, 3, 4)),
    "a transposed view": ONES.T,
    "a part": np.arange(30.0).reshape(5, 6)[::2, 1::2],
    "a number": np.float32(2.5),
    "nothing": np.zeros((0,), dtype=np.float32),
    "nothing of three": np.zeros((3, 0, 2), dtype=np.float32, order="F"),
}


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_what_numpy_saved_is_read(save, tmp_path):
    save(tmp_path / "params.npz", **SOUND)
    found = load_npz(tmp_path / "params.npz", "here")
    assert list(found) == list(SOUND)
    for name, array in SOUND.items():
        expected = torch.from_numpy(np.array(array))
        assert (found[name].dtype, found[name].shape) == (expected.dtype, expected.shape)
        assert torch.equal(found[name], expected)


def test_arrays_do_not_share_memory_with_the_file(tmp_path):
    np.savez(tmp_path / "params.npz", W=ONES)
    load_npz(tmp_path / "params.npz", "here")["W"] += 1
    assert torch.equal(load_npz(tmp_path / "params.npz", "here")["W"], torch.from_numpy(ONES))


def test_a_longer_header_is_read(tmp_path):
    data = headed(described("'<f4'") + " " * 3000, ONES.tobytes(), version=2)
    assert torch.equal(load_npz(holding(data)(tmp_path / "params.npz"), "here")["W"], torch.from_numpy(ONES))


def test_sparse_weights_do_not_compress_enough_to_be_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(numpy_files, "SMALL", 0)
    weights = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
    np.savez_compressed(tmp_path / "params.npz", W=weights * (weights > 1))  # most of them zero
    assert load_npz(tmp_path / "params.npz", "here")["W"].shape == (64, 64)


@pytest.fixture(scope="module", params=[np.savez, np.savez_compressed])
def valid(request, tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("valid") / "params.npz"
    request.param(path, W=ONES, b=np.asfortranarray(ONES), n=np.int64(3))
    return path.read_bytes()


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_bytes_that_change_are_an_error_or_do_no_harm(valid, data, tmp_path_factory):
    path = written(changed(valid, data))(tmp_path_factory.getbasetemp() / "changed.npz")
    for arrays in read_or_refused(load_npz, path):  # if the checksums hold, these are the arrays that were written
        for array in arrays.values():
            assert array.numel() in (1, 6)
            assert array.flatten()[-1] in (3, 5)
