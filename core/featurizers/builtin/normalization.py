"""Normalisation of each token's activations before a dictionary encodes them, and its inverse."""

from __future__ import annotations

import math
from typing import Any, Literal, TypeAlias

from jaxtyping import Float
from torch import Tensor

Normalization: TypeAlias = Literal["none", "layer-norm", "constant-norm", "scale"]
"""``layer-norm``: (x - mean) / (std + 1e-5) with the unbiased standard deviation; the inverse is y std + mean.
``constant-norm``: to the norm √d. ``scale``: times a fixed number. The formulas are SAELens'."""


def normalize(
    x: Float[Tensor, "*batch d"], how: Normalization, scale: float
) -> tuple[Float[Tensor, "*batch d"], tuple[Tensor, ...]]:
    """Return normalised activations, and the statistics ``(*batch, 1)`` of each token that the inverse needs."""
    match how:
        case "layer-norm":
            mean = x.mean(dim=-1, keepdim=True)
            centred = x - mean
            std = centred.std(dim=-1, keepdim=True) if x.numel() else mean
            return centred / (std + 1e-5), (mean, std)
        case "constant-norm":
            factor = math.sqrt(x.shape[-1]) / x.norm(dim=-1, keepdim=True).clamp(min=1e-12)
            return x * factor, (factor,)
        case "scale":
            return x * scale, ()
        case "none":
            return x, ()


def denormalize(
    y: Float[Tensor, "*batch d"], how: Normalization, scale: float, statistics: tuple[Any, ...], *, offset: bool = True
) -> Float[Tensor, "*batch d"]:
    """Invert `normalize`; with ``offset=False``, turn a change of y into the change of x."""
    match how:
        case "layer-norm":
            mean, std = statistics
            y = y * std
            return y + mean if offset else y
        case "constant-norm":
            factor: Tensor = statistics[0]
            return y / factor
        case "scale":
            return y / scale
        case "none":
            return y
