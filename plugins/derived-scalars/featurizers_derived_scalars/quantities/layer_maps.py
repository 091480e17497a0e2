"""Layer maps: from the layer of a derived scalar to the layer of a source that it is computed from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar, Final, TypeAlias, final

from featurizers.errors import UsageError, shown

Layers: TypeAlias = "frozenset[int | None]"


class LayerMap(ABC):
    """Map from layers of a result to layers of a source.

    Attributes:
        constant: True if it gives the same layer for every layer of the result.
    """

    constant: ClassVar[bool] = False

    @abstractmethod
    def source(self, layer: int | None) -> int | None:
        """Return the source's layer for a layer of the result."""

    @abstractmethod
    def results(self, available: Collection[int | None]) -> Layers | None:
        """Return the layers of the result, given the layers at which the source is there; None for all layers."""

    @abstractmethod
    def sources(self, layers: Layers | None) -> Layers | None:
        """Return the source's layers that some layers of the result need; None stands for all layers."""


@final
@dataclass(frozen=True)
class Same(LayerMap):
    """Identity: the same layer.

    Examples:
        >>> Same().source(3)
        3
    """

    def source(self, layer: int | None) -> int | None:
        """Return the layer itself."""
        return layer

    def results(self, available: Collection[int | None]) -> Layers | None:
        """Return all that are available."""
        return frozenset(available)

    def sources(self, layers: Layers | None) -> Layers | None:
        """Return the layers themselves."""
        return layers


class _Constant(LayerMap):
    """A fixed layer of the source, whatever the layer of the result."""

    constant: ClassVar[bool] = True

    def results(self, available: Collection[int | None]) -> Layers | None:
        """Return None, for all layers, if the one layer is available; else no layer."""
        return None if self.source(None) in available else frozenset()

    def sources(self, layers: Layers | None) -> Layers | None:
        """Return the one layer."""
        return frozenset({self.source(None)})


@final
@dataclass(frozen=True)
class At(_Constant):
    """A fixed layer, whatever the layer of the result.

    Attributes:
        layer: number of the layer.

    Raises:
        UsageError: it is not a number from 0.
    """

    layer: int

    def __post_init__(self) -> None:
        """Check the layer."""
        if not isinstance(self.layer, int) or isinstance(self.layer, bool) or self.layer < 0:
            raise UsageError(f"At takes a layer from 0, not {shown(self.layer)}")

    def source(self, layer: int | None) -> int | None:
        """Return the one layer."""
        return self.layer


@final
@dataclass(frozen=True)
class Unlayered(_Constant):
    """A source that the model has once, whatever the layer of the result."""

    def source(self, layer: int | None) -> int | None:
        """Return None."""
        return None


SAME: Final = Same()
"""Layer map that a source has by default."""
