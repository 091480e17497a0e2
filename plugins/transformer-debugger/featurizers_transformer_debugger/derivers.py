"""transformer-debugger's scalar sources and scalar derivers, over those of `featurizers_derived_scalars`."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, final

from featurizers.errors import UsageError
from featurizers_derived_scalars import Deriver, MetricGrad, quantities
from featurizers_derived_scalars.nodes import NodeAxis
from featurizers_derived_scalars.quantities import Context, DerivedSource, RawSource
from torch import Tensor

from featurizers_transformer_debugger.indexers import (
    DEFAULT_LAYER_INDEXER,
    LayerIndex,
    LayerIndexer,
    NoLayersLayerIndexer,
    StaticLayerIndexer,
)
from featurizers_transformer_debugger.names import (
    ActivationLocationType,
    LocationWithinLayer,
    NamedLocation,
    NamedScalar,
    PassType,
    location_of,
)
from featurizers_transformer_debugger.scalars import upstream
from featurizers_transformer_debugger.stores import (
    ActivationLocationTypeAndPassType,
    ActivationsAndMetadata,
    DerivedScalarTypeAndPassType,
    DstConfig,
    RawActivationStore,
    derived,
    raw_source,
)

TensorFunction = Callable[[tuple[Tensor, ...], LayerIndex, PassType], Tensor]


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
            raise UsageError(f"{self.layer_indexer} gives no single layer; At(layer) and Unlayered() do")
        return self.layer_indexer.source(None)

    def derive_from_raw(
        self, raw_activation_store: RawActivationStore, desired_layer_indices: Sequence[LayerIndex] | None
    ) -> ActivationsAndMetadata:
        """Return its tensors at some layers; at all if None. Give ``[None]`` for what the model has once."""
        return derived(self.dst, self.source, raw_activation_store, self.pass_type, desired_layer_indices)


@final
@dataclass(frozen=True)
class RawScalarSource(ScalarSource):
    """A raw location in one pass.

    Raises:
        UsageError: the location has no layers, and the indexer gives layers.
    """

    activation_location_type: NamedLocation
    pass_type: PassType
    layer_indexer: LayerIndexer = DEFAULT_LAYER_INDEXER

    def __post_init__(self) -> None:
        """Check the indexer."""
        if self.activation_location_type.has_no_layers and not isinstance(self.layer_indexer, NoLayersLayerIndexer):
            raise UsageError(
                f"{self.activation_location_type.name} has no layers: give it NoLayersLayerIndexer(), "
                f"not {self.layer_indexer}"
            )

    @property
    def exists_by_default(self) -> bool:
        """True if a run of the model computes the location."""
        return self.activation_location_type.exists_by_default

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
        return (ActivationLocationTypeAndPassType(self.activation_location_type, self.pass_type),)

    @property
    def source(self) -> quantities.ScalarSource:
        """Raw source."""
        return raw_source(self.activation_location_type, self.pass_type, self.layer_indexer)


@final
@dataclass(frozen=True)
class DerivedScalarSource(ScalarSource):
    """A deriver in one pass."""

    scalar_deriver: ScalarDeriver
    pass_type: PassType
    layer_indexer: LayerIndexer = DEFAULT_LAYER_INDEXER
    exists_by_default: ClassVar[bool] = False

    @property
    def dst(self) -> NamedScalar:
        """Name of the deriver."""
        return self.scalar_deriver.dst

    @property
    def location_within_layer(self) -> LocationWithinLayer | None:
        """Location of the deriver."""
        return self.scalar_deriver.location_within_layer

    @property
    def sub_activation_location_type_and_pass_types(self) -> tuple[ActivationLocationTypeAndPassType, ...]:
        """Raw locations of the deriver."""
        return self.scalar_deriver.get_sub_activation_location_type_and_pass_types()

    @property
    def source(self) -> quantities.ScalarSource:
        """Derived source."""
        return DerivedSource(self.scalar_deriver.deriver(self.pass_type), self.layer_indexer)


@final
@dataclass(frozen=True)
class _Upstream(ScalarSource):
    """A scalar as `upstream` derives it, forward."""

    name: NamedScalar
    inner: Deriver
    pass_type: PassType = PassType.FORWARD
    layer_indexer: LayerIndexer = DEFAULT_LAYER_INDEXER
    exists_by_default: ClassVar[bool] = False

    @property
    def dst(self) -> NamedScalar:
        return self.name

    @property
    def location_within_layer(self) -> LocationWithinLayer | None:
        return None if self.inner.basis is None else location_of(self.inner.basis.kind)

    @property
    def sub_activation_location_type_and_pass_types(self) -> tuple[ActivationLocationTypeAndPassType, ...]:
        by_kind = {location.kind: location for location in ActivationLocationType}
        pairs = [(by_kind[kind], pass_) for kind, pass_ in _captured(self.inner) if kind in by_kind]
        return tuple(
            ActivationLocationTypeAndPassType(location, PassType(pass_)) for location, pass_ in dict.fromkeys(pairs)
        )

    @property
    def source(self) -> quantities.ScalarSource:
        return DerivedSource(self.inner)


def _captured(deriver: Deriver) -> Iterator[tuple[str, str]]:
    """Yield kinds and passes of the raw sources below a deriver; the final gradient is that after the last block."""
    for source in deriver.sources:
        if isinstance(source, RawSource):
            yield source.kind, source.pass_
        elif isinstance(source, DerivedSource):
            yield from _captured(source.deriver)
        elif isinstance(source, MetricGrad):
            yield "resid.post", "backward"


@final
@dataclass(frozen=True)
class ScalarDeriver:
    """A scalar as a function of some sources, layer by layer.

    A transformed deriver is derived only in the pass whose output is transformed.

    Attributes:
        dst: its name.
        dst_config: options of its name; ``layer_indices`` says which layers are derived.
        sub_scalar_sources: sources of the function's tensors.
        tensor_calculate_derived_scalar_fn: from the sources' tensors, the layer and the pass to the tensor.
        location: location in a block; None for that of the first source.
        passes: passes that it can be derived in; None for those that ``derive_gradients`` gives.
    """

    dst: NamedScalar
    dst_config: DstConfig
    sub_scalar_sources: tuple[ScalarSource, ...]
    tensor_calculate_derived_scalar_fn: TensorFunction
    location: LocationWithinLayer | None = None
    passes: tuple[PassType, ...] | None = None

    @property
    def shape_of_activation_per_token_spec(self) -> tuple[NodeAxis, ...]:
        """Axes after the token's."""
        return self.dst.shape_spec_per_token_sequence[1:]

    @property
    def location_within_layer(self) -> LocationWithinLayer | None:
        """Location in a block."""
        return self.sub_scalar_sources[0].location_within_layer if self.location is None else self.location

    @property
    def derivable_pass_types(self) -> tuple[PassType, ...]:
        """Passes that it can be derived in."""
        if self.passes is not None:
            return self.passes
        return tuple(PassType) if self.dst_config.derive_gradients else (PassType.FORWARD,)

    @property
    def n_input_tensors(self) -> int:
        """Number of tensors that its function takes."""
        return len(self.sub_scalar_sources)

    @property
    def n_total_required_tensors(self) -> int:
        """Number of raw tensors that are needed, sources of sources included."""
        return len(self.get_sub_activation_location_type_and_pass_types())

    def get_sub_scalar_sources(self) -> tuple[ScalarSource, ...]:
        """Return the sources."""
        return self.sub_scalar_sources

    def get_sub_dst_and_pass_types(self) -> tuple[DerivedScalarTypeAndPassType, ...]:
        """Return names and passes of the sources."""
        return tuple(source.dst_and_pass_type for source in self.sub_scalar_sources)

    def get_sub_activation_location_type_and_pass_types(self) -> tuple[ActivationLocationTypeAndPassType, ...]:
        """Return the raw locations that all sources come from, repeated as they are used."""
        return tuple(
            location
            for source in self.sub_scalar_sources
            for location in source.sub_activation_location_type_and_pass_types
        )

    def deriver(self, pass_type: PassType) -> Deriver:
        """Return the equivalent deriver of `featurizers_derived_scalars` in one pass; its ``needs`` are for `capture`.

        Raises:
            UsageError: it cannot be derived in that pass.
        """
        if pass_type not in self.derivable_pass_types:
            able = " and ".join(self.derivable_pass_types)
            raise UsageError(f"{self.dst.value} is derived {able}, not {pass_type.value}")

        def fn(context: Context, *tensors: Tensor) -> Tensor:
            return self.tensor_calculate_derived_scalar_fn(tensors, context.layer, pass_type)

        sources = tuple(source.source for source in self.sub_scalar_sources)
        return Deriver(self.dst.value, sources, self.dst.shape_spec_per_token_sequence, fn)

    def derive_from_raw(self, raw_activation_store: RawActivationStore, pass_type: PassType) -> ActivationsAndMetadata:
        """Return its tensors, at the layers of its configuration that are there.

        Raises:
            UsageError: it cannot be derived in that pass.
            SiteError: what it needs was not captured.
        """
        source = DerivedSource(self.deriver(pass_type))
        return derived(self.dst, source, raw_activation_store, pass_type, self.dst_config.layer_indices)

    def to_serializable_dict(self) -> dict[str, Any]:
        """Return name and configuration."""
        return {"dst": self.dst, "dst_config": self.dst_config}

    def apply_transform_fn_to_output(
        self,
        transform_fn: Callable[[Tensor], Tensor],
        pass_type_to_transform: PassType,
        output_dst: NamedScalar,
    ) -> ScalarDeriver:
        """Return another scalar: a function of this one's output in one pass."""
        return self.apply_layerwise_transform_fn_to_output(
            lambda tensor, _layer, _pass: transform_fn(tensor), pass_type_to_transform, output_dst
        )

    def apply_layerwise_transform_fn_to_output(
        self,
        layerwise_transform_fn: Callable[[Tensor, LayerIndex, PassType], Tensor],
        pass_type_to_transform: PassType,
        output_dst: NamedScalar,
    ) -> ScalarDeriver:
        """Return another scalar: a function of this one's output in one pass, of the layer and of the pass."""
        return self._transformed(
            lambda tensors, layer, pass_type: layerwise_transform_fn(tensors[0], layer, pass_type),
            pass_type_to_transform,
            output_dst,
        )

    def apply_layerwise_transform_fn_to_output_and_other_tensor(
        self,
        layerwise_transform_fn: Callable[..., Tensor],
        pass_type_to_transform: PassType,
        output_dst: NamedScalar,
        other_scalar_source: ScalarSource,
    ) -> ScalarDeriver:
        """Return another scalar: a function of this one's output, another source's tensor, the layer and the pass."""
        return self._transformed(
            lambda tensors, layer, pass_type: layerwise_transform_fn(*tensors, layer, pass_type),
            pass_type_to_transform,
            output_dst,
            other_scalar_source,
        )

    def _transformed(
        self, fn: TensorFunction, pass_type: PassType, output_dst: NamedScalar, *others: ScalarSource
    ) -> ScalarDeriver:
        return dataclasses.replace(
            self,
            dst=output_dst,
            sub_scalar_sources=(DerivedScalarSource(self, pass_type), *others),
            tensor_calculate_derived_scalar_fn=fn,
            location=self.location_within_layer,
            passes=(pass_type,),
        )


def make_scalar_deriver(dst: NamedScalar, dst_config: DstConfig | None = None) -> ScalarDeriver:
    """Return the deriver of one of the 106 names: for raw locations in both passes, for the others forward.

    Raises:
        UsageError: the configuration lacks an option that the name needs.
    """
    config = DstConfig() if dst_config is None else dst_config
    if dst.value in set(ActivationLocationType):
        location = ActivationLocationType(dst.value)
        at = NoLayersLayerIndexer() if location.has_no_layers else DEFAULT_LAYER_INDEXER
        both = tuple(PassType) if config.derive_gradients else (PassType.FORWARD,)
        sources = tuple(RawScalarSource(location, pass_type, at) for pass_type in both)
        return ScalarDeriver(
            dst, config, sources, lambda tensors, _, pass_type: tensors[both.index(pass_type)], passes=both
        )
    inner = upstream(dst.value, featurizers=config.featurizers, node=config.node, latent=config.latent)
    passes = (PassType.FORWARD,)
    return ScalarDeriver(dst, config, (_Upstream(dst, inner),), lambda tensors, _, __: tensors[0], passes=passes)
