"""Ablation of a subspace: of activations, and of a model's activations at a site while it runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import get_args

import torch
from featurizers import Anatomy, Site
from featurizers.errors import BasisError, ShapeError, UsageError
from featurizers.models import hook
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from featurizers_causal_basis.derangement import derange
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
    """Activations without what they say along the column space of a matrix: u + P(m - u).

    P projects on the columns and m is zero, the mean over the tokens, or the activations of another token. P is never
    made: the cost is O(d k) a token, and O(d k²) for the matrix. Computed in fp32 at least, and differentiable in both.

    Args:
        u: activations; all axes but the last are tokens.
        A: columns that span what is to be removed, or one vector.
        mode: ``zero``, ``mean`` or ``resample``.
        orthonormal: whether the columns are orthonormal already; else a basis of their span is computed.
        mask: which tokens take part, true or 1. The others enter no mean and are nobody's substitute, and come back as
            they were.
        generator: of the order of the tokens, which ``resample`` needs.

    Raises:
        ShapeError: the matrix has another width, or the mask another shape.
        BasisError: the columns are dependent, or said to be orthonormal and are not.
        UsageError: the mode is none; ``mean`` or ``resample`` of fewer than 2 tokens; ``resample`` without a generator.

    Example:
        >>> u = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> remove_subspace(u, torch.tensor([0.0, 5.0]), "mean")
        tensor([[1., 3.],
                [3., 3.]])
    """
    if mode not in get_args(Mode):
        raise UsageError(f"a mode of ablation is one of {', '.join(get_args(Mode))}, not {mode!r}")
    if not u.is_floating_point() or u.dim() == 0:
        raise ShapeError(f"activations are real with their width on the last axis, got {u.dtype} {tuple(u.shape)}")
    basis = _orthonormal(A, u, given=orthonormal)
    taking_part = None if mask is None else _as_bool(mask, u)
    tokens = (u if taking_part is None else u[taking_part]).reshape(-1, u.shape[-1]).to(basis.dtype)
    if mode != "zero" and len(tokens) < 2:
        raise UsageError(f"{mode} ablation takes 2 tokens or more, and {len(tokens)} take part")
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
    return edited.reshape(u.shape) if taking_part is None else u.index_put((taking_part,), edited)


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
    """A context in which a subspace of a site's activations is ablated, whenever the model runs.

    The means and the order of the tokens are those of each run.

    Args:
        model: a decoder that `featurizers.Anatomy` understands.
        A: as in `remove_subspace`, and so are the others.
        site: ``resid.pre:8`` is what block 8 is given, ``resid.post:8`` what it gives.
        mode: of ablation.
        orthonormal: whether the columns are.
        mask: which tokens of the prompts take part.
        generator: for ``resample``.

    Yields:
        The model.

    Raises:
        SiteError: the model does not have the site.
        ShapeError, BasisError, UsageError: as `remove_subspace`; raised while the model runs.
    """
    handle = hook(
        Anatomy(model).place(site),
        lambda hidden: remove_subspace(hidden, A, mode, orthonormal, mask=mask, generator=generator),
    )
    try:
        yield model
    finally:
        handle.remove()


def _orthonormal(A: Tensor, u: Tensor, *, given: bool) -> Tensor:
    """An orthonormal basis ``(d, k)`` of the columns, on the device of the activations, in fp32 at least."""
    matrix = A.unsqueeze(-1) if A.dim() == 1 else A
    if matrix.dim() != 2 or not matrix.is_floating_point() or matrix.shape[0] != u.shape[-1]:
        raise ShapeError(
            f"the activations have width {u.shape[-1]}, so that the columns are a real matrix ({u.shape[-1]}, k) or a "
            f"vector, got {A.dtype} {tuple(A.shape)}"
        )
    matrix = matrix.to(device=u.device, dtype=torch.promote_types(torch.promote_types(A.dtype, u.dtype), torch.float32))
    if given:
        gram = matrix.detach().mT @ matrix.detach()
        off = float((gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)).abs().max()) if len(gram) else 0
        if not off <= max(1e-4, 4 * torch.finfo(A.dtype).eps):
            raise BasisError(
                f"the columns were said to be orthonormal, but AᵀA differs from I by {off:.2g}; "
                "leave out orthonormal=True"
            )
        return matrix
    lengths = matrix.norm(dim=0)
    if matrix.shape[1] > matrix.shape[0] or not (lengths > 0).all() or not lengths.isfinite().all():
        raise BasisError(
            f"the columns of the matrix {tuple(matrix.shape)} are more than its rows, or one is zero or not finite"
        )
    basis: Tensor
    basis, triangle = torch.linalg.qr(matrix / lengths)
    smallest = float(triangle.detach().diagonal().abs().min()) if matrix.shape[1] else 1.0
    if not smallest > max(matrix.shape) * torch.finfo(matrix.dtype).eps:
        raise BasisError(
            f"the {matrix.shape[1]} columns are linearly dependent, so that they span less; leave some out"
        )
    return basis


def _as_bool(mask: Tensor, u: Tensor) -> Tensor:
    if mask.shape != u.shape[:-1] or mask.is_floating_point():
        raise ShapeError(
            f"the mask says of each token whether it takes part, as booleans or 0 and 1 {tuple(u.shape[:-1])}, got "
            f"{mask.dtype} {tuple(mask.shape)}"
        )
    return mask.to(device=u.device, dtype=torch.bool)
