"""Layer indexers: from the layer of a scalar to the layer of a source that it is computed from."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar, Final, TypeAlias, final

from featurizers.errors import SiteError
from featurizers_derived_scalars.quantities import SAME, At, LayerMap, Same, Unlayered

LayerIndex: TypeAlias = int | None
LayerIndexer: TypeAlias = LayerMap
IdentityLayerIndexer = Same
DEFAULT_LAYER_INDEXER: Final = SAME


class StaticLayerIndexer(LayerMap):
    """Base of indexers that always give one layer."""

    constant: ClassVar[bool] = True

    @property
    @abstractmethod
    def layer_index(self) -> LayerIndex:
        """Number of the block."""

    @property
    @abstractmethod
    def _plain(self) -> LayerMap:
        """Equivalent layer map of `featurizers_derived_scalars`."""

    def source(self, layer: int | None) -> int | None:
        """Return the one layer."""
        return self._plain.source(layer)

    def results(self, available: Collection[int | None]) -> frozenset[int | None] | None:
        """Return None, for all layers, if the one layer is available; else no layer."""
        return self._plain.results(available)

    def sources(self, layers: frozenset[int | None] | None) -> frozenset[int | None] | None:
        """Return the one layer."""
        return self._plain.sources(layers)


@final
@dataclass(frozen=True)
class ConstantLayerIndexer(StaticLayerIndexer):
    """A fixed layer.

    Attributes:
        constant_layer_index: number of the layer.

    Raises:
        UsageError: it is not a number from 0.
    """

    constant_layer_index: int

    def __post_init__(self) -> None:
        """Check the layer."""
        At(self.constant_layer_index)

    @property
    def layer_index(self) -> LayerIndex:
        """Number of the block."""
        return self.constant_layer_index

    @property
    def _plain(self) -> LayerMap:
        return At(self.constant_layer_index)


@final
@dataclass(frozen=True)
class NoLayersLayerIndexer(StaticLayerIndexer):
    """No layer, for what the model has once."""

    @property
    def layer_index(self) -> LayerIndex:
        """None."""
        return None

    @property
    def _plain(self) -> LayerMap:
        return Unlayered()


@final
@dataclass(frozen=True)
class OffsetLayerIndexer(LayerMap):
    """A layer a number of blocks later, or earlier if negative. Where that is no layer, there is no result.

    Attributes:
        layer_index_offset: number of blocks.

    Examples:
        >>> OffsetLayerIndexer(-1).source(3), sorted(OffsetLayerIndexer(-1).results([0, 1, 2]))
        (2, [1, 2, 3])
    """

    layer_index_offset: int

    def source(self, layer: int | None) -> int | None:
        """Return the layer, moved.

        Raises:
            SiteError: the layer is None, or the result would be negative.
        """
        if layer is None or layer + self.layer_index_offset < 0:
            start = "a place without layer" if layer is None else layer
            raise SiteError(f"there is no layer {self.layer_index_offset:+d} from {start}")
        return layer + self.layer_index_offset

    def results(self, available: Collection[int | None]) -> frozenset[int | None] | None:
        """Return the available layers, moved back."""
        return frozenset(
            at - self.layer_index_offset for at in available if at is not None and at >= self.layer_index_offset
        )

    def sources(self, layers: frozenset[int | None] | None) -> frozenset[int | None] | None:
        """Return the layers, moved."""
        return None if layers is None else frozenset(self.source(layer) for layer in layers)
