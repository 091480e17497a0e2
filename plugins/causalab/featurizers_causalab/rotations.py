"""Convert the two tensors that `torch.nn.utils.parametrizations.orthogonal` stores to a basis, and back."""

from __future__ import annotations

from typing import Any

import torch
from featurizers.errors import WeightsError
from featurizers_subspace import SubspaceFeaturizer, stiefel
from jaxtyping import Float
from torch import Tensor

ROUNDING = 1e-4
"""Largest deviation of a single-precision rotation from orthonormal columns that counts as rounding."""
MAX_TRAINED = 8192
"""Largest dimension d for which a trained rotation is computed, at O(d³)."""
ORIGINAL, BASE = "rotate.parametrizations.weight.original", "rotate.parametrizations.weight.0.base"


def rotation_of(state: Any, where: str) -> Float[Tensor, "d k"]:
    """Compute the rotation that a state dict parametrises: ``base @ Q``, where ``original`` defines the orthogonal Q.

    Q is a matrix exponential if ``original`` is square, else a product of Householder reflections. This is torch's
    choice; the file does not name it. If the rotation was never trained, Q is the identity.

    Args:
        state: a state dict with ``original`` ``(d, k)`` and ``base`` ``(d, d)``.
        where: names the source in an error.

    Raises:
        WeightsError: it is not such a state dict, or d is too large.
    """
    if not isinstance(state, dict) or state.keys() != {ORIGINAL, BASE}:
        keys = sorted(map(str, state)) if isinstance(state, dict) else type(state).__name__
        raise WeightsError(where, f"the state of a rotation holds {ORIGINAL!r} and {BASE!r}, not {keys!r}")
    original, base = state[ORIGINAL], state[BASE]
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor) or tensor.dim() != 2 or not tensor.is_floating_point():
            raise WeightsError(where, f"{name!r} is not a matrix of real numbers")
    d, k = original.shape
    if not 0 < k <= d or base.shape != (d, d):
        raise WeightsError(
            where,
            f"the tensors of a rotation have the shapes (d, k) and (d, d) with k <= d, not {tuple(original.shape)} and "
            f"{tuple(base.shape)}",
        )
    dtype = torch.promote_types(original.dtype, torch.float32)
    x = original.to(dtype)
    if torch.equal(x, -torch.eye(d, k, dtype=dtype)):
        untrained: Tensor = base[:, :k].to(dtype, copy=True)
        return untrained
    if d > MAX_TRAINED:
        raise WeightsError(where, f"a trained rotation has {MAX_TRAINED} dimensions at most, not {d}")
    if d == k:
        lower = x.tril()
        q = torch.matrix_exp(lower - lower.mT)
    else:
        reflectors = x.tril(-1)
        q = torch.linalg.householder_product(reflectors, 2 / (1 + reflectors.square().sum(dim=0)))
        q = q * x.diagonal().trunc()  # the diagonal holds signs, which torch truncates to integers
    rotation: Tensor = base.to(dtype) @ q
    return rotation


def subspace_of(rotation: Float[Tensor, "d k"]) -> SubspaceFeaturizer:
    """Build the subspace of a rotation, in single precision at least.

    If the columns are not orthonormal because of rounding (half precision, a truncated decomposition, the product of
    trained reflections), the nearest orthonormal basis is used.

    Raises:
        BasisError: the columns are not orthonormal, or there are more columns than rows.
    """
    wide = rotation.detach().to(torch.promote_types(rotation.dtype, torch.float32))
    deviation = stiefel.deviation(wide) if wide.dim() == 2 else 0.0
    rounded = stiefel.tolerance(wide.dtype) < deviation <= max(ROUNDING, stiefel.tolerance(rotation.dtype))
    return SubspaceFeaturizer.from_basis(wide, orthonormalize=rounded)


def state_of(rotation: Float[Tensor, "d k"]) -> dict[str, Tensor]:
    """Return torch's state dict of an orthonormal matrix: ``base`` holds the rotation, ``original`` stands for Q = I.

    The format requires a ``base`` ``(d, d)``, so the rotation is completed to an orthonormal basis of the whole space.
    """
    rotation = rotation.detach().to("cpu", torch.float32)
    d, k = rotation.shape
    complete, _ = torch.linalg.qr(rotation.double(), mode="complete")
    base = torch.cat([rotation, complete[:, k:].float()], dim=1)
    return {ORIGINAL: -torch.eye(d, k), BASE: base}
