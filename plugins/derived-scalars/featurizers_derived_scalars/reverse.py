"""Derived scalars as featurizers, where they are: a diagonal map of one place, or one direction.

A scalar that weighs each node of one place by a number that no activation changes is an invertible map of that
place's activations. Where a weight depends on the token, such as the metric's gradient, a token must be chosen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeAlias

import torch
from featurizers import Featurizer, Site, create
from featurizers.errors import BasisError, UsageError
from torch import Tensor

from featurizers_derived_scalars.activations import RawActivations
from featurizers_derived_scalars.bases import HEADS, Basis
from featurizers_derived_scalars.diagonal import DiagonalFeaturizer
from featurizers_derived_scalars.directions import Direction
from featurizers_derived_scalars.places import Place
from featurizers_derived_scalars.views import View, flat
from featurizers_derived_scalars.writing import unit_lengths

Reverse: TypeAlias = "Callable[[RawActivations, int | None, int | None], Featurizer[Any]]"
"""From what was captured, a layer and a token to the featurizer that a scalar is."""

_SITES: Final = {"resid.pre": "resid.pre", "resid.post": "resid.post", "attn.out": "attn.out", "attn.z": "attn.z",
                 "mlp.out": "mlp.out", "mlp.neurons": "mlp.act"}  # fmt: skip


def by_value(basis: Basis) -> Reverse | None:
    """The featurizer of a basis itself; None for an error, a bias, or what holds no vectors."""
    if basis.part != "features" or basis.kind == HEADS:
        return None

    def reverse(raw: RawActivations, layer: int | None, _: int | None) -> Featurizer[Any]:
        view = View(basis, raw, layer)
        if view.featurizer is not None:
            return view.featurizer
        return _placed(create("identity", d_in=flat(view.x, view.place).shape[-1]), view.place)

    return reverse


def by_length(basis: Basis) -> Reverse | None:
    """The lengths of what units of the nodes write, as gains."""
    if basis.whole or basis.part != "features" or basis.kind == HEADS:
        return None

    def reverse(raw: RawActivations, layer: int | None, token: int | None) -> Featurizer[Any]:
        view = View(basis, raw, layer)
        lengths = unit_lengths(view)
        gains = lengths if view.featurizer is not None else flat(lengths, view.place)
        return _after(view, _at(gains, token, "the length of a write"))

    return reverse


def by_effect(basis: Basis, along: Direction) -> Reverse | None:
    """The direct effects of units of the nodes, as gains."""
    if basis.whole or basis.part != "features" or basis.kind == HEADS:
        return None

    def reverse(raw: RawActivations, layer: int | None, token: int | None) -> Featurizer[Any]:
        view = View(basis, raw, layer)
        seen = view.pull(raw.circuit.write_vjp(view.place, along.vector(raw), raw))
        gains = seen if view.featurizer is not None else flat(seen, view.place)
        return _after(view, _at(gains, token, str(along)))

    return reverse


def by_direction(along: Direction) -> Reverse:
    """The line of a direction as a subspace of the residual stream."""

    def reverse(raw: RawActivations, _: int | None, token: int | None) -> Featurizer[Any]:
        from featurizers_subspace import SubspaceFeaturizer

        place = along.place(raw.circuit)
        vector = _at(along.vector(raw), token, str(along))
        if not bool(vector.any()):
            raise BasisError(f"{along} is zero at token {token}, and no direction")
        return _placed(SubspaceFeaturizer.from_directions(vector[None]), place, raw)

    return reverse


def _at(rows: Tensor, token: int | None, what: str) -> Tensor:
    if token is not None:
        if not -len(rows) <= token < len(rows):
            raise UsageError(f"there is no token {token}; there are {len(rows)}")
        return rows[token].clone()
    if not torch.allclose(rows, rows[:1].expand_as(rows), rtol=1e-5, atol=1e-6 * float(rows.abs().max())):
        raise UsageError(f"{what} is another at each token; say of which: as_featurizer(raw, layer, token=-1)")
    return rows[0].clone()


def _after(view: View, gains: Tensor) -> Featurizer[Any]:
    """The gains, behind the featurizer of the basis if there is one."""
    diagonal = DiagonalFeaturizer.from_gain(gains)
    return _placed(diagonal if view.featurizer is None else view.featurizer >> diagonal, view.place)


def _placed(featurizer: Featurizer[Any], place: Place, raw: RawActivations | None = None) -> Featurizer[Any]:
    if raw is not None and place.kind == "resid.final":
        place = Place("resid.post", raw.circuit.n_layers - 1)
    if place.kind in _SITES:
        featurizer.site = Site(_SITES[place.kind], place.layer)
    return featurizer


def refuse(name: str) -> UsageError:
    """The error of a scalar that is no featurizer."""
    return UsageError(
        f"{name} is no featurizer: one is an invertible map of the activations of one place at one token. Those that "
        "are: value, write_norm with signed=True, write_to, all of units or features, and direction"
    )
