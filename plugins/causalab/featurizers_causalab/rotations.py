"""Rotations as `torch.nn.utils.parametrizations.orthogonal` stores them: from its two tensors to a basis, and back."""

from __future__ import annotations

from typing import Any

import torch
from featurizers.errors import WeightsError
from featurizers_subspace import SubspaceFeaturizer, stiefel
from jaxtyping import Float
from torch import Tensor

ROUNDING = 1e-4
"""How far from orthonormal the columns of a rotation in single precision may be."""
MOST_TRAINED = 8192
"""Of how many dimensions a rotation is computed from what training left: that takes a time of their third power."""
ORIGINAL, BASE = "rotate.parametrizations.weight.original", "rotate.parametrizations.weight.0.base"


def rotation_of(state: Any, where: str) -> Float[Tensor, "d k"]:
    """The rotation that a state dict parametrises: ``base @ Q``, with Q the orthogonal matrix that the other gives.

    Q is the matrix exponential where ``original`` is square, and a product of Householder reflections elsewhere: the
    choice of torch, which the file does not name. Both are the identity for a rotation that was never trained.

    Args:
        state: a state dict with ``original`` ``(d, k)`` and ``base`` ``(d, d)``.
        where: what to call it in an error.

    Raises:
        WeightsError: it is not such a state dict.
    """
    if not isinstance(state, dict) or state.keys() != {ORIGINAL, BASE}:
        given = sorted(map(str, state)) if isinstance(state, dict) else type(state).__name__
        raise WeightsError(where, f"the state of a rotation holds {ORIGINAL!r} and {BASE!r}, not {given!r}")
    original, base = state[ORIGINAL], state[BASE]
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor) or tensor.dim() != 2 or not tensor.is_floating_point():
            raise WeightsError(where, f"{name!r} is not a matrix of real numbers")
    d, k = original.shape
    if not 0 < k <= d or base.shape != (d, d):
        raise WeightsError(
            where,
            f"the state of a rotation into k of d dimensions is (d, k) and (d, d), not {tuple(original.shape)} and "
            f"{tuple(base.shape)}",
        )
    dtype = torch.promote_types(original.dtype, torch.float32)
    x = original.to(dtype)
    if torch.equal(x, -torch.eye(d, k, dtype=dtype)):
        untrained: Tensor = base[:, :k].to(dtype, copy=True)
        return untrained
    if d > MOST_TRAINED:
        raise WeightsError(where, f"a rotation of {d} dimensions is more than is computed here, {MOST_TRAINED}")
    if d == k:
        lower = x.tril()
        q = torch.matrix_exp(lower - lower.mT)
    else:
        reflectors = x.tril(-1)
        q = torch.linalg.householder_product(reflectors, 2 / (1 + reflectors.square().sum(dim=0)))
        q = q * x.diagonal().trunc()  # signs, which torch reads as integers
    rotation: Tensor = base.to(dtype) @ q
    return rotation


def subspace_of(rotation: Float[Tensor, "d k"]) -> SubspaceFeaturizer:
    """The subspace of a rotation, in single precision at least; what rounding took from its columns is put right.

    That is what half precision takes, a truncated decomposition, or the products of a training's reflections.

    Raises:
        BasisError: the columns are not orthonormal, or more than the rows.
    """
    wide = rotation.detach().to(torch.promote_types(rotation.dtype, torch.float32))
    off = stiefel.deviation(wide) if wide.dim() == 2 else 0.0
    rounded = stiefel.tolerance(wide.dtype) < off <= max(ROUNDING, stiefel.tolerance(rotation.dtype))
    return SubspaceFeaturizer.from_basis(wide, orthonormalize=rounded)


def state_of(rotation: Float[Tensor, "d k"]) -> dict[str, Tensor]:
    """The state dict that torch gives an orthonormal matrix: it is in the base, and the rest is the identity.

    The base is ``(d, d)``, the rotation completed to an orthonormal basis of everything: its size is that of the
    format.
    """
    rotation = rotation.detach().to("cpu", torch.float32)
    d, k = rotation.shape
    complete, _ = torch.linalg.qr(rotation.double(), mode="complete")
    base = torch.cat([rotation, complete[:, k:].float()], dim=1)
    return {ORIGINAL: -torch.eye(d, k), BASE: base}
