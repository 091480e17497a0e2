"""Read untrusted `numpy.savez` files as tensors; the size of each array is checked before it is read."""

from __future__ import annotations

import ast
import math
import struct
from pathlib import Path
from typing import IO, TYPE_CHECKING
from zipfile import ZIP_DEFLATED, ZIP_STORED, ZipInfo

from featurizers.errors import WeightsError, shown
from featurizers.files.archives import archive, reading
from featurizers.files.regular import opened

if TYPE_CHECKING:
    import torch
    from torch import Tensor

DTYPES = {
    **{"|b1": "bool", "|i1": "int8", "|u1": "uint8"},
    **{f"<i{size}": f"int{8 * size}" for size in (2, 4, 8)},
    **{f"<u{size}": f"uint{8 * size}" for size in (2, 4, 8)},
    **{f"<f{size}": f"float{8 * size}" for size in (2, 4, 8)},
}
"""Torch's name of each numpy dtype that torch has."""
MAX_HEADER = 10_000
MAX_ARRAYS = 1000
MAX_AXES = 64
CHUNK = 2**24
SMALL, MOST_TIMES = 64 * 2**20, 10
"""Limit of the decompressed size: so many bytes, or so many times the size of the file if that is more."""


def load_npz(path: Path, where: str) -> dict[str, Tensor]:
    """Read the arrays that `numpy.savez` or `numpy.savez_compressed` wrote as tensors, by name.

    Args:
        path: the file.
        where: name of its folder in errors.

    Raises:
        WeightsError: the file has another format, is damaged, decompresses to more than `SMALL` bytes and `MOST_TIMES`
            its size, or holds anything but arrays of numbers.
    """
    name = path.name if path.name.isprintable() else shown(path.name)
    with opened(path, where, WeightsError) as file, reading(where, name):
        zipped = archive(file, where, name, (ZIP_STORED, ZIP_DEFLATED))
        entries = zipped.infolist()
        total, most = sum(entry.file_size for entry in entries), max(SMALL, MOST_TIMES * path.stat().st_size)
        if total > most:
            raise WeightsError(where, f"{name} would be {total} bytes once it is decompressed, more than {most}")
        if len(entries) > MAX_ARRAYS:
            raise WeightsError(where, f"{name} holds {len(entries)} arrays, more than {MAX_ARRAYS}")
        arrays = {}
        for entry in entries:
            with zipped.open(entry) as stream:
                try:
                    arrays[entry.filename.removesuffix(".npy")] = _array(stream, entry)
                except _UnfitError as error:
                    raise WeightsError(
                        where,
                        f"{name} cannot be read: {shown(entry.filename)} in it {error}; "
                        "save arrays of numbers again, with numpy.savez",
                    ) from error
        return arrays


class _UnfitError(ValueError):
    """An entry of the archive that is not an array of numbers."""


def _array(stream: IO[bytes], entry: ZipInfo) -> Tensor:
    """Read the array in an entry of an archive.

    Raises:
        _UnfitError: the entry is not an array, or its dtype is not one of `DTYPES`.
    """
    import torch

    if not entry.filename.endswith(".npy") or "/" in entry.filename or "\\" in entry.filename:
        raise _UnfitError("is not an array")
    dtype, shape, reverse, start = _header(stream)
    nbytes = math.prod(shape) * dtype.itemsize
    if start + nbytes != entry.file_size:
        raise _UnfitError(f"should be {shown(start + nbytes)} bytes by its own header, but is {entry.file_size}")
    memory = bytearray(nbytes)
    filled, view = 0, memoryview(memory)
    while filled < nbytes and (part := stream.read(min(CHUNK, nbytes - filled))):
        view[filled : filled + len(part)] = part
        filled += len(part)
    if filled < nbytes:  # zipfile checks the checksum when it has read the last byte
        raise _UnfitError("is shorter than listed")
    flat = torch.frombuffer(memory, dtype=dtype) if nbytes else torch.empty(0, dtype=dtype)
    if not reverse:
        return flat.reshape(shape)
    return flat.reshape(shape[::-1]).permute(*range(len(shape))[::-1])


def _header(stream: IO[bytes]) -> tuple[torch.dtype, tuple[int, ...], bool, int]:
    """Read the header of an array: its dtype, its shape, True for Fortran order, and the offset of its data.

    Raises:
        _UnfitError: the header is malformed, or torch has no such dtype.
    """
    import torch

    magic = stream.read(8)
    width = {1: 2, 2: 4, 3: 4}.get(magic[6]) if magic[:6] == b"\x93NUMPY" and len(magic) == 8 else None
    if width is None:
        raise _UnfitError("is not an array")
    (length,) = struct.unpack("<H" if width == 2 else "<I", stream.read(width))
    if length > MAX_HEADER:
        raise _UnfitError(f"has a header of {length} bytes, more than {MAX_HEADER}")
    header = ast.literal_eval(stream.read(length).decode("latin-1"))
    if not isinstance(header, dict) or header.keys() != {"descr", "fortran_order", "shape"}:
        raise _UnfitError("has a header that numpy does not write")
    kind, reverse, shape = header["descr"], header["fortran_order"], header["shape"]
    if not isinstance(kind, str) or kind not in DTYPES:
        why = ", which are objects: they would run code" if kind == "|O" else ", which torch does not have"
        if isinstance(kind, str) and kind.startswith(">"):
            why = ", which are big-endian"
        raise _UnfitError(f"is an array of {shown(kind)}{why}")
    sound = isinstance(shape, tuple) and len(shape) <= MAX_AXES and isinstance(reverse, bool)
    if not sound or not all(type(size) is int and 0 <= size < 2**48 for size in shape):
        raise _UnfitError(f"has the impossible shape {shown(shape)}")
    return getattr(torch, DTYPES[kind]), shape, reverse, 8 + width + length
