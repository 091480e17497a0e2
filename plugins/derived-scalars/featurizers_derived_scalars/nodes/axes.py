"""`NodeAxis`: what the axes of derived scalars count."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from featurizers_derived_scalars.circuit import PlaceAxis

NodeAxis: TypeAlias = PlaceAxis | Literal["feature", "pair"]
"""Axes of places, ``feature`` of a featurizer, and ``pair``: the pairs of a token and a key that is not after it,
row by row of the lower triangle."""


def at_least_float32(tensor: Tensor) -> Tensor:
    """Cast to float32; float64 stays."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def pair_of(pair: int) -> tuple[int, int]:
    """Return token and key of a number on the axis ``pair``.

    Examples:
        >>> [pair_of(p) for p in range(4)]
        [(0, 0), (1, 0), (1, 1), (2, 0)]
    """
    token = (math.isqrt(8 * pair + 1) - 1) // 2
    return token, pair - token * (token + 1) // 2
