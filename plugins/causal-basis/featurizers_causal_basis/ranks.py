"""Spearman's rank correlation."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def spearman(x: Float[Tensor, " n"], y: Float[Tensor, " n"]) -> float | None:
    """Spearman's rank correlation, equal values sharing the mean of their ranks; None where it is not defined.

    Example:
        >>> round(spearman(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([10.0, 30.0, 20.0])), 6)
        0.5
    """
    ranks = torch.stack([_ranks(x), _ranks(y)])
    centred = ranks - ranks.mean(dim=1, keepdim=True)
    lengths = centred.norm(dim=1)
    return float(centred[0] @ centred[1] / (lengths[0] * lengths[1])) if (lengths > 0).all() else None


def _ranks(x: Tensor) -> Tensor:
    """Ranks from 0, the mean of their ranks for equal values."""
    x = x.detach().double()
    return (x < x.unsqueeze(-1)).sum(-1).double() + ((x == x.unsqueeze(-1)).sum(-1).double() - 1) / 2
