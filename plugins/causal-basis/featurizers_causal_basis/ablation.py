"""Ablation of a subspace: in activations, and at a site of a model while it runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import get_args

import torch
from featurizers import Anatomy, Site
from featurizers.errors import BasisError, ShapeError, UsageError
from featurizers.models import eager, hook
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from featurizers_causal_basis.inputs import boolean_mask, derange
from featurizers_causal_basis.record import Mode


def remove_subspace(
    u: Float[Tensor, "*tokens d"],
    A: Float[Tensor, "d k"] | Float[Tensor, " d"],
    mode: Mode = "zero",
    orthonormal: bool = False,
    *,
    mask: Bool[Tensor, "*tokens"] | Int[Tensor, "*tokens"] | None = None,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "*tokens d"]:
    """Return activations with the column space of a matrix ablated: u + P(m - u).

    P projects on the columns, and m is zero, the mean over the tokens, or the activations of another token. P is never
    built: the cost is O(d k) per token, and O(d k²) for the matrix. Computed in fp32 at least, and differentiable in
    ``u`` and ``A``.

    Args:
        u: activations; every axis but the last is a token axis.
        A: columns that span the subspace to remove, or a single vector.
        mode: ``zero``, ``mean`` or ``resample``.
        orthonormal: True if the columns are orthonormal; else an orthonormal basis of their span is computed.
        mask: selects the tokens to ablate, true or 1. The others do not enter the mean, replace no other token, and
            are returned unchanged.
        generator: draws the order of the tokens; required by ``resample``.

    Raises:
        ShapeError: the matrix has another width, or the mask another shape.
        BasisError: the columns are linearly dependent, or ``orthonormal`` is set and they are not.
        UsageError: the mode is unknown; ``mean`` or ``resample`` has fewer than 2 tokens; ``resample`` has no
            generator.

    Examples:
        >>> u = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> remove_subspace(u, torch.tensor([0.0, 5.0]), "mean")
        tensor([[1., 3.],
                [3., 3.]])
    """
    if mode not in get_args(Mode):
        raise UsageError(f"a mode of ablation is one of {', '.join(get_args(Mode))}, not {mode!r}")
    if not u.is_floating_point() or u.dim() == 0:
        raise ShapeError(f"activations are real with their width on the last axis, got {u.dtype} {tuple(u.shape)}")
    basis = _verified(A, u) if orthonormal else _orthonormalized(A, u)
    selected = None if mask is None else boolean_mask(mask, u.shape[:-1]).to(u.device)
    tokens = (u if selected is None else u[selected]).reshape(-1, u.shape[-1]).to(basis.dtype)
    if mode != "zero" and len(tokens) < 2:
        raise UsageError(f"{mode} ablation needs 2 tokens or more, got {len(tokens)}")
    coordinates = tokens @ basis
    if mode == "zero":
        change = -coordinates
    elif mode == "mean":
        change = coordinates.mean(dim=0) - coordinates
    elif generator is None:
        raise UsageError("resample ablation draws an order of the tokens: give generator=torch.Generator()")
    else:
        change = derange(coordinates, generator) - coordinates
    edited = (tokens + change @ basis.mT).to(u.dtype)
    return edited.reshape(u.shape) if selected is None else u.index_put((selected,), edited)


@contextmanager
def ablate_subspace(
    model: nn.Module,
    A: Float[Tensor, "d k"] | Float[Tensor, " d"],
    site: Site | str,
    mode: Mode = "zero",
    orthonormal: bool = False,
    *,
    mask: Bool[Tensor, "batch sequence"] | Int[Tensor, "batch sequence"] | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[nn.Module]:
    """Ablate a subspace of a site's activations whenever the model runs inside the context.

    Each forward pass has its own mean and its own order of the tokens.

    Args:
        model: a decoder that `featurizers.Anatomy` understands.
        A: as in `remove_subspace`, and so are ``mode``, ``orthonormal``, ``mask`` and ``generator``.
        site: ``resid.pre:8`` is the input of block 8, ``resid.post:8`` its output.
        mode: of ablation.
        orthonormal: True if the columns are orthonormal.
        mask: selects tokens of the prompts.
        generator: required by ``resample``.

    Yields:
        The model.

    Raises:
        SiteError: the model does not have the site.
        ShapeError, BasisError, UsageError: as `remove_subspace`; raised while the model runs.
    """
    place = Anatomy(model).place(site)
    with eager():
        handle = hook(
            place, lambda hidden: remove_subspace(hidden, A, mode, orthonormal, mask=mask, generator=generator)
        )
        try:
            yield model
        finally:
            handle.remove()


def _columns(A: Tensor, u: Tensor) -> Tensor:
    """Return the columns as a matrix ``(d, k)`` on the device of the activations, in fp32 at least."""
    matrix = A.unsqueeze(-1) if A.dim() == 1 else A
    if matrix.dim() != 2 or not matrix.is_floating_point() or matrix.shape[0] != u.shape[-1]:
        raise ShapeError(
            f"activations of width {u.shape[-1]} need the columns as a real matrix ({u.shape[-1]}, k) or a vector, "
            f"got {A.dtype} {tuple(A.shape)}"
        )
    return matrix.to(device=u.device, dtype=torch.promote_types(torch.promote_types(A.dtype, u.dtype), torch.float32))


def _verified(A: Tensor, u: Tensor) -> Float[Tensor, "d k"]:
    """Return the columns after checking that they are orthonormal."""
    matrix = _columns(A, u)
    gram = matrix.detach().mT @ matrix.detach()
    off = float((gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)).abs().max()) if len(gram) else 0
    if not off <= max(1e-4, 4 * torch.finfo(A.dtype).eps):
        raise BasisError(
            f"the columns are not orthonormal: AᵀA differs from I by {off:.2g}; leave out orthonormal=True"
        )
    return matrix


def _orthonormalized(A: Tensor, u: Tensor) -> Float[Tensor, "d k"]:
    """Return an orthonormal basis of the column space."""
    matrix = _columns(A, u)
    lengths = matrix.norm(dim=0)
    if matrix.shape[1] > matrix.shape[0] or not (lengths > 0).all() or not lengths.isfinite().all():
        raise BasisError(
            f"the matrix {tuple(matrix.shape)} has more columns than rows, or a column that is zero or not finite"
        )
    basis: Tensor
    basis, triangle = torch.linalg.qr(matrix / lengths)
    smallest = float(triangle.detach().diagonal().abs().min()) if matrix.shape[1] else 1.0
    if not smallest > max(matrix.shape) * torch.finfo(matrix.dtype).eps:
        raise BasisError(f"the {matrix.shape[1]} columns are linearly dependent; leave some out")
    return basis
