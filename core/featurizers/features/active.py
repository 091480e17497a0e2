"""Features that are not 0: `Active`, as coordinates, and `SparseFeatures`, those of a token side by side."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class SparseFeatures(NamedTuple):
    """Active features of each token, side by side.

    Attributes:
        values: ``(*batch, k)``; zero where a token has fewer than k.
        indices: ``(*batch, k)``, int64, columns of the features; ascending, but for the zeros that fill a token.
    """

    values: Tensor
    indices: Tensor


class Active(NamedTuple):
    """Values at some coordinates of a matrix ``(n, n_features)``, ordered by token.

    Attributes:
        rows: ``(m,)``, int64, numbers of the tokens, ascending.
        columns: ``(m,)``, int64, columns of the features, ascending within a token.
        values: ``(m,)``.
    """

    rows: Tensor
    columns: Tensor
    values: Tensor

    def offsets(self, n: int) -> Tensor:
        """Return where each of n tokens begins, and where the last one ends: int64 ``(n + 1,)``, as Arrow has lists."""
        return torch.searchsorted(self.rows, torch.arange(n + 1, device=self.rows.device))

    def nonzero(self) -> Active:
        """Return the coordinates whose value is not 0."""
        kept = self.values != 0
        return self if bool(kept.all()) else Active(self.rows[kept], self.columns[kept], self.values[kept])

    def padded(self, n: int) -> SparseFeatures:
        """Return the values of each of n tokens side by side."""
        counts = torch.bincount(self.rows, minlength=n)
        k = int(counts.max()) if n else 0
        slot = torch.arange(len(self.rows), device=self.rows.device) - (counts.cumsum(0) - counts)[self.rows]
        values = self.values.new_zeros(n, k).index_put((self.rows, slot), self.values)
        indices = self.columns.new_zeros(n, k).index_put((self.rows, slot), self.columns)
        return SparseFeatures(values, indices)


def nonzero(features: Tensor) -> Active:
    """Return the nonzero values of a matrix ``(n, n_features)``."""
    rows, columns = features.nonzero(as_tuple=True)
    return Active(rows, columns, features[rows, columns])


def side_by_side(active: Active, batch: tuple[int, ...]) -> SparseFeatures:
    """Return the features of tokens of shape ``batch``, each token's side by side."""
    values, indices = active.padded(torch.Size(batch).numel())
    shape = (*batch, values.shape[-1])
    return SparseFeatures(values.reshape(shape), indices.reshape(shape))
