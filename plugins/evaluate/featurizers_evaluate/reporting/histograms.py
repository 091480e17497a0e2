"""`Histograms`: histograms of many features, whose ranges grow with the values."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

BARS: Final = 64
HALF: Final = BARS // 2
LEAST: Final = -126
"""Exponent of the narrowest bars."""


class Histograms:
    """Histograms of features, exact whatever the range of the values, in memory that does not grow with them.

    A bar of feature f is ``2 ** exponent[f]`` wide, and bar j begins at ``centre[f] + (j - 32) * 2 ** exponent[f]``. A
    value beyond the range doubles the width until it fits, and pairs of bars become one; no value is lost.

    Args:
        centre: of each feature, ``(n_features,)`` float32.

    Attributes:
        centre: as given.
        exponent: ``(n_features,)`` int64.
        counts: ``(n_features, 64)`` int64.
    """

    def __init__(self, centre: Tensor) -> None:
        self.centre = centre
        self.exponent = torch.full(centre.shape, LEAST, dtype=torch.long, device=centre.device)
        self.counts = torch.zeros(len(centre), BARS, dtype=torch.long, device=centre.device)

    def add(self, columns: Tensor, values: Tensor) -> None:
        """Count finite values ``(m,)`` float32 of the features ``columns``, ``(m,)``."""
        distance = values.double() - self.centre[columns].double()
        largest = torch.zeros(len(self.centre), dtype=torch.float64, device=values.device)
        largest.scatter_reduce_(0, columns, distance.abs(), "amax")
        # |x| < 2 ** frexp(x).exponent, so that 32 bars of a 32nd of it reach beyond x
        needed = torch.frexp(largest).exponent.long() - (HALF.bit_length() - 1)
        self._widen(torch.maximum(needed, self.exponent))
        bars = torch.floor(torch.ldexp(distance, -self.exponent[columns])).long() + HALF
        self.counts.view(-1).index_add_(0, columns * BARS + bars.clamp(0, BARS - 1), torch.ones_like(bars))

    def _widen(self, exponent: Tensor) -> None:
        """Make bars wider, where the exponent is larger than it was."""
        changed = (exponent > self.exponent).nonzero().squeeze(-1)
        if not len(changed):
            return
        shift = (exponent - self.exponent)[changed].clamp(max=HALF.bit_length())[:, None]
        bars = ((torch.arange(BARS, device=exponent.device) - HALF) >> shift) + HALF
        self.counts[changed] = torch.zeros_like(self.counts[changed]).scatter_add_(1, bars, self.counts[changed])
        self.exponent = exponent

    def edges(self, feature: int) -> list[float]:
        """Return the 65 edges of the bars of a feature."""
        width = 2.0 ** int(self.exponent[feature])
        return [float(self.centre[feature]) + (bar - HALF) * width for bar in range(BARS + 1)]
