"""Grids on disk: one safetensors file with JSON in its header."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from featurizers import Site
from featurizers.errors import ArtefactError, SiteError
from featurizers.format import read_state, write_state
from pydantic import BaseModel, ConfigDict, JsonValue
from torch import Tensor

FORMAT: Final = "featurizers-patching.grid"
VERSION: Final = 1
PADDING: Final = -1


class GridRecord(BaseModel):
    """What a file says of a grid beside its tensors; see `Grid` for the fields."""

    model_config = ConfigDict(strict=True, extra="forbid")

    metrics: tuple[str, ...]
    sites: tuple[str, ...]
    positions: tuple[str, ...]
    labels: tuple[str, ...]
    normalized: bool
    about: dict[str, JsonValue]


def write_grid(
    path: Path, tensors: Mapping[str, Tensor], prompts: Sequence[Sequence[Sequence[int]]], record: Mapping[str, Any]
) -> None:
    """Write a grid, replacing the file as a whole.

    Args:
        path: of the file.
        tensors: ``raw``, ``base``, ``source`` and ``exact``; ``estimate`` if there is one.
        prompts: base and source of each pair.
        record: fields of `GridRecord`.

    Raises:
        ArtefactError: the file cannot be written.
    """
    tokens = {name: _padded([pair[i] for pair in prompts]) for i, name in enumerate(("base_tokens", "source_tokens"))}
    write_state(path, {**tensors, **tokens}, record, format=FORMAT, version=VERSION)


def read_grid(path: Path) -> tuple[dict[str, Tensor], tuple[Any, ...], tuple[Site, ...], GridRecord]:
    """Read what `write_grid` wrote: tensors, prompts, sites and the rest.

    Raises:
        ArtefactError: the file is no grid, or is damaged.
    """
    tensors, record = read_state(path, format=FORMAT, version=VERSION, schema=GridRecord, expected="a grid of patching")
    try:
        sites = tuple(Site.parse(site) for site in record.sites)
    except SiteError as error:
        raise ArtefactError(str(path), str(error)) from error
    pairs = tensors["base"].shape[-1] if "base" in tensors and tensors["base"].dim() else 0
    sizes = len(record.metrics), len(sites), pairs, len(record.positions)
    expected: dict[str, tuple[Any, ...]] = {
        "raw": (torch.float64, sizes),
        "base": (torch.float64, (sizes[0], pairs)),
        "source": (torch.float64, (sizes[0], pairs)),
        "exact": (torch.bool, (sizes[1], sizes[3])),
    }
    if "estimate" in tensors:
        expected["estimate"] = expected["raw"]
    tokens = [tensors.pop(name, torch.empty(0)) for name in ("base_tokens", "source_tokens")]
    found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    whole = all(x.dtype == torch.int64 and x.dim() == 2 and len(x) == pairs for x in tokens)
    if found != expected or not whole or len(record.labels) != sizes[3] or not all(sizes):
        raise ArtefactError(str(path), "the tensors of the grid do not have the sizes that its header says")
    return tensors, tuple(zip(*(map(_unpadded, x) for x in tokens), strict=True)), sites, record


def _padded(rows: list[Sequence[int]]) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[PADDING] * (width - len(row))] for row in rows])


def _unpadded(row: Tensor) -> tuple[int, ...]:
    return tuple(row[row != PADDING].tolist())
