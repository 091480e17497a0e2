"""`Sums`: sums over tokens, and the same sums of resampled documents, for values and their intervals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

import numpy as np
import torch
from torch import Tensor

LEAST_DOCUMENTS: Final = 20
"""Documents below which no interval is given: percentiles of so few are too narrow."""


class Weights:
    """Weights of documents: 1 for the value itself, and a Poisson number of each resample.

    The Poisson bootstrap (Hanley and MacGibbon 2006; Chamandy et al. 2012, "Estimating Uncertainty for Massive Data
    Streams") draws each document a number of times that is independent of the others, so that one reading of the data
    is enough and memory does not grow with it. Documents are drawn as a whole, because their tokens depend on each
    other.

    Args:
        resamples: number of resamples.
        seed: of the drawing.

    Attributes:
        documents: number of documents that were seen.
    """

    def __init__(self, resamples: int, seed: int) -> None:
        self._resamples = resamples
        self._random = np.random.Generator(np.random.Philox(seed))
        self._last, self._drawn = -1, torch.ones(1 + resamples, dtype=torch.float64)
        self.documents = 0

    def of(self, documents: Sequence[int]) -> Tensor:
        """Return ``(rows, 1 + resamples)`` float64 for the document of each row; documents come in their order."""
        rows = []
        for document in documents:
            if document != self._last:
                drawn = torch.from_numpy(self._random.poisson(1.0, self._resamples).astype(np.float64))
                self._drawn = torch.cat([torch.ones(1, dtype=torch.float64), drawn])
                self._last, self.documents = document, self.documents + 1
            rows.append(self._drawn)
        return torch.stack(rows)


class Sums:
    """Weighted sums of numbers and of one vector over all tokens, in float64.

    The vector and its squared norm are taken from the first vector that is added, so that a mean that is large beside
    the variance costs no digits.

    Args:
        parts: sums of parts of the vector, such as the activations at one write; the variance is the sum of theirs.

    Attributes:
        vector: sum of the vectors less the shift, ``(1 + resamples, d)``; None before the first, and with parts.
        shift: the first vector, ``(d,)``.
    """

    def __init__(self, parts: Sequence[Sums] = ()) -> None:
        self._totals: dict[str, Tensor] = {}
        self._parts = parts
        self.vector: Tensor | None = None
        self.shift: Tensor | None = None

    def add(self, weights: Tensor, rows: Mapping[str, Tensor]) -> None:
        """Add sums of each row ``(rows,)``, by name, weighted by ``(rows, 1 + resamples)``."""
        for name, values in rows.items():
            total = weights.T @ values.to("cpu", torch.float64)
            self._totals[name] = self._totals[name] + total if name in self._totals else total

    def add_vectors(self, weights: Tensor, y: Tensor, kept: Tensor) -> None:
        """Add vectors ``(rows, width, d)`` of the tokens that ``kept`` marks, ``(rows, width)``, and squared norms."""
        if not bool(kept.any()):
            return
        if self.shift is None:
            self.shift = y[kept][0].to(torch.float64)
        centred = torch.where(kept[..., None], y.to(torch.float64) - self.shift, 0.0)
        summed = weights.T @ centred.sum(dim=1).cpu()
        self.vector = summed if self.vector is None else self.vector + summed
        self.add(weights, {"centred": centred.square().sum(dim=(1, 2))})

    def include(self, other: Sums) -> None:
        """Add the sums of other tokens, whose vectors may have another shift."""
        totals = dict(other._totals)
        if other.vector is not None and other.shift is not None:
            shift = other.shift.cpu()
            self.shift = shift if self.shift is None else self.shift.cpu()
            offset, n = shift - self.shift, other["tokens"]
            moved = other.vector + n[:, None] * offset
            totals["centred"] = other["centred"] + 2 * (other.vector @ offset) + n * offset.square().sum()
            self.vector = moved if self.vector is None else self.vector + moved
        for name, total in totals.items():
            self._totals[name] = self._totals[name] + total if name in self._totals else total

    def __getitem__(self, name: str) -> Tensor:
        """Return a sum and its resamples, ``(1 + resamples,)``; zero if nothing was added."""
        return self._totals.get(name, torch.zeros(1, dtype=torch.float64))

    def mean(self, name: str, count: str) -> Tensor:
        """Return the sum of one name over that of another, ``(1 + resamples,)``."""
        return self[name] / self[count]

    def variance(self) -> Tensor:
        """Return the variance of the vectors, summed over coordinates and divided by n, ``(1 + resamples,)``."""
        if self._parts:
            return torch.stack([part.variance() for part in self._parts]).sum(dim=0)
        if self.vector is None:
            return torch.full((1,), torch.nan, dtype=torch.float64)
        n = self["tokens"]
        return self["centred"] / n - (self.vector / n[:, None]).square().sum(dim=-1)

    def mean_vector(self) -> Tensor:
        """Return the mean of the vectors, ``(d,)`` float64.

        Raises:
            ValueError: no vector was added.
        """
        if self.vector is None or self.shift is None:
            raise ValueError("no vector was added")
        return self.shift.cpu() + self.vector[0] / self["tokens"][0]


def interval(values: Tensor, documents: int) -> tuple[float, float] | None:
    """Return the 95 % interval of a value by the percentiles of its resamples; None if documents are too few.

    Args:
        values: the value, and that of each resample, ``(1 + resamples,)``.
        documents: number of documents.
    """
    resampled = values[1:]
    resampled = resampled[resampled.isfinite()]
    if documents < LEAST_DOCUMENTS or len(resampled) < LEAST_DOCUMENTS:
        return None
    low, high = torch.quantile(resampled, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def per_row(values: Tensor, kept: Tensor) -> Tensor:
    """Return the sum over the kept tokens of each row, ``(rows,)`` float64, of values ``(rows, width)``."""
    return torch.where(kept, values.to(torch.float64), 0.0).sum(dim=-1)


Function = Callable[[Sums], Tensor]
"""A metric: of sums, its value and that of each resample."""
