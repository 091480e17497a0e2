"""`model.safetensors`: its header is checked against what a config implies before any tensor is read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from featurizers.errors import WeightsError
from featurizers.manifest import WEIGHTS_NAME

if TYPE_CHECKING:
    import torch
    from torch import Tensor

MAX_HEADER_BYTES: Final = 10_000_000
SET_PREFIX: Final = "features."
"""What the names of stored feature sets begin with."""

FLOATS: Final = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
OTHERS: Final = {"BOOL": "bool", "U8": "uint8", "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64"}
DTYPES: Final = {**FLOATS, **OTHERS}
"""What safetensors calls the dtypes that an artefact may hold, and what torch calls them."""


@dataclass(frozen=True)
class Spec:
    """What a header says of one tensor: torch's name of its dtype, and its shape."""

    dtype: str
    shape: tuple[int, ...]


def read_header(path: Path, where: str, file_name: str = WEIGHTS_NAME) -> dict[str, Spec]:
    """Names, dtypes and shapes of the tensors in a safetensors file; reads no tensor.

    Raises:
        WeightsError: it is not a safetensors file, or is cut short.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
                raise WeightsError(where, f"{file_name} ({size} bytes) is not a whole safetensors file")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        specs = {name: Spec(DTYPES[t["dtype"]], tuple(t["shape"])) for name, t in header.items()}
        end = 8 + length + max((t["data_offsets"][1] for t in header.values()), default=0)
    except OSError as error:
        raise WeightsError(where, f"{file_name} cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise WeightsError(where, f"{file_name} has a damaged header: {type(error).__name__}: {error}") from error
    if size != end:
        raise WeightsError(where, f"{file_name} has {size} bytes, its header promises {end}")
    return specs


def check_header(
    found: Mapping[str, Spec], expected: Mapping[str, Tensor], feature_sets: list[str], where: str
) -> None:
    """Compare a header with the state dict that a config implies.

    A floating-point tensor may be stored in any floating-point dtype; every other dtype is exact.

    Raises:
        WeightsError: tensors are missing, unknown, or of another shape or dtype.
    """
    stored_sets = {f"{SET_PREFIX}{name}" for name in feature_sets}
    missing = (set(expected) | stored_sets) - set(found)
    unknown = set(found) - set(expected) - stored_sets
    if missing or unknown:
        parts = [f"lacks {sorted(missing)!r}"] * bool(missing) + [f"has unknown {sorted(unknown)[:5]!r}"] * bool(
            unknown
        )
        raise WeightsError(where, f"{WEIGHTS_NAME} {' and '.join(parts)}")
    for name, tensor in expected.items():
        spec = found[name]
        if spec.shape != tuple(tensor.shape):
            raise WeightsError(
                where,
                f"tensor {name!r} has shape {list(spec.shape)}, but its config implies {list(tensor.shape)}",
            )
        implied = str(tensor.dtype).removeprefix("torch.")
        if spec.dtype != implied and not {spec.dtype, implied} <= set(FLOATS.values()):
            raise WeightsError(where, f"tensor {name!r} is {spec.dtype}, but its config implies {implied}")


def read_tensors(
    path: Path,
    device: torch.device | str | None,
    where: str,
    rows: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """The tensors of a file whose header was checked.

    Args:
        path: of the file.
        device: where to put them.
        where: what to call the artefact in an error.
        rows: int64 ``(k,)`` for each tensor of which only these rows are wanted; no others are read.

    Raises:
        WeightsError: they cannot be read, or one holds NaN or infinity.
    """
    from safetensors import SafetensorError, safe_open

    rows = rows or {}
    try:
        with safe_open(path, framework="pt", device=str(device) if device is not None else "cpu") as file:
            tensors = {
                name: take_rows(file.get_slice(name), rows[name]) if name in rows else file.get_tensor(name)
                for name in file.keys()  # noqa: SIM118  # it is no mapping
            }
        if rows:  # one tensor that is mapped would keep the file's pages
            tensors = {name: tensor if name in rows else tensor.clone() for name, tensor in tensors.items()}
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:  # the last for a device that is not there
        raise WeightsError(where, f"{WEIGHTS_NAME} cannot be read: {error}") from error
    check_finite(tensors, where)
    return tensors


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
    from safetensors.torch import save_file

    for name, tensor in tensors.items():
        if (dtype := str(tensor.dtype).removeprefix("torch.")) not in DTYPES.values():
            raise WeightsError(where, f"tensor {name!r} is {dtype}; an artefact holds {', '.join(DTYPES.values())}")
    check_finite(tensors, where)
    path.touch()
    mode = path.stat().st_mode  # save_file leaves 0600 whatever the umask
    # safetensors refuses views and shared storage
    save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, path)
    path.chmod(mode)
    return sha256(path)


def check_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    """Raise `WeightsError` if a tensor holds NaN or infinity."""
    for name, tensor in tensors.items():
        # a sum is finite only if every element is; it may overflow, so that only then each is looked at
        if tensor.is_floating_point() and not tensor.float().sum().isfinite() and not tensor.isfinite().all():
            raise WeightsError(where, f"tensor {name!r} holds NaN or infinity")


def sha256(path: Path) -> str:
    """Hexadecimal sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
