"""Scalar sources: what derived scalars are computed from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import final

from torch import Tensor

from featurizers_derived_scalars.capturing import RawActivations
from featurizers_derived_scalars.circuit import KINDS, Circuit, Need, Pass, Place
from featurizers_derived_scalars.nodes import NodeAxis, at_least_float32
from featurizers_derived_scalars.quantities.layer_maps import SAME, LayerMap, Layers


class ScalarSource(ABC):
    """A tensor for each of some layers."""

    @property
    @abstractmethod
    def axes(self) -> tuple[NodeAxis, ...]:
        """Axes of its tensors."""

    @property
    @abstractmethod
    def constant(self) -> bool:
        """True if one tensor serves every layer of the result."""

    @abstractmethod
    def needs(self, circuit: Circuit, layers: Layers | None = None) -> frozenset[Need]:
        """Return what must be captured for some layers of the result; None for all.

        Raises:
            SiteError: the model lacks a place; the message says why.
        """

    @abstractmethod
    def layers(self, raw: RawActivations) -> Layers | None:
        """Return the layers of the result that it has a tensor for; None for any layer."""

    @abstractmethod
    def derive(self, raw: RawActivations, layer: int | None) -> Tensor:
        """Return its tensor for one layer of the result.

        Raises:
            SiteError: what it needs was not captured.
        """


@final
@dataclass(frozen=True)
class RawSource(ScalarSource):
    """A captured tensor, in float32 or better.

    Attributes:
        kind: kind of place.
        pass_: activations, or their gradient.
        at: from the layer of the result to the layer of the place.

    Examples:
        >>> RawSource("mlp.neurons").axes
        ('token', 'neuron')
    """

    kind: str
    pass_: Pass = "forward"
    at: LayerMap = SAME

    def __post_init__(self) -> None:
        """Check the kind and the pass."""
        Need(self.kind, self.pass_)

    @property
    def axes(self) -> tuple[NodeAxis, ...]:
        """Axes of the place."""
        return KINDS[self.kind].axes

    @property
    def constant(self) -> bool:
        """True if the layer map always gives the same layer."""
        return self.at.constant

    def needs(self, circuit: Circuit, layers: Layers | None = None) -> frozenset[Need]:
        """Return the need of the kind, at the layers that the map gives."""
        if not KINDS[self.kind].layered:
            circuit.check(Place(self.kind))
            return frozenset({Need(self.kind, self.pass_)})
        mapped = self.at.sources(layers)
        numbers = None if mapped is None else frozenset(layer for layer in mapped if layer is not None)
        for layer in [0] if numbers is None else numbers:
            circuit.check(Place(self.kind, layer))
        return frozenset({Need(self.kind, self.pass_, numbers)})

    def layers(self, raw: RawActivations) -> Layers | None:
        """Return the layers of the result for which the place was captured."""
        captured = {place.layer for place, pass_ in raw if place.kind == self.kind and pass_ == self.pass_}
        return self.at.results(captured)

    def derive(self, raw: RawActivations, layer: int | None) -> Tensor:
        """Return the captured tensor."""
        return at_least_float32(raw[Place(self.kind, self.at.source(layer)), self.pass_])
