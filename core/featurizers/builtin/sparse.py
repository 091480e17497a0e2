"""Products of active features with the matrix rows that they select."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from featurizers.features.active import Active

DENSE = 0.12
"""Share of active features above which a dense matrix product is faster than the sparse form, on a CPU."""


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
