"""Sparse activations: coordinates of the active features, and products with the matrix rows that they select."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

DENSE = 0.12
"""Share of active features above which a dense matrix product is faster than the sparse form, on a CPU."""


class SparseFeatures(NamedTuple):
    """Active features of each token.

    Attributes:
        values: ``(*batch, k)``; zero where a token has fewer than k.
        indices: ``(*batch, k)``, int64, columns of the features; ascending unless the rule selects, else in any order.
    """

    values: Tensor
    indices: Tensor


class Active(NamedTuple):
    """Values at some coordinates of a matrix ``(n, n_features)``, ordered by token.

    Attributes:
        rows: ``(m,)``, numbers of the tokens, ascending.
        columns: ``(m,)``, columns of the features.
        values: ``(m,)``.
    """

    rows: Tensor
    columns: Tensor
    values: Tensor

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


def times_rows(active: Active, weight: Tensor, n: int) -> Tensor:
    """Multiply the active features of n tokens with ``weight (n_features, d)``: ``(n, d)``, in O(m d).

    The gradient reaches the values and not the weight.
    """
    offsets = torch.searchsorted(active.rows, torch.arange(n, device=active.rows.device))
    return functional.embedding_bag(
        active.columns, weight.detach(), offsets, mode="sum", per_sample_weights=active.values.to(weight.dtype)
    )


def times_rows_of_each(values: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
    """Multiply k features of each token, ``(*batch, k)``, with ``weight``: ``(*batch, d)``, in O(k d) a token."""
    shape = (*values.shape[:-1], weight.shape[-1])
    if not values.numel():
        return weight.new_zeros(shape)
    k = values.shape[-1]
    bags = functional.embedding_bag(
        indices.reshape(-1, k), weight.detach(), mode="sum", per_sample_weights=values.reshape(-1, k).to(weight.dtype)
    )
    return bags.reshape(shape)


class _PreActivations(torch.autograd.Function):
    """Given pre-activations at some coordinates, differentiable as a function of the tokens ``(n, d)``."""

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
    """Return ``values`` with the gradient of ``(z @ w_enc.T)[rows, columns]`` with respect to z."""
    return _PreActivations.apply(z, values, rows, columns, w_enc)  # type: ignore[no-any-return, no-untyped-call]


def union(one: Active, other: Active, n_features: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return rows and columns of the coordinates in either, and both values at each of them, zero where absent."""
    keys = [part.rows * n_features + part.columns for part in (one, other)]
    either = torch.unique(torch.cat(keys))
    values = [
        part.values.new_zeros(len(either)).index_add(0, torch.searchsorted(either, key), part.values)
        for part, key in zip((one, other), keys, strict=True)
    ]
    return either // n_features, either % n_features, values[0], values[1]
