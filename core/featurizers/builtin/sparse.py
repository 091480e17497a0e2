"""Features of which few fire: their coordinates, and products with the rows of a matrix that they name."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

DENSE = 0.12
"""The share of features that fire above which a matrix product is faster than its sparse form, on a CPU."""


class SparseFeatures(NamedTuple):
    """The features of each token that fire.

    Attributes:
        values: ``(*batch, k)``; zero where a token has fewer than k.
        indices: ``(*batch, k)``, int64; which features, ascending for rules that do not select, else in any order.
    """

    values: Tensor
    indices: Tensor


class Active(NamedTuple):
    """The features that fire among those of n tokens, as coordinates ordered by token.

    Attributes:
        rows: ``(m,)``, which token, ascending.
        columns: ``(m,)``, which feature.
        values: ``(m,)``.
    """

    rows: Tensor
    columns: Tensor
    values: Tensor

    def padded(self, n: int) -> SparseFeatures:
        """Those of each of n tokens side by side."""
        counts = torch.bincount(self.rows, minlength=n)
        k = int(counts.max()) if n else 0
        place = torch.arange(len(self.rows), device=self.rows.device) - (counts.cumsum(0) - counts)[self.rows]
        values = self.values.new_zeros(n, k).index_put((self.rows, place), self.values)
        indices = self.columns.new_zeros(n, k).index_put((self.rows, place), self.columns)
        return SparseFeatures(values, indices)


def nonzero(features: Tensor) -> Active:
    """The coordinates of a matrix ``(n, n_features)``."""
    rows, columns = features.nonzero(as_tuple=True)
    return Active(rows, columns, features[rows, columns])


def times_rows(active: Active, weight: Tensor, n: int) -> Tensor:
    """The product of the features of n tokens with ``weight (n_features, d)``: ``(n, d)``, in O(m d).

    The gradient reaches the values and not the weight.
    """
    offsets = torch.searchsorted(active.rows, torch.arange(n, device=active.rows.device))
    return functional.embedding_bag(
        active.columns, weight.detach(), offsets, mode="sum", per_sample_weights=active.values.to(weight.dtype)
    )


def times_rows_of_each(values: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
    """The same of k features of each token, ``(*batch, k)``: ``(*batch, d)``, in O(k d) a token."""
    shape = (*values.shape[:-1], weight.shape[-1])
    if not values.numel():
        return weight.new_zeros(shape)
    k = values.shape[-1]
    bags = functional.embedding_bag(
        indices.reshape(-1, k), weight.detach(), mode="sum", per_sample_weights=values.reshape(-1, k).to(weight.dtype)
    )
    return bags.reshape(shape)


class _PreActivations(torch.autograd.Function):
    """Pre-activations at some coordinates, computed already, as a function of the tokens ``(n, d)``."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, values: Tensor, rows: Tensor, columns: Tensor, w_enc: Tensor) -> Tensor:
        ctx.save_for_backward(rows, columns, w_enc)
        ctx.n = len(z)
        return values.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        rows, columns, w_enc = ctx.saved_tensors
        return times_rows(Active(rows, columns, grads[0]), w_enc, ctx.n), None, None, None, None


def pre_activations(z: Tensor, values: Tensor, rows: Tensor, columns: Tensor, w_enc: Tensor) -> Tensor:
    """``values``, with the gradient that ``(z @ w_enc.T)[rows, columns]`` has in z."""
    return _PreActivations.apply(z, values, rows, columns, w_enc)  # type: ignore[no-any-return, no-untyped-call]


def union(one: Active, other: Active, n_features: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows and columns of the coordinates that are in either, and the values of each at them, zero where absent."""
    keys = [part.rows * n_features + part.columns for part in (one, other)]
    either = torch.unique(torch.cat(keys))
    values = [
        part.values.new_zeros(len(either)).index_add(0, torch.searchsorted(either, key), part.values)
        for part, key in zip((one, other), keys, strict=True)
    ]
    return either // n_features, either % n_features, values[0], values[1]
