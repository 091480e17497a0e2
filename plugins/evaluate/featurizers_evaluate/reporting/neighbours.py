"""Features whose directions are most alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from featurizers_evaluate.reporting.directions import Directions
from featurizers_evaluate.reporting.top import top_rows

SHOWN: Final = 6
STEP: Final = 512
ORTHOGONAL: Final = 1e-3
"""Cosine below which directions count as orthogonal, if all are."""
MOST: Final = 2**28
"""Numbers in the directions of all features up to which neighbours are looked for: 1 GiB."""


@dataclass(frozen=True)
class Neighbours:
    """Nearest features of each feature by the cosine of their directions.

    Attributes:
        rows: ``(n, 6)`` int32, places in the list of features, nearest first; -1 where there is none.
        cosines: ``(n, 6)``.
    """

    rows: Tensor
    cosines: Tensor


@torch.no_grad()
def nearest(directions: Directions, columns: Tensor) -> tuple[Neighbours | str, Tensor | None]:
    """Return the nearest features of each, or why they are not defined; and the lengths of the directions.

    Directions at several writes are taken side by side.

    Args:
        directions: of the features.
        columns: of the features, ``(n,)``.

    Returns:
        The neighbours, and lengths ``(n, writes)``; None if the directions are not defined.
    """
    if not directions.writes:
        return directions.why, None
    parts: list[Tensor] = []
    n, size = len(columns), 0
    for rows in directions.writes.values():
        parts.append(torch.cat([rows(some) for some in torch.split(columns, STEP)]))
        size += parts[-1].numel()
        if size > MOST:
            return f"the directions of {n} features take more than {MOST * 4 // 2**30} GiB; choose fewer features", None
    norms = torch.stack([part.norm(dim=-1) for part in parts], dim=-1)
    whole = norms.square().sum(dim=-1).sqrt()
    inverse = torch.where(whole > 0, 1 / whole, 0.0)
    for part in parts:
        part.mul_(inverse[:, None])
    k = min(SHOWN, n - 1)
    found_rows = torch.full((n, SHOWN), -1, dtype=torch.int32)
    cosines = torch.zeros(n, SHOWN)
    for start in range(0, n if k else 0, STEP):
        stop = min(n, start + STEP)
        alike = torch.zeros(())
        for part in parts:
            alike = alike + part @ part[start:stop].T.contiguous()
        alike[torch.arange(start, stop), torch.arange(stop - start)] = -2.0
        values, places = top_rows(alike, k)
        found_rows[start:stop, :k], cosines[start:stop, :k] = places.T.int(), values.T.nan_to_num()
    if float(cosines.abs().max()) < ORTHOGONAL:
        return "the directions are orthogonal to each other", norms
    silent = whole == 0
    found_rows[silent] = -1
    found_rows[silent[found_rows.clamp(min=0).long()]] = -1
    return Neighbours(found_rows, cosines), norms
