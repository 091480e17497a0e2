"""What ``numpy.savez`` wrote, from strangers: each array is known to be small enough before it is read."""

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
"""What numpy calls the dtypes that torch has, and what torch calls them."""
MAX_HEADER = 10_000
MAX_ARRAYS = 1000
MAX_AXES = 64
CHUNK = 2**24
SMALL, MOST_TIMES = 64 * 2**20, 10
"""How many bytes may come out of a file of any size, and how many times its own size out of a larger one."""


def load_npz(path: Path, where: str) -> dict[str, Tensor]:
    """The arrays that `numpy.savez` or `numpy.savez_compressed` wrote, by name, as tensors in memory of their own.

    Args:
        path: of the file.
        where: what to call its folder in an error.

    Raises:
        WeightsError: it is no such file, it is damaged or far larger than it seems, or it holds anything else than
            arrays of numbers.
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
    """What an entry is that should be an array."""


def _array(stream: IO[bytes], entry: ZipInfo) -> Tensor:
    """The array in an entry of an archive.

    Raises:
        _UnfitError: it is none, or not of numbers that torch has.
    """
    import torch

    if not entry.filename.endswith(".npy") or "/" in entry.filename or "\\" in entry.filename:
        raise _UnfitError("is no array")
    dtype, shape, reverse, start = _header(stream)
    nbytes = math.prod(shape) * dtype.itemsize
    if start + nbytes != entry.file_size:
        raise _UnfitError(f"should be {shown(start + nbytes)} bytes, by its own header, and is {entry.file_size}")
    memory = bytearray(nbytes)
    filled, view = 0, memoryview(memory)
    while filled < nbytes and (part := stream.read(min(CHUNK, nbytes - filled))):
        view[filled : filled + len(part)] = part
        filled += len(part)
    if filled < nbytes:  # of the last byte, zipfile looks at the checksum
        raise _UnfitError("is shorter than listed")
    flat = torch.frombuffer(memory, dtype=dtype) if nbytes else torch.empty(0, dtype=dtype)
    if not reverse:
        return flat.reshape(shape)
    return flat.reshape(shape[::-1]).permute(*range(len(shape))[::-1])


def _header(stream: IO[bytes]) -> tuple[torch.dtype, tuple[int, ...], bool, int]:
    """The dtype and shape of an array, whether it is stored column by column, and where its numbers begin.

    Raises:
        _UnfitError: it has none, or one that torch has no tensor for.
    """
    import torch

    magic = stream.read(8)
    width = {1: 2, 2: 4, 3: 4}.get(magic[6]) if magic[:6] == b"\x93NUMPY" and len(magic) == 8 else None
    if width is None:
        raise _UnfitError("is no array")
    (length,) = struct.unpack("<H" if width == 2 else "<I", stream.read(width))
    if length > MAX_HEADER:
        raise _UnfitError(f"has a header of {length} bytes, more than {MAX_HEADER}")
    header = ast.literal_eval(stream.read(length).decode("latin-1"))
    if not isinstance(header, dict) or header.keys() != {"descr", "fortran_order", "shape"}:
        raise _UnfitError("has a header that is none of numpy's")
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
