"""`model.safetensors`: its header is checked against what a config implies before any tensor is read."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

from featurizers.errors import WeightsError, one_line, shown
from featurizers.files.regular import looks_like, opened
from featurizers.format.manifest import CONFIG_NAME, WEIGHTS_NAME, repeated

if TYPE_CHECKING:
    import torch
    from torch import Tensor

MAX_HEADER_BYTES: Final = 10_000_000
SET_PREFIX: Final = "features."
"""What the names of stored feature sets begin with."""

ALIGNMENT: Final = 64
"""Bytes, of which torch's own tensors begin at a multiple."""
METADATA: Final = "__metadata__"
MAX_AXES: Final = 16
FLOATS: Final = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
OTHERS: Final = {"BOOL": "bool", "U8": "uint8", "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64"}
DTYPES: Final = {**FLOATS, **OTHERS}
"""What safetensors calls the dtypes that an artefact may hold, and what torch calls them."""

ITEM_BYTES: Final = {
    "F16": 2, "BF16": 2, "F32": 4, "F64": 8, "BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "I32": 4, "I64": 8
}  # fmt: skip


@dataclass(frozen=True)
class Spec:
    """What a header says of one tensor: torch's name of its dtype, and its shape."""

    dtype: str
    shape: tuple[int, ...]


def read_header(path: Path, where: str, file_name: str = WEIGHTS_NAME) -> dict[str, Spec]:
    """Names, dtypes and shapes of the tensors in a safetensors file; reads no tensor.

    It is as strict as the format's specification, and stricter than its readers: no name occurs twice, and the tensors
    fill the file without a gap, an overlap or a byte too many.

    Raises:
        WeightsError: it is not a whole safetensors file.
    """
    return read_header_and_metadata(path, where, file_name)[0]


def read_header_and_metadata(
    path: Path, where: str, file_name: str = WEIGHTS_NAME
) -> tuple[dict[str, Spec], dict[str, str]]:
    """Read the strings of ``__metadata__`` too; the rest as `read_header`.

    Raises:
        WeightsError: it is not a whole safetensors file.
    """
    with opened(path, where, WeightsError, file_name) as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(8)
        length = int.from_bytes(head, "little")
        if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
            looks = looks_like(head + file.read(100)) or "it is cut short, or something else"
            raise WeightsError(where, f"{file_name} ({size} bytes) is not a whole safetensors file: {looks}")
        raw = file.read(length)
    try:
        header = _parse_header(raw)
        specs = {name: _spec(name, entry) for name, entry in header.items() if name != METADATA}
        end = 8 + length + _end([(*entry["data_offsets"], name) for name, entry in header.items() if name != METADATA])
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise WeightsError(where, f"{file_name} has a damaged header: {one_line(reason)}") from error
    if size != end:
        raise WeightsError(where, f"{file_name} has {size} bytes, its header promises {end}; fetch it again")
    return specs, header.get(METADATA, {})


def _parse_header(raw: bytes) -> dict[str, Any]:
    """A JSON object with the metadata, if there is any, as the format has it."""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(items)
        if len(found) != len(items):
            raise ValueError(f"the name {shown(repeated(name for name, _ in items))} is repeated")
        return found

    def natural(number: str) -> int:
        if not number.isdigit():  # "-0" too, which safetensors takes for a fraction
            raise ValueError(f"{shown(number, 40)} is not a natural number")
        return int(number)

    def refuse(number: str) -> NoReturn:
        raise ValueError(f"{shown(number, 40)} is not a natural number")

    if raw[:1] != b"{":
        raise ValueError("it does not begin with '{'")
    header: dict[str, Any] = json.loads(
        raw.decode("utf-8"), object_pairs_hook=pairs, parse_int=natural, parse_constant=refuse, parse_float=refuse
    )
    metadata = header.get(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{METADATA} is not an object of strings")
    for name in (*header, *metadata, *metadata.values()):
        name.encode()  # half of a surrogate pair is JSON, and no text
    return header


def _spec(name: str, entry: Any) -> Spec:
    """What a header's entry says, if it is one that agrees with itself.

    Raises:
        ValueError: it does not.
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
    if (held := offsets[1] - offsets[0]) != (implied := math.prod(shape) * ITEM_BYTES[dtype]):
        raise ValueError(
            f"the tensor {shown(name)} has {shown(held)} bytes, but {shown(implied)} by its shape {shown(shape)}"
        )
    return Spec(DTYPES[dtype], tuple(shape))


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def _end(extents: list[tuple[int, int, str]]) -> int:
    """Where the last tensor ends, if each begins where the one before it ends."""
    end = 0
    for start, stop, name in sorted(extents):
        if start != end:
            raise ValueError(f"there is {'a gap' if start > end else 'an overlap'} before the tensor {shown(name)}")
        end = stop
    return end


def check_header(
    found: Mapping[str, Spec],
    expected: Mapping[str, Tensor],
    feature_sets: list[str],
    where: str,
    *,
    file_name: str = WEIGHTS_NAME,
    config_name: str = CONFIG_NAME,
) -> None:
    """Compare a header with the state dict that a config implies.

    A floating-point tensor may be stored in any floating-point dtype; every other dtype is exact.

    Args:
        found: what the header says.
        expected: the state dict.
        feature_sets: names of those stored beside it.
        where: what to call the artefact in an error.
        file_name: of the tensors.
        config_name: of the file beside it that implies them.

    Raises:
        WeightsError: tensors are missing, unknown, or of another shape or dtype.
    """
    stored_sets = {f"{SET_PREFIX}{name}" for name in feature_sets}
    missing = (set(expected) | stored_sets) - set(found)
    unknown = set(found) - set(expected) - stored_sets
    if missing or unknown:
        parts = [f"lacks {shown_names(missing)}"] * bool(missing) + [f"has unknown {shown_names(unknown)}"] * bool(
            unknown
        )
        raise WeightsError(where, f"{file_name} {' and '.join(parts)}; its {config_name} is of another artefact")
    for name, tensor in expected.items():
        spec = found[name]
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
    """The first few names of tensors, as an error shows them."""
    ordered = sorted(names)
    return f"[{', '.join(map(shown, ordered[:5]))}{', …' if len(ordered) > 5 else ''}]"


def read_tensors(
    path: Path,
    device: torch.device | str | None,
    where: str,
    rows: Mapping[str, Tensor] | None = None,
    *,
    allow_nonfinite: bool = False,
) -> dict[str, Tensor]:
    """The tensors of a file whose header was checked.

    Args:
        path: of the file.
        device: where to put them.
        where: what to call the artefact in an error.
        rows: int64 ``(k,)`` for each tensor of which only these rows are wanted; no others are read.
        allow_nonfinite: take NaN and infinity too.

    Raises:
        WeightsError: they cannot be read, or one holds NaN or infinity.
    """
    from safetensors import SafetensorError, safe_open

    rows = rows or {}
    try:
        with safe_open(path, framework="pt", device=str(device) if device is not None else "cpu") as file:
            tensors = {
                name: take_rows(file.get_slice(name), rows[name]) if name in rows else aligned(file.get_tensor(name))
                for name in file.keys()  # noqa: SIM118  # it is no mapping
            }
        if rows:  # one tensor that is mapped would keep the file's pages
            tensors = {name: tensor if name in rows else tensor.clone() for name, tensor in tensors.items()}
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:  # the last for a device that is not there
        raise WeightsError(where, f"{path.name} cannot be read: {one_line(error)}") from error
    if not allow_nonfinite:
        check_finite(tensors, where)
    return tensors


def aligned(tensor: Tensor) -> Tensor:
    """The tensor where torch would have put it: products of matrices round by the address that they are at.

    A file is mapped, and its tensors begin anywhere in it. Copied, a featurizer that was saved and loaded gives the
    bits that it gave.
    """
    return tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()


def take_rows(stored: Any, rows: Tensor) -> Tensor:
    """Some rows of a tensor in a file, which are all that is read of it; neighbours in one piece.

    Args:
        stored: a slice of safetensors.
        rows: int64 ``(k,)``, in the order wanted.
    """
    import torch

    wanted = rows.tolist()
    starts = [i for i in range(len(wanted)) if i == 0 or wanted[i] != wanted[i - 1] + 1]
    pieces = [
        stored[wanted[start] : wanted[end - 1] + 1].clone()
        for start, end in zip(starts, [*starts[1:], len(wanted)], strict=True)
    ]
    return torch.cat(pieces)


def write_tensors(tensors: Mapping[str, Tensor], path: Path, where: str) -> str:
    """Write tensors, with the mode that the umask gives, and return the file's sha256.

    Raises:
        WeightsError: one could not be read again: it has a dtype that no artefact holds, or holds NaN or infinity.
    """
    check_finite(tensors, where)
    save_tensors(tensors, path, where)
    return sha256(path, where)


def save_tensors(tensors: Mapping[str, Tensor], path: Path, where: str, metadata: dict[str, str] | None = None) -> None:
    """Write tensors and strings to a safetensors file, with the mode that the umask gives.

    Raises:
        WeightsError: a tensor has a dtype that no artefact holds, or the file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    for name, tensor in tensors.items():
        if (dtype := str(tensor.dtype).removeprefix("torch.")) not in DTYPES.values():
            raise WeightsError(where, f"tensor {name!r} is {dtype}; an artefact holds {', '.join(DTYPES.values())}")
    path.touch()
    mode = path.stat().st_mode  # save_file leaves 0600 whatever the umask
    # safetensors refuses views and shared storage
    stored = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    try:
        save_file(stored, path, metadata)
    except SafetensorError as error:  # a full disk, above all
        raise WeightsError(where, f"{path.name} cannot be written: {one_line(error)}") from error
    path.chmod(mode)


def check_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    """Raise `WeightsError` if a tensor holds NaN or infinity."""
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            wrong = ~(tensor.float() if tensor.element_size() == 1 else tensor).isfinite()
            count, first = int(wrong.count_nonzero()), list[int]()
            place = int(wrong.flatten().byte().argmax())
            for size in reversed(tensor.shape):
                place, index = divmod(place, size)
                first.insert(0, index)
            raise WeightsError(
                where,
                f"tensor {shown(name)} holds NaN or infinity: {count} of its {tensor.numel()} numbers, the "
                f"first at {first}. Load it with allow_nonfinite=True to look at it",
            )


def is_finite(tensor: Tensor) -> bool:
    """Whether every number of a tensor is finite."""
    # a sum is finite only if every element is; it may overflow, so that only then each is looked at
    if tensor.is_floating_point() and tensor.element_size() == 1:  # torch knows no infinity of these
        tensor = tensor.float()
    return not tensor.is_floating_point() or bool(tensor.float().sum().isfinite()) or bool(tensor.isfinite().all())


def verify_weights(path: Path, expected: str, where: str) -> None:
    """Compare the sha256 of the weights with the one in the config beside them.

    Raises:
        WeightsError: they differ.
    """
    if (found := sha256(path, where)) != expected:
        raise WeightsError(where, f"{path.name} has sha256 {found}, its config says {expected}; fetch it again")


def sha256(path: Path, where: str) -> str:
    """Hexadecimal sha256 of a file.

    Raises:
        WeightsError: it cannot be read.
    """
    with opened(path, where, WeightsError) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
