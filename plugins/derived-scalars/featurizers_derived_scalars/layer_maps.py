"""Layer maps: from the layer of a derived scalar to the layer of what it is computed from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar, final

from featurizers.errors import SiteError, UsageError, shown


class LayerMap(ABC):
    """Which layer of a source belongs to a layer of what is derived from it.

    Attributes:
        constant: whether it is one layer, whatever the layer of the result.
    """

    constant: ClassVar[bool] = False

    @abstractmethod
    def source(self, layer: int | None) -> int | None:
        """The source's layer for a layer of the result."""

    @abstractmethod
    def results(self, available: Collection[int | None]) -> frozenset[int | None] | None:
        """The layers of the result for which the source is there; None for all, whatever the result's layers are."""

    @abstractmethod
    def sources(self, layers: frozenset[int | None] | None) -> frozenset[int | None] | None:
        """The source's layers that some layers of the result need; None for all that there are."""


@final
@dataclass(frozen=True)
class Same(LayerMap):
    """The same layer.

    Example:
        >>> Same().source(3)
        3
    """

    def source(self, layer: int | None) -> int | None:
        """The layer itself."""
        return layer

    def results(self, available: Collection[int | None]) -> frozenset[int | None] | None:
        """All that are available."""
        return frozenset(available)

    def sources(self, layers: frozenset[int | None] | None) -> frozenset[int | None] | None:
        """The layers themselves."""
        return layers


@final
@dataclass(frozen=True)
class Offset(LayerMap):
    """A layer so many blocks later, or before if negative. Where that is no layer, there is no result.

    Attributes:
        by: number of blocks.

    Example:
        >>> Offset(-1).source(3), sorted(Offset(-1).results([0, 1, 2]))
        (2, [1, 2, 3])
    """

    by: int

    def source(self, layer: int | None) -> int | None:
        """The layer, moved.

        Raises:
            SiteError: there is no layer to move, or it would be negative.
        """
        if layer is None or layer + self.by < 0:
            raise SiteError(
                f"there is no layer {self.by:+d} from {'a place without layer' if layer is None else layer}"
            )
        return layer + self.by

    def results(self, available: Collection[int | None]) -> frozenset[int | None] | None:
        """The available layers, moved back."""
        return frozenset(at - self.by for at in available if at is not None and at >= self.by)

    def sources(self, layers: frozenset[int | None] | None) -> frozenset[int | None] | None:
        """The layers, moved."""
        return None if layers is None else frozenset(self.source(layer) for layer in layers)


@final
@dataclass(frozen=True)
class At(LayerMap):
    """One layer, whatever the layer of the result.

    Attributes:
        layer: which.

    Raises:
        UsageError: it is not a number from 0.
    """

    constant: ClassVar[bool] = True
    layer: int

    def __post_init__(self) -> None:
        """Refuse what is no layer."""
        if not isinstance(self.layer, int) or isinstance(self.layer, bool) or self.layer < 0:
            raise UsageError(f"At takes a layer from 0, not {shown(self.layer)}")

    def source(self, layer: int | None) -> int | None:
        """That layer."""
        return self.layer

    def results(self, available: Collection[int | None]) -> frozenset[int | None] | None:
        """All if the layer is available, else none."""
        return None if self.layer in available else frozenset()

    def sources(self, layers: frozenset[int | None] | None) -> frozenset[int | None] | None:
        """That layer."""
        return frozenset({self.layer})


@final
@dataclass(frozen=True)
class Unlayered(LayerMap):
    """What the model has once, whatever the layer of the result."""

    constant: ClassVar[bool] = True

    def source(self, layer: int | None) -> int | None:
        """None."""
        return None

    def results(self, available: Collection[int | None]) -> frozenset[int | None] | None:
        """All if it is available, else none."""
        return None if None in available else frozenset()

    def sources(self, layers: frozenset[int | None] | None) -> frozenset[int | None] | None:
        """The one without layer."""
        return frozenset({None})


SAME = Same()
"""The layer map that a source has unless told otherwise."""
