"""Damaged archives, and checks of a function that reads untrusted ones; for the tests of ``.pt`` and ``.npz`` files."""

from __future__ import annotations

import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import pytest
from featurizers.errors import WeightsError
from hypothesis import strategies as st

Reader = Callable[[Path, str], Any]
Maker = Callable[[Path], Path]
"""Writes a file and returns its path."""

WITH_LITTLE_MEMORY = """
import pathlib, resource, sys, torch
from featurizers.errors import WeightsError
from {module} import {reader}
torch.load = None
allowed = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize() + {extra}
resource.setrlimit(resource.RLIMIT_AS, (allowed, allowed))
for path in map(pathlib.Path, sys.argv[1:]):
    try:
        {reader}(path, "here")
    except WeightsError as error:
        assert path.stem in {exempt!r} or "MemoryError" not in str(error), (path, error)
    else:
        raise AssertionError(path)
"""


# ---------------------------------------------------------------------- damaged files


def maker(write: Callable[[Path], object]) -> Maker:
    def make(path: Path) -> Path:
        write(path)
        return path

    return make


def written(data: bytes) -> Maker:
    return maker(lambda path: path.write_bytes(data))


def linked(target: str) -> Maker:
    return maker(lambda path: path.symlink_to(target))


def zipped(*entries: tuple[str, bytes], method: int = zipfile.ZIP_STORED) -> Maker:
    def write(path: Path) -> None:
        with warnings.catch_warnings(), zipfile.ZipFile(path, "w", method) as file:
            warnings.simplefilter("ignore")  # about repeated names
            for name, data in entries:
                file.writestr(zipfile.ZipInfo(name), data, compress_type=method)

    return maker(write)


def edited(make: Maker, edit: Callable[[bytes], bytes]) -> Maker:
    return maker(lambda path: path.write_bytes(edit(make(path).read_bytes())))


def in_directory(offset: int, value: bytes) -> Callable[[bytes], bytes]:
    """Return a function that replaces bytes in the first entry of an archive's directory."""

    def edit(raw: bytes) -> bytes:
        start = raw.index(b"PK\x01\x02") + offset
        return raw[:start] + value + raw[start + len(value) :]

    return edit


# ---------------------------------------------------------------------- checks


def check_refused(read: Reader, path: Path, words: str, recwarn: pytest.WarningsRecorder) -> None:
    """Check that a file costs one short, printable error and no warning."""
    recwarn.clear()
    with pytest.raises(WeightsError, match=words) as caught:
        read(path, "here")
    message = str(caught.value)
    assert message.startswith(f"here: {path.name} ")
    assert message.isprintable()
    assert len(message) < 600
    assert not recwarn.list


def check_limits(
    read: Reader, files: Mapping[str, Maker], template: Path, extra: int, exempt: Collection[str] = ()
) -> None:
    """Check that files are refused in little time, with little memory and without `torch.load`.

    Args:
        read: the function to test.
        files: makers of hostile files, by name.
        template: path of a file; the others are written beside it, with the same suffix.
        extra: bytes of memory that the reading process may add to what it has.
        exempt: names of files whose refusal may be that memory ran out.
    """
    paths = [make(template.with_stem(name)) for name, make in files.items()]
    code = WITH_LITTLE_MEMORY.format(module=read.__module__, reader=read.__name__, extra=extra, exempt=tuple(exempt))
    subprocess.run([sys.executable, "-c", code, *map(str, paths)], check=True, timeout=900)


def changed(valid: bytes, data: st.DataObject) -> bytes:
    """Flip a bit, cut, insert or replace a few bytes at a place that hypothesis draws."""
    at = data.draw(st.integers(0, len(valid) - 1))
    change = data.draw(st.sampled_from(["flip", "cut", "insert", "replace"]))
    few = data.draw(st.binary(min_size=1, max_size=8))
    return {
        "flip": valid[:at] + bytes([valid[at] ^ 1 << few[0] % 8]) + valid[at + 1 :],
        "cut": valid[:at],
        "insert": valid[:at] + few + valid[at:],
        "replace": valid[:at] + few + valid[at + len(few) :],
    }[change]


def read_or_refused(read: Reader, path: Path) -> list[Any]:
    """Return what a file holds, as the only item; an empty list if it is refused by one short, printable error."""
    try:
        return [read(path, "here")]
    except WeightsError as error:
        message = str(error)
    assert message.isprintable()
    assert len(message) < 600
    return []
