"""transformer-debugger's scalar sources, over those of `featurizers_derived_scalars`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from featurizers.errors import UsageError
from featurizers_derived_scalars import quantities

from featurizers_transformer_debugger.activations import (
    ActivationLocationTypeAndPassType,
    ActivationsAndMetadata,
    DerivedScalarTypeAndPassType,
)
from featurizers_transformer_debugger.indexers import (
    DEFAULT_LAYER_INDEXER,
    LayerIndex,
    LayerIndexer,
    NoLayersLayerIndexer,
    StaticLayerIndexer,
)
from featurizers_transformer_debugger.names import LocationWithinLayer, NamedScalar, PassType
from featurizers_transformer_debugger.stores import RawActivationStore, derived, raw_source


class ScalarSource(ABC):
    """A tensor at each of some layers: a raw location or a deriver, in one pass.

    Attributes:
        pass_type: the pass.
        layer_indexer: from the layer of the result to the layer of the source.
    """

    pass_type: PassType
    layer_indexer: LayerIndexer

    @property
    @abstractmethod
    def exists_by_default(self) -> bool:
        """True if a run of the model computes it."""

    @property
    @abstractmethod
    def dst(self) -> NamedScalar:
        """Name."""

    @property
    @abstractmethod
    def location_within_layer(self) -> LocationWithinLayer | None:
        """Location in a block; None for what the model has once."""

    @property
    @abstractmethod
    def sub_activation_location_type_and_pass_types(self) -> tuple[ActivationLocationTypeAndPassType, ...]:
        """Raw locations that it comes from, without those that transformer-debugger has no name for."""

    @property
    @abstractmethod
    def source(self) -> quantities.ScalarSource:
        """Equivalent source of `featurizers_derived_scalars`."""

    @property
    def dst_and_pass_type(self) -> DerivedScalarTypeAndPassType:
        """Name and pass."""
        return DerivedScalarTypeAndPassType(self.dst, self.pass_type)

    @property
    def layer_index(self) -> LayerIndex:
        """Layer of a static indexer.

        Raises:
            UsageError: the indexer is not static.
        """
        if not isinstance(self.layer_indexer, StaticLayerIndexer):
            raise UsageError(
                f"{self.layer_indexer} gives no single layer; ConstantLayerIndexer(layer) and NoLayersLayerIndexer() do"
            )
        return self.layer_indexer.layer_index

    def derive_from_raw(
        self, raw_activation_store: RawActivationStore, desired_layer_indices: Sequence[LayerIndex] | None
    ) -> ActivationsAndMetadata:
        """Return its tensors at some layers; at all if None. Give ``[None]`` for what the model has once."""
        return derived(self.dst, self.source, raw_activation_store, self.pass_type, desired_layer_indices)


@final
@dataclass(frozen=True)
class RawScalarSource(ActivationLocationTypeAndPassType, ScalarSource):
    """A raw location in one pass.

    Raises:
        UsageError: the location has no layers, and the indexer gives layers.
    """

    layer_indexer: LayerIndexer = DEFAULT_LAYER_INDEXER

    def __post_init__(self) -> None:
        """Check the indexer."""
        if self.activation_location_type.has_no_layers and not isinstance(self.layer_indexer, NoLayersLayerIndexer):
            raise UsageError(
                f"{self.activation_location_type.name} has no layers: give it NoLayersLayerIndexer(), "
                f"not {self.layer_indexer}"
            )

    @property
    def activation_location_type_and_pass_type(self) -> ActivationLocationTypeAndPassType:
        """Raw location and pass, without the indexer."""
        return ActivationLocationTypeAndPassType(self.activation_location_type, self.pass_type)

    @property
    def dst(self) -> NamedScalar:
        """Name of its value."""
        return self.activation_location_type.dst

    @property
    def location_within_layer(self) -> LocationWithinLayer | None:
        """Location in a block."""
        return self.activation_location_type.location_within_layer

    @property
    def sub_activation_location_type_and_pass_types(self) -> tuple[ActivationLocationTypeAndPassType, ...]:
        """Location itself."""
        return (self.activation_location_type_and_pass_type,)

    @property
    def source(self) -> quantities.ScalarSource:
        """Raw source."""
        return raw_source(self.activation_location_type, self.pass_type, self.layer_indexer)
