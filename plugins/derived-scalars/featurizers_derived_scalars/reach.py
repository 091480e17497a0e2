"""What reaches what: whether a place's writes are in a residual stream, and which nodes that leaves."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from featurizers.errors import SiteError, UsageError

from featurizers_derived_scalars.bases import WRITERS, Basis
from featurizers_derived_scalars.places import Place

if TYPE_CHECKING:
    from featurizers_derived_scalars.circuit import Circuit


def reaches(circuit: Circuit, place: Place, residual: Place) -> bool:
    """Whether what a place writes is in a residual stream.

    The residual stream at an earlier point, or at the same by another name, reaches it too: ``resid.post`` of the
    last layer is ``resid.final``. Nothing else is at the same point as a residual stream.
    """
    return _point(circuit, place) <= _point(circuit, residual)


def _point(circuit: Circuit, place: Place) -> tuple[int, int]:
    """The order of a place, the end of a block being the beginning of the next."""
    layer, stage = circuit.order(place)
    return (layer + 1, 0) if place.kind in ("resid.post", "resid.final") else (layer, stage)


def writes(basis: Basis) -> Basis:
    """A basis, if its nodes write to the residual stream.

    Raises:
        UsageError: they do not.
    """
    if basis.kind not in WRITERS:
        raise UsageError(f"{basis.kind} does not write to the residual stream; kinds that do are {', '.join(WRITERS)}")
    return basis


def anywhere(basis: Basis) -> Callable[[Circuit, int | None], bool]:
    """Whether a layer has nodes of a basis: what `Deriver` takes as ``within``."""

    def within(circuit: Circuit, layer: int | None) -> bool:
        return _exists(circuit, basis, layer)

    return within


def before(basis: Basis, residual: Callable[[Circuit], Place]) -> Callable[[Circuit, int | None], bool]:
    """Whether a layer has nodes of a basis that write to a residual stream."""

    def within(circuit: Circuit, layer: int | None) -> bool:
        return _exists(circuit, basis, layer) and reaches(circuit, Place(basis.kind, layer), residual(circuit))

    return within


def after(basis: Basis, source: Place) -> Callable[[Circuit, int | None], bool]:
    """Whether a layer has nodes of a basis that are computed from a residual stream which a place writes to."""

    def within(circuit: Circuit, layer: int | None) -> bool:
        if not _exists(circuit, basis, layer):
            return False
        return reaches(circuit, source, read_by(circuit, Place(basis.kind, layer)))

    return within


def read_by(circuit: Circuit, place: Place) -> Place:
    """The residual stream that a place is computed from; of a residual stream, itself."""
    return place if place.kind.startswith("resid.") else circuit.residual_before(place)


def _exists(circuit: Circuit, basis: Basis, layer: int | None) -> bool:
    try:
        circuit.check(Place(basis.kind, layer))
    except SiteError:
        return False
    return basis.has(layer)
