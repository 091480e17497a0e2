"""GGUF files of control vectors as data: a reader that is bounded by the size of the file, and a writer.

The layout is that of ggml's ``docs/gguf.md``, version 3: a header, metadata, the places of the tensors, and their data.
The package gguf writes; it is not used to read, because it follows the lengths that a file claims without end.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from featurizers.errors import WeightsError, shown
from featurizers.files import read_bytes
from torch import Tensor

ARCHITECTURE: Final = "controlvector"
MAX_BYTES: Final = 1 << 26
"""Largest file that is read: it has room for 1000 directions of width 16384."""
_MAGIC: Final = b"GGUF"
_SCALARS: Final = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Formats of the types of metadata, by their numbers."""
_STRING: Final = 8
_ARRAY: Final = 9
_F32: Final = 0
_NAME: Final = re.compile(r"direction\.([0-9]{1,6})")


def architecture_of(path: Path, where: str) -> str | None:
    """Return what a GGUF file says that it holds; None if it is no such file, is larger, or does not say so."""
    try:
        cursor = _Cursor(read_bytes(path, where, WeightsError, MAX_BYTES), where)
        _, pairs = cursor.header()
        for _ in range(pairs):
            name, value = cursor.pair()
            if name == "general.architecture":
                return value if isinstance(value, str) else None
    except WeightsError:
        pass
    return None


def read_directions(path: Path, where: str) -> dict[int, Tensor]:
    """Return the direction of each layer of a control vector, float32 ``(d,)``, in the order of the layers.

    Args:
        path: the file.
        where: name of its folder in errors.

    Raises:
        WeightsError: the file is too large or damaged, holds something else, or breaks a rule of llama.cpp's.
    """
    cursor = _Cursor(read_bytes(path, where, WeightsError, MAX_BYTES), where)
    tensors, pairs = cursor.header()
    metadata: dict[str, Any] = {}
    for _ in range(pairs):
        name, value = cursor.pair()
        metadata[name] = value
    if metadata.get("general.architecture") != ARCHITECTURE:
        raise WeightsError(
            where, f"its architecture is {shown(metadata.get('general.architecture'))}, no control vector"
        )
    places = [cursor.place() for _ in range(tensors)]
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or isinstance(alignment, bool) or alignment < 1 or alignment > MAX_BYTES:
        raise WeightsError(where, f"its alignment is {shown(alignment)}, not a number of bytes")
    start = math.ceil(cursor.at / alignment) * alignment
    directions: dict[int, Tensor] = {}
    for name, shape, kind, offset in places:
        layer = _layer(name, where)
        if kind != _F32 or len(shape) != 1:
            raise WeightsError(where, f"{name} is not a vector of float32")
        if layer in directions:
            raise WeightsError(where, f"there are two tensors {name}")
        data = cursor.slice(start + offset, shape[0] * 4)
        directions[layer] = torch.from_numpy(np.frombuffer(data, dtype="<f4").astype(np.float32))
    widths = {len(direction) for direction in directions.values()}
    if len(widths) != 1 or 0 in widths:
        raise WeightsError(where, f"its directions have the widths {sorted(widths)}, not one")
    if not all(bool(direction.isfinite().all()) for direction in directions.values()):
        raise WeightsError(where, "a direction holds NaN or infinity")
    return dict(sorted(directions.items()))


def write_directions(directions: Mapping[int, Tensor], path: Path, model_hint: str) -> None:
    """Write the directions of a control vector, float32.

    Args:
        directions: by layer, ``(d,)``.
        path: of the new file.
        model_hint: architecture of the model in llama.cpp's names, which that program shows.
    """
    from gguf import GGUFWriter

    writer = GGUFWriter(path, ARCHITECTURE)
    writer.add_string(f"{ARCHITECTURE}.model_hint", model_hint)
    writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(directions))
    for layer, direction in sorted(directions.items()):
        writer.add_tensor(f"direction.{layer}", direction.detach().cpu().float().numpy())
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _layer(name: str, where: str) -> int:
    match = _NAME.fullmatch(name)
    if match is None or int(match[1]) == 0:
        raise WeightsError(where, f"a tensor is named {shown(name)}, not direction.1, direction.2 and so on")
    return int(match[1])


class _Cursor:
    """Reads the parts of a GGUF file in their order, and nothing beyond its end.

    Args:
        data: the file, or its beginning.
        where: name of its folder in errors.
    """

    def __init__(self, data: bytes, where: str) -> None:
        self.at = 0
        self._data, self._where = data, where

    def header(self) -> tuple[int, int]:
        """Return the numbers of tensors and of pairs of metadata."""
        if self._take(4) != _MAGIC:
            raise WeightsError(self._where, "it is no GGUF file")
        (version,) = self._unpack("I")
        if version not in (2, 3):
            raise WeightsError(self._where, f"it has version {version} of GGUF; versions 2 and 3 are read")
        tensors, pairs = self._unpack("QQ")
        return int(tensors), int(pairs)

    def pair(self) -> tuple[str, Any]:
        """Return a name and its value; arrays are passed over, with the value None."""
        name = self._string()
        (kind,) = self._unpack("I")
        return name, self._value(kind)

    def place(self) -> tuple[str, tuple[int, ...], int, int]:
        """Return name, shape, type and offset of a tensor."""
        name = self._string()
        (dims,) = self._unpack("I")
        if dims > 4:
            raise WeightsError(self._where, f"a tensor has {dims} axes; GGUF has at most 4")
        shape = self._unpack("Q" * dims)
        kind, offset = self._unpack("IQ")
        return name, shape, kind, offset

    def slice(self, start: int, size: int) -> bytes:
        """Return some bytes of the file."""
        if start + size > len(self._data):
            raise WeightsError(self._where, "the file ends before its data does; it was not written to its end")
        return self._data[start : start + size]

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            return self._skip_array()
        if kind not in _SCALARS:
            raise WeightsError(self._where, f"its metadata has a value of the unknown type {kind}")
        return self._unpack(_SCALARS[kind])[0]

    def _skip_array(self) -> None:
        kind, length = self._unpack("IQ")
        if kind in _SCALARS:
            self._take(length * struct.calcsize(f"<{_SCALARS[kind]}"))
        elif kind == _STRING:
            for _ in range(length):  # each takes 8 bytes of the file at least
                self._string()
        else:
            raise WeightsError(self._where, "its metadata has an array of arrays, or of an unknown type")

    def _string(self) -> str:
        (length,) = self._unpack("Q")
        try:
            return self._take(length).decode()
        except UnicodeDecodeError as error:
            raise WeightsError(self._where, "it holds a text that is not UTF-8") from error

    def _unpack(self, form: str) -> tuple[Any, ...]:
        return struct.unpack(f"<{form}", self._take(struct.calcsize(f"<{form}")))

    def _take(self, size: int) -> bytes:
        taken = self.slice(self.at, size)
        self.at += size
        return taken
