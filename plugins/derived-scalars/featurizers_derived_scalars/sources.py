"""Scalar sources: what derived scalars are computed from, captured tensors or other derived scalars."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, final

from torch import Tensor

from featurizers_derived_scalars.activations import RawActivations
from featurizers_derived_scalars.axes import Axis, exact
from featurizers_derived_scalars.layer_maps import SAME, LayerMap
from featurizers_derived_scalars.places import KINDS, Need, Pass, Place

if TYPE_CHECKING:
    from featurizers_derived_scalars.circuit import Circuit
    from featurizers_derived_scalars.derivers import Deriver


class ScalarSource(Protocol):
    """Something with a tensor at each of some layers."""

    @property
    def axes(self) -> tuple[Axis, ...]:
        """What the axes of its tensors count."""

    @property
    def constant(self) -> bool:
        """Whether one tensor serves every layer of the result."""

    def needs(self, circuit: Circuit, layers: frozenset[int | None] | None) -> frozenset[Need]:
        """What must be captured for some layers of the result; None for all."""

    def layers(self, raw: RawActivations) -> frozenset[int | None] | None:
        """The layers of the result for which it is there; None for any."""

    def derive(self, raw: RawActivations, layer: int | None) -> Tensor:
        """Its tensor for one layer of the result."""


def need(kind: str, pass_: Pass = "forward", layers: Iterable[int | None] | None = None) -> Need:
    """The need of a kind at some layers, which do not matter for a kind that the model has once."""
    if layers is None or not KINDS[kind].layered:
        return Need(kind, pass_)
    return Need(kind, pass_, frozenset(layer for layer in layers if layer is not None))


def captured(raw: RawActivations, kind: str, pass_: Pass = "forward") -> frozenset[int | None]:
    """The layers at which a kind was captured."""
    return frozenset(place.layer for place, passed in raw if place.kind == kind and passed == pass_)


@final
@dataclass(frozen=True)
class RawSource:
    """A captured tensor, in float32 or better.

    Attributes:
        kind: of place.
        pass_: activations, or their gradient.
        at: which layer of it belongs to a layer of the result.

    Example:
        >>> RawSource("mlp.neurons").axes
        ('token', 'neuron')
    """

    kind: str
    pass_: Pass = "forward"
    at: LayerMap = SAME

    def __post_init__(self) -> None:
        """Refuse what names no tensor."""
        Need(self.kind, self.pass_)

    @property
    def axes(self) -> tuple[Axis, ...]:
        """Those of the place."""
        return KINDS[self.kind].axes

    @property
    def constant(self) -> bool:
        """Whether the layer map always says the same."""
        return self.at.constant

    def needs(self, circuit: Circuit, layers: frozenset[int | None] | None) -> frozenset[Need]:
        """The kind, at the layers that the map says.

        Raises:
            SiteError: the model has no such place; the message says why.
        """
        if not KINDS[self.kind].layered:
            circuit.check(Place(self.kind))
            return frozenset({need(self.kind, self.pass_)})
        wanted = self.at.sources(layers)
        wanted = None if wanted is None else wanted - {None}
        for layer in [0] if wanted is None else wanted:
            circuit.check(Place(self.kind, layer))
        return frozenset({need(self.kind, self.pass_, wanted)})

    def layers(self, raw: RawActivations) -> frozenset[int | None] | None:
        """The layers of the result for which it was captured."""
        return self.at.results(captured(raw, self.kind, self.pass_))

    def derive(self, raw: RawActivations, layer: int | None) -> Tensor:
        """The captured tensor.

        Raises:
            SiteError: it was not captured.
        """
        return exact(raw[Place(self.kind, self.at.source(layer)), self.pass_])


@final
@dataclass(frozen=True)
class DerivedSource:
    """The result of another deriver.

    Attributes:
        deriver: which.
        at: which layer of it belongs to a layer of the result.
    """

    deriver: Deriver
    at: LayerMap = SAME

    @property
    def axes(self) -> tuple[Axis, ...]:
        """Those of the deriver."""
        return self.deriver.axes

    @property
    def constant(self) -> bool:
        """Whether the layer map always says the same."""
        return self.at.constant

    def needs(self, circuit: Circuit, layers: frozenset[int | None] | None) -> frozenset[Need]:
        """What the deriver needs."""
        return self.deriver.needs(circuit, self.at.sources(layers))

    def layers(self, raw: RawActivations) -> frozenset[int | None] | None:
        """The layers of the result for which the deriver has one."""
        found = self.deriver.available(raw)
        return found if found is None else self.at.results(found)

    def derive(self, raw: RawActivations, layer: int | None) -> Tensor:
        """The deriver's tensor."""
        return self.deriver.tensor(raw, self.at.source(layer))


def bind(source: ScalarSource, raw: RawActivations) -> Callable[[int | None], Tensor]:
    """From a layer to a source's tensor; a constant one is computed once."""
    if source.constant:
        return _once(functools.partial(source.derive, raw))
    if isinstance(source, DerivedSource):
        at, inner = source.at, source.deriver.bound(raw)
        return lambda layer: inner(at.source(layer))
    return functools.partial(source.derive, raw)


def _once(derive: Callable[[int | None], Tensor]) -> Callable[[int | None], Tensor]:
    kept: list[Tensor] = []

    def answer(layer: int | None) -> Tensor:
        if not kept:
            kept.append(derive(layer))
        return kept[0]

    return answer
