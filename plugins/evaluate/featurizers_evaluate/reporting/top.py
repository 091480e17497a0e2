"""The largest and the smallest of many numbers."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

GROUP: Final = 32


def top_rows(x: Tensor, k: int, *, largest: bool = True) -> tuple[Tensor, Tensor]:
    """Return the k largest numbers of each column and their rows, as ``x.topk(k, dim=0)``, in one pass over ``x``.

    The k largest are in the k groups of rows with the largest maxima, so that only those are looked at again.

    Args:
        x: ``(n, columns)``.
        k: at most n.
        largest: False for the smallest instead.

    Returns:
        Values and rows, each ``(k, columns)``, the most extreme first.
    """
    n, columns = x.shape
    groups = n // GROUP
    if groups <= 2 * k:
        few = x.topk(k, dim=0, largest=largest)
        return few.values, few.indices
    whole = groups * GROUP
    in_groups = x[:whole].view(groups, GROUP, columns)
    extremes = (in_groups.amax(dim=1) if largest else in_groups.amin(dim=1)).T.contiguous()
    chosen = extremes.topk(k, dim=1, largest=largest, sorted=False).indices  # (columns, k)
    inner = torch.arange(GROUP, device=x.device)
    rows = (chosen[..., None] * GROUP + inner).reshape(columns, k * GROUP)
    rows = torch.cat([rows, torch.arange(whole, n, device=x.device).expand(columns, -1)], dim=1)
    found = x.T.gather(1, rows).topk(k, dim=1, largest=largest)
    return found.values.T, rows.gather(1, found.indices).T
