"""Read and write `model.safetensors`; its header is checked against the config before any tensor is read."""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from featurizers.errors import WeightsError, one_line, shown
from featurizers.files.regular import looks_like, opened
from featurizers.format.manifest import CONFIG_NAME, WEIGHTS_NAME, repeated
from featurizers.format.pieces import Pieces, Stored

if TYPE_CHECKING:
    import torch
    from torch import Tensor

MAX_HEADER_BYTES: Final = 10_000_000
SET_PREFIX: Final = "features."
"""Prefix of the tensor names of feature sets."""

ALIGNMENT: Final = 64
"""Torch aligns tensors to this many bytes."""
METADATA: Final = "__metadata__"
MAX_AXES: Final = 16
FLOATS: Final = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
OTHERS: Final = {"BOOL": "bool", "U8": "uint8", "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64"}
DTYPES: Final = {**FLOATS, **OTHERS}
"""Torch's name of each safetensors dtype that an artefact may hold."""

_CODES: Final = {name: code for code, name in DTYPES.items()}
"""Name of a dtype in a header, by torch's name."""

ITEM_BYTES: Final = {
    "F16": 2, "BF16": 2, "F32": 4, "F64": 8, "BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "I32": 4, "I64": 8
}  # fmt: skip


@dataclass(frozen=True)
class Spec:
    """Dtype (torch's name) and shape of a tensor, as a header gives them."""

    dtype: str
    shape: tuple[int, ...]


def read_header(path: Path, where: str, file_name: str = WEIGHTS_NAME) -> dict[str, Spec]:
    """Read the names, dtypes and shapes of the tensors in a safetensors file, and no tensor.

    The check is stricter than the safetensors library, which accepts repeated names, unknown keys, leading spaces and
    headers of 100 MB, and whose errors mostly do not name the tensor.

    Raises:
        WeightsError: the file is not a complete safetensors file.
    """
    return read_header_and_metadata(path, where, file_name)[0]


def read_header_and_metadata(
    path: Path, where: str, file_name: str = WEIGHTS_NAME
) -> tuple[dict[str, Spec], dict[str, str]]:
    """Read the header of a safetensors file, and the strings of its ``__metadata__``; checked as in `read_header`.

    Raises:
        WeightsError: the file is not a complete safetensors file.
    """
    with opened(path, where, WeightsError, file_name) as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(8)
        length = int.from_bytes(head, "little")
        if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
            reason = looks_like(head + file.read(100)) or "it is cut short, or has another format"
            raise WeightsError(where, f"{file_name} ({size} bytes) is not a whole safetensors file: {reason}")
        raw = file.read(length)
    try:
        header, metadata = _parse_header(raw)
        specs = {name: _spec(name, entry) for name, entry in header.items()}
        end = 8 + length + _end([(*entry["data_offsets"], name) for name, entry in header.items()])
    except (ValueError, RecursionError) as error:
        problem = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise WeightsError(where, f"{file_name} has a damaged header: {one_line(problem)}") from error
    if size != end:
        raise WeightsError(where, f"{file_name} has {size} bytes, its header promises {end}; fetch it again")
    return specs, metadata


def _parse_header(raw: bytes) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the entries of the tensors in a header and the strings of its metadata, after checking strict JSON.

    Raises:
        ValueError: the header is not JSON, repeats a name, holds a number that is not natural, or has invalid metadata.
    """

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        entries = dict(items)
        if len(entries) != len(items):
            raise ValueError(f"the name {shown(repeated(name for name, _ in items))} is repeated")
        return entries

    def natural(number: str) -> int:
        if not number.isdigit():  # NaN, 8.0, -1, and -0, which safetensors reads as a float
            raise ValueError(f"{shown(number, 40)} is not a natural number")
        return int(number)

    if raw[:1] != b"{":
        raise ValueError("it does not begin with '{'")
    header: dict[str, Any] = json.loads(
        raw.decode("utf-8"), object_pairs_hook=pairs, parse_int=natural, parse_constant=natural, parse_float=natural
    )
    metadata = header.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{METADATA} is not an object of strings")
    for name in (*header, *metadata, *metadata.values()):
        name.encode()  # raises an exception for a lone surrogate, which JSON allows
    return header, metadata


def _spec(name: str, entry: Any) -> Spec:
    """Return the dtype and shape in a tensor's entry.

    Raises:
        ValueError: the entry is malformed, or its size does not fit its dtype and shape.
    """
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"the tensor {shown(name)} has {shown(entry)}, not a dtype, a shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"the tensor {shown(name)} is of the dtype {shown(dtype)}, not one of {', '.join(DTYPES)}")
    if not _naturals(shape) or len(shape) > MAX_AXES:
        raise ValueError(f"the tensor {shown(name)} has the shape {shown(shape)}")
    if not _naturals(offsets) or len(offsets) != 2:
        raise ValueError(f"the tensor {shown(name)} has the data_offsets {shown(offsets)}")
    if (size := offsets[1] - offsets[0]) != (implied := math.prod(shape) * ITEM_BYTES[dtype]):
        raise ValueError(
            f"the tensor {shown(name)} has {shown(size)} bytes, but {shown(implied)} by its shape {shown(shape)}"
        )
    return Spec(DTYPES[dtype], tuple(shape))


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def _end(extents: list[tuple[int, int, str]]) -> int:
    """Return where the last tensor ends, given the start, end and name of each.

    Raises:
        ValueError: a tensor does not begin where the previous one ends.
    """
    end = 0
    for start, stop, name in sorted(extents):
        if start != end:
            raise ValueError(f"there is {'a gap' if start > end else 'an overlap'} before the tensor {shown(name)}")
        end = stop
    return end


def check_header(
    specs: Mapping[str, Spec],
    expected: Mapping[str, Tensor],
    feature_sets: list[str],
    where: str,
    *,
    file_name: str = WEIGHTS_NAME,
    config_name: str = CONFIG_NAME,
) -> None:
    """Compare a header with the state dict that a config implies.

    A floating-point tensor may be stored in any floating-point dtype; other dtypes must be equal.

    Args:
        specs: dtypes and shapes in the header.
        expected: the state dict.
        feature_sets: names of the feature sets stored with it.
        where: name of the artefact in errors.
        file_name: name of the file of tensors.
        config_name: name of the config that implies them.

    Raises:
        WeightsError: a tensor is missing, unknown, or has another shape or dtype.
    """
    stored_sets = {f"{SET_PREFIX}{name}" for name in feature_sets}
    missing = (set(expected) | stored_sets) - set(specs)
    unknown = set(specs) - set(expected) - stored_sets
    problems = []
    if missing:
        problems.append(f"lacks {shown_names(missing)}")
    if unknown:
        problems.append(f"has unknown {shown_names(unknown)}")
    if problems:
        raise WeightsError(where, f"{file_name} {' and '.join(problems)}; its {config_name} is of another artefact")
    for name, tensor in expected.items():
        spec = specs[name]
        if spec.shape != tuple(tensor.shape):
            raise WeightsError(
                where,
                f"tensor {name!r} has shape {shown(list(spec.shape))}, but its config implies "
                f"{shown(list(tensor.shape))}",
            )
        implied = str(tensor.dtype).removeprefix("torch.")
        if spec.dtype != implied and not {spec.dtype, implied} <= set(FLOATS.values()):
            raise WeightsError(where, f"tensor {name!r} is {spec.dtype}, but its config implies {implied}")


def shown_names(names: Iterable[str]) -> str:
    """Return the first five tensor names for an error."""
    ordered = sorted(names)
    return f"[{', '.join(map(shown, ordered[:5]))}{', …' if len(ordered) > 5 else ''}]"


def read_tensors(
    path: Path,
    device: torch.device | str | None,
    where: str,
    rows: Mapping[str, Tensor | slice] | None = None,
    *,
    names: Collection[str] | None = None,
    allow_nonfinite: bool = False,
) -> dict[str, Tensor]:
    """Read the tensors of a file whose header was checked.

    Args:
        path: the file.
        device: device to put them on; None for the CPU.
        where: name of the artefact in errors.
        rows: int64 ``(k,)`` or a slice by the name of a tensor, the only rows of it to read.
        names: of the tensors to read; None for all.
        allow_nonfinite: accept NaN and infinity.

    Raises:
        WeightsError: a tensor cannot be read, or holds NaN or infinity.
    """
    from safetensors import SafetensorError, safe_open

    rows = rows or {}
    try:
        with safe_open(path, framework="pt", device=str(device) if device is not None else "cpu") as file:
            tensors = {
                name: take_rows(file.get_slice(name), rows[name]) if name in rows else aligned(file.get_tensor(name))
                for name in file.keys()  # noqa: SIM118  # not a mapping
                if names is None or name in names
            }
        if rows:  # a single mapped tensor would keep the whole file mapped
            tensors = {name: tensor if name in rows else tensor.clone() for name, tensor in tensors.items()}
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:  # RuntimeError: the device does not exist
        raise WeightsError(where, f"{path.name} cannot be read: {one_line(error)}") from error
    if not allow_nonfinite:
        check_finite(tensors, where)
    return tensors


def aligned(tensor: Tensor) -> Tensor:
    """Copy the tensor to 64-byte-aligned memory if needed: matmul kernels round differently on unaligned data.

    In a memory-mapped file a tensor may begin at any address. With aligned copies a loaded featurizer computes the same
    bits as the one that was saved.
    """
    return tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()


def laid_out(tensors: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors with the strides that a kind gives them, because matmul kernels round by the layout.

    Args:
        tensors: contiguous, as a file holds them.
        like: the state dict of a new featurizer, whose tensors may be on the meta device.
    """
    import torch

    result = dict(tensors)
    for name, tensor in tensors.items():
        other = like.get(name)
        if other is None or other.shape != tensor.shape or not tensor.numel() or other.stride() == tensor.stride():
            continue
        if sorted(other.stride()) == sorted(tensor.permute(_order(other)).contiguous().stride()):  # a permutation
            result[name] = torch.empty_permuted(
                tensor.shape, _order(other), dtype=tensor.dtype, device=tensor.device
            ).copy_(tensor)
    return result


def _order(tensor: Tensor) -> list[int]:
    """Return the axes of a tensor from the widest stride to the narrowest."""
    return sorted(range(tensor.dim()), key=lambda axis: -tensor.stride()[axis])


def take_rows(stored: Any, rows: Tensor | slice) -> Tensor:
    """Read some rows of a tensor in a file, adjacent rows at once, and no others.

    Args:
        stored: slice object of safetensors.
        rows: int64 ``(k,)``, the rows in the order of the result; or a slice of step 1.
    """
    import torch

    if isinstance(rows, slice):
        part: Tensor = stored[rows].clone()
        return part
    numbers = rows.tolist()
    starts = [i for i in range(len(numbers)) if i == 0 or numbers[i] != numbers[i - 1] + 1]
    pieces = [
        stored[numbers[start] : numbers[end - 1] + 1].clone()
        for start, end in zip(starts, [*starts[1:], len(numbers)], strict=True)
    ]
    return torch.cat(pieces)


def write_tensors(tensors: Mapping[str, Stored], path: Path, where: str) -> str:
    """Write tensors to a file, whose mode follows the umask, and return its sha256.

    Who gives `Pieces` has checked that they are finite.

    Raises:
        WeightsError: a tensor has a dtype that an artefact cannot hold, or holds NaN or infinity; the write failed.
    """
    check_finite({name: each for name, each in tensors.items() if not isinstance(each, Pieces)}, where)
    save_tensors(tensors, path, where)
    return sha256(path, where)


def save_tensors(tensors: Mapping[str, Stored], path: Path, where: str, metadata: dict[str, str] | None = None) -> None:
    """Write tensors and strings to a safetensors file, with the mode that the umask gives.

    The header is padded with spaces to whole multiples of `ALIGNMENT`, so that a tensor of such a size begins at an
    aligned address when the file is mapped, and is not copied. Nothing is held in memory but one tensor at a time.

    Raises:
        WeightsError: a tensor has a dtype that no artefact holds, or the data cannot be written.
        OSError: the file cannot be made.
    """
    for name, tensor in tensors.items():
        if (dtype := str(tensor.dtype).removeprefix("torch.")) not in DTYPES.values():
            raise WeightsError(where, f"tensor {name!r} is {dtype}; an artefact holds {', '.join(DTYPES.values())}")
    # tensors of whole multiples of the alignment come first, so that each begins at one; the rest by their item size
    ordered = sorted(
        tensors.items(), key=lambda item: (item[1].nbytes % ALIGNMENT != 0, -item[1].element_size(), item[0])
    )
    header: dict[str, Any] = {} if metadata is None else {METADATA: metadata}
    end = 0
    for name, tensor in ordered:
        begin, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": _CODES[str(tensor.dtype).removeprefix("torch.")],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    written = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    written += b" " * (-(len(written) + 8) % ALIGNMENT)  # the length of the header takes eight bytes
    with path.open("wb") as file:
        try:
            file.write(len(written).to_bytes(8, "little") + written)
            for _, tensor in ordered:
                for piece in tensor.read() if isinstance(tensor, Pieces) else (tensor,):
                    file.write(_little_endian(piece))
            file.flush()
        except OSError as error:  # above all a full disk
            raise WeightsError(where, f"{path.name} cannot be written: {one_line(error)}") from error


def _little_endian(tensor: Tensor) -> Any:
    """Return the bytes of a tensor in its logical order, as a buffer."""
    import torch

    data = tensor.detach().cpu().contiguous()
    # the strides of a tensor of one number may be 0, and are 1 here
    data = data.as_strided((data.numel(),), (1,)).view(torch.uint8)
    if sys.byteorder == "big":
        data = data.reshape(-1, tensor.element_size()).flip(-1).contiguous()
    return data.numpy()


def check_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    """Raise a `WeightsError` if a tensor holds NaN or infinity."""
    import torch

    for name, tensor in tensors.items():
        if not is_finite(tensor):
            nonfinite = ~(tensor.float() if tensor.element_size() == 1 else tensor).isfinite()
            count = int(nonfinite.count_nonzero())
            first = [int(index) for index in torch.unravel_index(nonfinite.flatten().byte().argmax(), tensor.shape)]
            raise WeightsError(
                where,
                f"tensor {shown(name)} holds NaN or infinity: {count} of its {tensor.numel()} numbers, the "
                f"first at {first}. Load it with allow_nonfinite=True to look at it",
            )


def is_finite(tensor: Tensor) -> bool:
    """Return True if the tensor holds neither NaN nor infinity."""
    import torch

    if tensor.is_floating_point() and tensor.element_size() == 1:  # torch has no isfinite for 8-bit floats
        tensor = tensor.float()
    # A finite sum proves it cheaply; a sum that is not finite may have overflowed, so each element is then checked.
    return (
        not tensor.is_floating_point()
        or bool(tensor.sum(dtype=torch.float32).isfinite())
        or bool(tensor.isfinite().all())
    )


def verify_weights(path: Path, expected: str, where: str) -> None:
    """Compare the sha256 of the weights with the one in the config beside them.

    Raises:
        WeightsError: they differ.
    """
    if (actual := sha256(path, where)) != expected:
        raise WeightsError(where, f"{path.name} has sha256 {actual}, its config says {expected}; fetch it again")


def sha256(path: Path, where: str) -> str:
    """Return the hexadecimal sha256 of a file.

    Raises:
        WeightsError: the file cannot be read.
    """
    with opened(path, where, WeightsError) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
