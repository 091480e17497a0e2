"""Files of `numpy.savez`: what it wrote is read, and what a stranger made of one does no harm."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from featurizers.errors import WeightsError
from featurizers.files import numpy_files
from featurizers.files.numpy_files import load_npz
from hypothesis import given, settings
from hypothesis import strategies as st

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


def packed(path: Path, *entries: tuple[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w", method) as file:
        warnings.simplefilter("ignore")  # of a name that is there twice
        for name, data in entries:
            file.writestr(zipfile.ZipInfo(name), data, compress_type=method)
    return path


def holding(data: bytes, **options: Any) -> Callable[[Path], Path]:
    return lambda path: packed(path, ("W.npy", data), **options)


def changed(change: Callable[[bytes], bytes]) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        np.savez(path, W=ONES)
        path.write_bytes(change(path.read_bytes()))
        return path

    return make


def in_directory(offset: int, value: bytes) -> Callable[[bytes], bytes]:
    def change(raw: bytes) -> bytes:
        at = raw.rindex(b"PK\x01\x02") + offset
        return raw[:at] + value + raw[at + len(value) :]

    return change


def written(data: bytes) -> Callable[[Path], Path]:
    return lambda path: path.write_bytes(data) and path


def special(make: Callable[[Path], object]) -> Callable[[Path], Path]:
    def made(path: Path) -> Path:
        make(path)
        return path

    return made


def saved(array: Any) -> Callable[[Path], Path]:
    return special(lambda path: np.savez(path, W=array))


def bomb(size: int) -> Callable[[Path], Path]:
    """A file of zeros, compressed a thousand times."""
    return holding(headed(described("'|u1'", f"({size},)"), bytes(size)), method=zipfile.ZIP_DEFLATED)


DAMAGE: dict[str, tuple[Callable[[Path], Path], str]] = {
    "empty": (special(Path.touch), "it is empty"),
    "a web page": (written(b"<!doctype html>"), "it is a web page"),
    "an LFS pointer": (written(b"version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
    "one array": (written(npy()), "it is a numpy array"),
    "noise": (written(b"\x07\x1b[31m\n" * 9), r"begins with b'\\x07\\x1b"),
    "a pipe": (special(os.mkfifo), "is a named pipe, not a regular file"),
    "a device": (special(lambda path: path.symlink_to("/dev/zero")), "is a device, not a regular file"),
    "cut short": (changed(lambda raw: raw[:-30]), "cut short"),
    "only a head": (written(b"PK\x03\x04 and no more"), "cut short"),
    "appended to": (changed(lambda raw: raw + b"x"), "something was added"),
    "moved directory": (changed(lambda raw: raw[:-22] + bytes(8) + raw[-22:]), "not where it should be"),
    "encrypted": (changed(in_directory(8, b"\1\0")), "is encrypted; save it again, without a password"),
    "bzip2": (holding(npy(), method=zipfile.ZIP_BZIP2), "zip method 12"),
    "other size": (changed(in_directory(24, b"\xff\xff\xff\x7f")), "another size than listed"),
    "a larger size": (changed(in_directory(20, struct.pack("<II", 153, 153))), "Bad CRC-32"),
    "a flipped bit": (changed(lambda raw: raw.replace(b"\x40\x40", b"\x41\x40")), "BadZipFile: Bad CRC-32"),
    "a broken stream": (
        lambda path: changed(lambda raw: raw[:60] + b"\xff" * 20 + raw[80:])(special(_compressed)(path)),
        "cannot be read",
    ),
    "twice": (lambda path: packed(path, ("W.npy", npy()), ("W.npy", npy())), "lists a file twice"),
    "a path": (lambda path: packed(path, ("../W.npy", npy())), r"'\.\./W\.npy' in it is no array"),
    "a control character": (lambda path: packed(path, ("\x1b[31mW.npy", npy())), r"'\\x1b\[31mW\.npy' in it is not"),
    "another suffix": (lambda path: packed(path, ("W.txt", npy())), r"'W\.txt' in it is no array"),
    "many arrays": (lambda path: packed(path, *((f"{i}.npy", b"") for i in range(1001))), "holds 1001 arrays"),
    "many files": (lambda path: packed(path, *((f"{i}.npy", b"") for i in range(50_001))), "it holds 50001 files"),
    "no array": (holding(b"hello"), "is no array"),
    "nothing": (holding(b""), "is no array"),
    "a magic alone": (holding(b"\x93NUMPY\1\0"), "struct.error|error: unpack"),
    "version 9": (holding(headed(described("'<f4'"), version=9)), "is no array"),
    "objects": (saved(np.array([{}], dtype=object)), "an array of '.O', which are objects"),
    "structures": (saved(np.zeros(3, dtype=[("a", "f4")])), r"an array of \[\('a', '<f4'\)\], which torch does not"),
    "strings": (saved(np.array(["a"])), "an array of '<U1', which torch does not have"),
    "dates": (saved(np.array(["2020-01-01"], dtype="M8[D]")), r"which torch does not have"),
    "complex": (saved(np.zeros(2, dtype=complex)), "an array of '<c16', which torch does not have"),
    "long doubles": (saved(np.zeros(2, dtype=np.longdouble)), "an array of '<f16', which torch does not have"),
    "big-endian": (saved(np.zeros(2, dtype=">f4")), "an array of '>f4', which are big-endian"),
    "unknown key": (holding(headed(described("'<f4'")[:-1] + ", 'x': 1}")), "a header that is none of numpy's"),
    "no dict": (holding(headed("[1]")), "a header that is none of numpy's"),
    "a call": (holding(headed(described("__import__('os').system('true')"))), "ValueError: malformed node"),
    "no python": (holding(headed("{'descr")), "SyntaxError"),
    "nested": (holding(headed("(" * 5000)), "cannot be read"),
    "signs": (holding(headed("-" * 9000 + "1")), "cannot be read"),
    "a long header": (holding(headed(" " * 10_001, version=2)), "a header of 10001 bytes"),
    "an endless header": (holding(b"\x93NUMPY\2\0\xff\xff\xff\xff{}"), "a header of 4294967295 bytes"),
    "more numbers": (holding(headed(described("'<f4'"), bytes(25))), "by its own header, and is"),
    "fewer numbers": (holding(headed(described("'<f4'"), bytes(23))), "by its own header, and is"),
    "a stream that ends early": (
        lambda path: written(
            in_directory(24, struct.pack("<I", len(headed(described("'<f4'")))))(
                holding(headed(described("'<f4'"), bytes(8)), method=zipfile.ZIP_DEFLATED)(path).read_bytes()
            )
        )(path),
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
    "more bombs": (
        lambda path: packed(path, *((f"{i}.npy", bytes(2**24)) for i in range(5)), method=zipfile.ZIP_DEFLATED),
        "once it is decompressed",
    ),
}


def _compressed(path: Path) -> None:
    np.savez_compressed(path, W=np.random.default_rng(0).normal(size=99))


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_or_hostile_file_is_one_clear_error(kind, tmp_path, recwarn):
    make, words = DAMAGE[kind]
    path = make(tmp_path / "params.npz")
    recwarn.clear()
    with pytest.raises(WeightsError, match=words) as caught:
        load_npz(path, "here")
    message = str(caught.value)
    assert message.startswith("here: params.npz ")
    assert message.isprintable()
    assert len(message) < 600
    assert not recwarn.list


def test_bombs_cost_little_memory_and_time(tmp_path):
    bombs = ["a bomb", "more bombs", "many exabytes", "an endless header", "many files", "a pipe", "a device", "signs"]
    for number, kind in enumerate(bombs):
        DAMAGE[kind][0](tmp_path / f"{number}.npz")
    raw = in_directory(24, struct.pack("<I", 1000))(bomb(2**27)(tmp_path / "lie.npz").read_bytes())
    (tmp_path / f"{len(bombs)}.npz").write_bytes(raw)  # it says that it is small
    code = f"""
import resource, pathlib, torch
from featurizers.errors import WeightsError
from featurizers.files.numpy_files import load_npz
grown = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize() + 2**29
resource.setrlimit(resource.RLIMIT_AS, (grown, grown))
for number in range({len(bombs) + 1}):
    try:
        load_npz(pathlib.Path({str(tmp_path)!r}, f"{{number}}.npz"), "here")
    except WeightsError as error:
        assert number == 7 or "MemoryError" not in str(error), error
    else:
        raise AssertionError(number)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


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


def test_what_is_read_is_not_the_file(tmp_path):
    np.savez(tmp_path / "params.npz", W=ONES)
    load_npz(tmp_path / "params.npz", "here")["W"] += 1
    assert torch.equal(load_npz(tmp_path / "params.npz", "here")["W"], torch.from_numpy(ONES))


def test_a_longer_header_is_read(tmp_path):
    data = headed(described("'<f4'") + " " * 3000, ONES.tobytes(), version=2)
    assert torch.equal(load_npz(holding(data)(tmp_path / "params.npz"), "here")["W"], torch.from_numpy(ONES))


def test_weights_compress_less_than_what_is_refused(tmp_path, monkeypatch):
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
    at = data.draw(st.integers(0, len(valid) - 1))
    change = data.draw(st.sampled_from(["flip", "cut", "insert", "replace"]))
    few = data.draw(st.binary(min_size=1, max_size=8))
    raw = {
        "flip": valid[:at] + bytes([valid[at] ^ 1 << few[0] % 8]) + valid[at + 1 :],
        "cut": valid[:at],
        "insert": valid[:at] + few + valid[at:],
        "replace": valid[:at] + few + valid[at + len(few) :],
    }[change]
    path = tmp_path_factory.getbasetemp() / "changed.npz"
    path.write_bytes(raw)
    problem = ""
    try:
        found = load_npz(path, "here")
    except WeightsError as error:
        found, problem = {}, str(error)
    assert problem == "" or (problem.isprintable() and len(problem) < 600)
    for array in found.values():  # the checksum holds, so it is what was written
        assert array.numel() in (1, 6)
        assert array.flatten()[-1] in (3, 5)
