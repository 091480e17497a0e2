"""Derived scalars as featurizers, where they are: a diagonal map of one place, or one direction.

A scalar that multiplies each node of one place by a number that does not depend on activations is an invertible map of
that place's activations. Where the number depends on the token, as the metric's gradient does, choose a token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from featurizers import Featurizer, create
from featurizers.errors import BasisError, UsageError
from torch import Tensor

from featurizers_derived_scalars.capturing import RawActivations
from featurizers_derived_scalars.circuit import Circuit, Place
from featurizers_derived_scalars.featurize.diagonal import DiagonalFeaturizer
from featurizers_derived_scalars.nodes import HEADS, Basis, View
from featurizers_derived_scalars.nodes.views import flat

Reverse: TypeAlias = "Callable[[RawActivations, int | None, int | None], Featurizer[Any]]"
"""From captured activations, a layer and a token to the featurizer that a scalar is."""


def by_value(basis: Basis) -> Reverse | None:
    """Return the featurizer of a basis itself; None for an error, a bias, or a kind that holds no vectors."""
    if basis.part != "features" or basis.kind == HEADS:
        return None

    def reverse(raw: RawActivations, layer: int | None, _: int | None) -> Featurizer[Any]:
        view = View(basis, raw, layer)
        if view.featurizer is not None:
            return view.featurizer
        return _placed(create("identity", d_in=flat(view.x, view.place).shape[-1]), view.place)

    return reverse


def by_gains(basis: Basis, gains: Callable[[View], Tensor], what: str) -> Reverse | None:
    """Return the featurizer that multiplies each node by its gain; None where the scalar is no such map.

    Args:
        basis: the nodes.
        gains: from the view of a layer to the gain of each node, shaped like the values.
        what: what a gain is, for an error.
    """
    if basis.whole or basis.part != "features" or basis.kind == HEADS:
        return None

    def reverse(raw: RawActivations, layer: int | None, token: int | None) -> Featurizer[Any]:
        view = View(basis, raw, layer)
        rows = gains(view)
        rows = rows if view.featurizer is not None else flat(rows, view.place)
        diagonal = DiagonalFeaturizer.from_gain(_at(rows, token, what))
        return _placed(diagonal if view.featurizer is None else view.featurizer >> diagonal, view.place)

    return reverse


def by_direction(vector: Callable[[RawActivations], Tensor], place: Callable[[Circuit], Place], what: str) -> Reverse:
    """Return the featurizer of the line along a direction of the residual stream.

    Args:
        vector: from captured activations to the direction at each token.
        place: where in the model it is.
        what: what the direction is, for an error.
    """

    def reverse(raw: RawActivations, _: int | None, token: int | None) -> Featurizer[Any]:
        from featurizers_subspace import SubspaceFeaturizer

        direction, site = _at(vector(raw), token, what), place(raw.circuit)
        if not bool(direction.any()):
            raise BasisError(f"{what} is zero at token {token}, and no direction")
        if site.kind == "resid.final":
            site = Place("resid.post", raw.circuit.n_layers - 1)
        return _placed(SubspaceFeaturizer.from_directions(direction[None]), site)

    return reverse


def _at(rows: Tensor, token: int | None, what: str) -> Tensor:
    """Return the row of a token, or the row of all tokens if they are the same."""
    if token is not None:
        if not -len(rows) <= token < len(rows):
            raise UsageError(f"there is no token {token}; there are {len(rows)}")
        return rows[token].clone()
    if not torch.allclose(rows, rows[:1].expand_as(rows), rtol=1e-5, atol=1e-6 * float(rows.abs().max())):
        raise UsageError(f"{what} differs from token to token; choose a token: as_featurizer(raw, layer, token=-1)")
    return rows[0].clone()


def _placed(featurizer: Featurizer[Any], place: Place) -> Featurizer[Any]:
    """Set the site of a featurizer, if the place is one."""
    if place.site is not None:
        featurizer.site = place.site
    return featurizer


def refuse(name: str) -> UsageError:
    """Return the error for a scalar that is no featurizer."""
    return UsageError(
        f"{name} is no featurizer: a featurizer is an invertible map of the activations of one place at one token. "
        "Scalars that are: value, write_norm with signed=True, write_to, all of units or features, and direction"
    )
