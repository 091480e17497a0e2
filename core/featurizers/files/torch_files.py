"""Read untrusted `torch.save` files; the pickle is checked before `torch.load` opens the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZIP_STORED

from featurizers.errors import WeightsError, shown
from featurizers.files.archives import archive, reading
from featurizers.files.pickles import TENSORS_ALONE, PickleReader
from featurizers.files.regular import opened

MAX_PART = 4 * 2**20
"""Largest size in bytes of the pickle, and of any other entry that is not tensor data."""


def load_torch(path: Path, where: str) -> Any:
    """Load tensors, numbers, strings, tuples, lists and dicts from a `torch.save` file.

    The tensors are memory-mapped on the CPU, whatever device they were saved on. The pickle is checked before torch
    opens the file, so that loading takes time and memory in proportion to the file.

    Args:
        path: the file.
        where: name of its folder in errors.

    Raises:
        WeightsError: the file has another format, is damaged, or holds objects of other classes.
    """
    import torch

    name = path.name if path.name.isprintable() else shown(path.name)
    with opened(path, where, WeightsError) as file, reading(where, name):
        head = file.peek(2)[:2]
        if head.startswith(b"\x80") and head[1:] <= b"\x05":
            raise WeightsError(
                where,
                f"{name} cannot be read: it is a bare pickle, or was saved by torch before 1.6, whose format is not "
                "read; load it where you trust it, and save it again with torch.save of torch 1.6 or later",
            )
        zipped = archive(file, where, name, (ZIP_STORED, ZIP_DEFLATED))
        folders = {entry.partition("/")[0] for entry in zipped.namelist()}
        sizes = {entry.filename.partition("/")[2]: entry.file_size for entry in zipped.infolist()}
        if "constants.pkl" in sizes:
            raise WeightsError(
                where,
                f"{name} holds more than tensors, and nothing of it is run: it is a TorchScript program{TENSORS_ALONE}",
            )
        if any(entry.compress_type != ZIP_STORED for entry in zipped.infolist()):
            raise WeightsError(
                where, f"{name} cannot be read: it is a compressed zip archive, which torch.save never writes"
            )
        if len(folders) != 1 or "data.pkl" not in sizes:
            raise WeightsError(where, f"{name} cannot be read: it is a zip archive that torch.save did not write")
        folder = folders.pop()
        for part, size in sizes.items():
            if size > MAX_PART and not part.startswith("data/"):
                raise WeightsError(
                    where, f"{name} cannot be read: {shown(part)} in it has {size} bytes, more than {MAX_PART}"
                )
        if "byteorder" in sizes and zipped.read(f"{folder}/byteorder") != b"little":
            raise WeightsError(
                where,
                f"{name} cannot be read: it was saved on a big-endian machine; save it again on a little-endian one",
            )
        PickleReader(where, name, sizes).check(zipped.read(f"{folder}/data.pkl"))
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
