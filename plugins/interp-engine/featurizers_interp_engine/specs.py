"""`to_specs`: fixed edits as steering specs of interp-engine, which both its backends take."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from featurizers import Site, lower
from featurizers.errors import LoweringError
from featurizers.features import Program
from featurizers.models import Operation
from interp_engine.points import d_model_wide
from interp_engine.steer_specs import AblateSpec, AddSpec, OrthogonalDecompSpec, SteeringOp, SteeringSpec
from torch import Tensor

from featurizers_interp_engine.points import point_of

_EXACT = 1e-5
"""Largest difference, relative to the edit, that is taken for rounding."""


def to_specs(
    edits: Program | Operation | Iterable[Program | Operation], *, site: Site | str | None = None
) -> list[SteeringSpec]:
    """Return steering specs of interp-engine for fixed edits, in their order.

    A spec changes one direction at a time. `Steer` is one sum; `Ablate`, `Interchange` and `Mask` of a subspace scale
    the activations along orthonormal directions of it, and then add what the features are set to.

    Args:
        edits: operations that `featurizers.lower` takes, or what it returns.
        site: of the activations; None for the site of each featurizer.

    Raises:
        LoweringError: an edit has no such form, or has positions or special tokens; the message says what to do.
        SiteError: the site is no point of interp-engine.

    Examples:
        >>> import featurizers
        >>> f = featurizers.create("subspace", d_in=4, n_features=2, seed=0)
        >>> (spec,) = to_specs(featurizers.Ablate(f), site="resid.post:1")
        >>> spec.point, [type(operation).__name__ for operation in spec.layers[1].operations]
        ('resid_post', ['AblateSpec', 'AblateSpec'])
    """
    several = [edits] if isinstance(edits, Program | Operation) else list(edits)
    programs = [lower(edit) if isinstance(edit, Operation) else edit for edit in several]
    return [SteeringSpec.at(_point(program, site), *_operations(program)) for program in programs]


def _point(program: Program, site: Site | str | None) -> str:
    """Return the point of a program."""
    if program.positions is not None or program.special_tokens:
        what = "positions" if program.positions is not None else "special tokens"
        raise LoweringError(
            f"the edit has {what}, and a spec of interp-engine acts on every token: drop them with "
            "dataclasses.replace(program, positions=None, special_tokens=()), and leave tokens out by position_mask= "
            "and generated= of interp_engine.steer"
        )
    if (site := program.site if site is None else site) is None:
        raise LoweringError("the featurizer does not say where it belongs; give site='resid.post:8', or set its site")
    point = point_of(site)
    if point.partition(".")[0] not in d_model_wide() or point == "final_norm":
        raise LoweringError(f"{site} ({point}) takes no steering in interp-engine, which steers the residual stream")
    return point


def _operations(program: Program) -> list[SteeringOp]:
    """Return the operations that a program is when they are carried out in order."""
    if (vector := program.vector) is not None:
        return [AddSpec(vector.float(), 1.0)]
    if (affine := program.affine) is None:
        raise LoweringError(
            "the edit replaces features that can be inactive, as those of a dictionary, and a spec of interp-engine "
            "has no such gate; steer them, or edit an eager model with featurizers.intervene"
        )
    left, right, offset = (part.double() for part in affine)
    directions, scales = _eigen(left, right)
    operations: list[SteeringOp] = []
    for direction, scale in zip(directions, scales.tolist(), strict=True):
        if abs(scale + 1.0) <= _EXACT:
            operations.append(AblateSpec(direction.float()))
        else:
            operations.append(OrthogonalDecompSpec(direction.float(), 1.0 + scale))
    if offset.any():
        operations.append(AddSpec(offset.float(), 1.0))
    return operations


def _eigen(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Return orthonormal directions U ``(n, d)`` and scales s ``(n,)`` with ``left @ right = Uᵀ diag(s) U``.

    Raises:
        LoweringError: there are none, because the product is not symmetric: features are read along other directions
            than those along which they are written.
    """
    basis, _ = torch.linalg.qr(torch.cat([left, right.mT], dim=1))  # (d, m): holds all directions of both
    inner = (basis.mT @ left) @ (right @ basis)
    size = inner.abs().max()
    if (inner - inner.mT).abs().max() > _EXACT * size:
        raise LoweringError(
            "the edit reads its features along other directions than those along which it writes them, and a spec of "
            "interp-engine has one direction for both; use a subspace, or featurizers.intervene with an eager model"
        )
    scales, vectors = torch.linalg.eigh((inner + inner.mT) / 2)
    kept = scales.abs() > _EXACT * size
    return (basis @ vectors[:, kept]).mT, scales[kept]
