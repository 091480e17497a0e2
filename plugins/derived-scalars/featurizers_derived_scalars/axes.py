"""`Axis`: what the axes of derived scalars count."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

import torch
from torch import Tensor

Axis: TypeAlias = Literal["token", "key", "head", "d_head", "d_model", "neuron", "vocab", "one", "feature", "pair"]
"""The axes of places, and two more: ``feature`` of a featurizer, and ``pair``, the pairs of a token and a key that is
not after it, rows of the lower triangle one after the other."""


def exact(tensor: Tensor) -> Tensor:
    """A tensor in float32, or in float64 if it is that: what contractions are computed in."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def pair_of(pair: int) -> tuple[int, int]:
    """Token and key of a number on the axis ``pair``.

    Example:
        >>> [pair_of(p) for p in range(4)]
        [(0, 0), (1, 0), (1, 1), (2, 0)]
    """
    token = (math.isqrt(8 * pair + 1) - 1) // 2
    return token, pair - token * (token + 1) // 2
