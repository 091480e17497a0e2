"""Dependencies: places that reach a residual stream, and the layers at which a basis has such nodes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from featurizers.errors import UsageError

from featurizers_derived_scalars.circuit import KINDS, Circuit, Place
from featurizers_derived_scalars.nodes.bases import WRITERS, Basis

Within: TypeAlias = "Callable[[Circuit, int | None], bool]"
"""From a circuit and a layer to True if a quantity has a result there; an argument of `Deriver`."""


def reaches(circuit: Circuit, place: Place, residual: Place) -> bool:
    """Return True if a residual stream contains what a place writes.

    The residual stream at an earlier point reaches it too, and so does the same stream under another name:
    ``resid.post`` of the last layer is ``resid.final``. Nothing else is at the same point as a residual stream.
    """
    return _point(circuit, place) <= _point(circuit, residual)


def _point(circuit: Circuit, place: Place) -> tuple[int, int]:
    """Return the order of a place, with the end of a block as the beginning of the next."""
    layer, stage = circuit.order(place)
    return (layer + 1, 0) if place.kind in ("resid.post", "resid.final") else (layer, stage)


def check_writes(basis: Basis) -> None:
    """Raise `UsageError` unless the nodes of a basis write to the residual stream."""
    if basis.kind not in WRITERS:
        raise UsageError(f"{basis.kind} does not write to the residual stream; kinds that do are {', '.join(WRITERS)}")


def anywhere(basis: Basis) -> Within:
    """Return a test for layers that have nodes of a basis."""

    def within(circuit: Circuit, layer: int | None) -> bool:
        layered = layer is not None
        return KINDS[basis.kind].layered == layered and circuit.has(Place(basis.kind, layer)) and basis.has(layer)

    return within


def before(basis: Basis, residual: Callable[[Circuit], Place]) -> Within:
    """Return a test for layers that have nodes of a basis which write to a residual stream."""
    exists = anywhere(basis)

    def within(circuit: Circuit, layer: int | None) -> bool:
        return exists(circuit, layer) and reaches(circuit, Place(basis.kind, layer), residual(circuit))

    return within


def after(basis: Basis, source: Place) -> Within:
    """Return a test for layers that have nodes of a basis computed from a residual stream that a place writes to."""
    exists = anywhere(basis)

    def within(circuit: Circuit, layer: int | None) -> bool:
        return exists(circuit, layer) and reaches(circuit, source, read_by(circuit, Place(basis.kind, layer)))

    return within


def read_by(circuit: Circuit, place: Place) -> Place:
    """Return the residual stream that a place is computed from; for a residual stream, itself."""
    return place if place.kind.startswith("resid.") else circuit.residual_before(place)
