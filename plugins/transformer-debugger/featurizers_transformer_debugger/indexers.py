"""Layer indexers: from the layer of a scalar to the layer of a source that it is computed from."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Final, TypeAlias, final

from featurizers.errors import SiteError
from featurizers_derived_scalars.quantities import SAME, At, LayerMap, Same, Unlayered

LayerIndex: TypeAlias = int | None
LayerIndexer: TypeAlias = LayerMap
IdentityLayerIndexer = Same
ConstantLayerIndexer = At
NoLayersLayerIndexer = Unlayered
StaticLayerIndexer = (At, Unlayered)
"""Indexers that always give one layer."""
DEFAULT_LAYER_INDEXER: Final = SAME


@final
@dataclass(frozen=True)
class OffsetLayerIndexer(LayerMap):
    """A layer a number of blocks later, or earlier if negative. Where that is no layer, there is no result.

    Attributes:
        offset: number of blocks.

    Example:
        >>> OffsetLayerIndexer(-1).source(3), sorted(OffsetLayerIndexer(-1).results([0, 1, 2]))
        (2, [1, 2, 3])
    """

    offset: int

    def source(self, layer: int | None) -> int | None:
        """Return the layer, moved.

        Raises:
            SiteError: the layer is None, or the result would be negative.
        """
        if layer is None or layer + self.offset < 0:
            raise SiteError(
                f"there is no layer {self.offset:+d} from {'a place without layer' if layer is None else layer}"
            )
        return layer + self.offset

    def results(self, available: Collection[int | None]) -> frozenset[int | None] | None:
        """Return the available layers, moved back."""
        return frozenset(at - self.offset for at in available if at is not None and at >= self.offset)

    def sources(self, layers: frozenset[int | None] | None) -> frozenset[int | None] | None:
        """Return the layers, moved."""
        return None if layers is None else frozenset(self.source(layer) for layer in layers)
