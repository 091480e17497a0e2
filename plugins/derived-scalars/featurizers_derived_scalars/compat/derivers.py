"""transformer-debugger's scalar sources and scalar derivers, over those of ours."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, final

from featurizers.errors import UsageError
from torch import Tensor

from featurizers_derived_scalars import sources as ours
from featurizers_derived_scalars.axes import Axis
from featurizers_derived_scalars.compat.names import (
    DEFAULT_LAYER_INDEXER,
    ActivationLocationType,
    LayerIndex,
    LayerIndexer,
    LocationWithinLayer,
    NamedLocation,
    NamedScalar,
    NoLayersLayerIndexer,
    PassType,
    StaticLayerIndexer,
    location_of,
)
from featurizers_derived_scalars.compat.stores import (
    ActivationLocationTypeAndPassType,
    ActivationsAndMetadata,
    DerivedScalarTypeAndPassType,
    DstConfig,
    RawActivationStore,
    derived,
    raw_source,
)
from featurizers_derived_scalars.derivers import Context, Deriver
from featurizers_derived_scalars.directions import DirectionSource, MetricGrad
from featurizers_derived_scalars.transformer_debugger import upstream

TensorFunction = Callable[[tuple[Tensor, ...], LayerIndex, PassType], Tensor]


class ScalarSource(ABC):
    """Something that has a tensor at each of some layers: a raw location or a deriver, in one pass.

    Attributes:
        pass_type: which pass.
        layer_indexer: which layer of it belongs to a layer of the result.
    """

    pass_type: PassType
    layer_indexer: LayerIndexer

    @property
    @abstractmethod
    def exists_by_default(self) -> bool:
        """Whether a run of the model computes it."""

    @property
    @abstractmethod
    def dst(self) -> NamedScalar:
        """Its name."""

    @property
    @abstractmethod
    def location_within_layer(self) -> LocationWithinLayer | None:
        """Where in a block it is computed."""

    @property
    @abstractmethod
    def sub_activation_location_type_and_pass_types(self) -> tuple[ActivationLocationTypeAndPassType, ...]:
        """The raw locations that it comes from, of those that have a name there."""

    @property
    @abstractmethod
    def source(self) -> ours.ScalarSource:
        """The source of ours that it is."""

    @property
    def dst_and_pass_type(self) -> DerivedScalarTypeAndPassType:
        """Its name and pass."""
        return DerivedScalarTypeAndPassType(self.dst, self.pass_type)

    @property
    def layer_index(self) -> LayerIndex:
        """The one layer of a static indexer.

        Raises:
            UsageError: the indexer is not static.
        """
        if not isinstance(self.layer_indexer, StaticLayerIndexer):
            raise UsageError(f"{self.layer_indexer} gives no single layer; At(layer) and Unlayered() do")
        return self.layer_indexer.source(None)

    def derive_from_raw(
        self, raw_activation_store: RawActivationStore, desired_layer_indices: Sequence[LayerIndex] | None
    ) -> ActivationsAndMetadata:
        """Its tensors at some layers, ``[None]`` of what has none; at all if None."""
        return derived(self.dst, self.source, raw_activation_store, self.pass_type, desired_layer_indices)


@final
@dataclass(frozen=True)
class RawScalarSource(ScalarSource):
    """A raw location in one pass.

    Raises:
        UsageError: it has no layers, and the indexer is for some.
    """

    activation_location_type: NamedLocation
    pass_type: PassType
    layer_indexer: LayerIndexer = DEFAULT_LAYER_INDEXER

    def __post_init__(self) -> None:
        """Refuse layers of what has none."""
        if self.activation_location_type.has_no_layers and not isinstance(self.layer_indexer, NoLayersLayerIndexer):
            raise UsageError(
                f"{self.activation_location_type.name} has no layers: give it NoLayersLayerIndexer(), "
                f"not {self.layer_indexer}"
            )

    @property
    def exists_by_default(self) -> bool:
        """Whether the location does."""
        return self.activation_location_type.exists_by_default

    @property
    def dst(self) -> NamedScalar:
        """The name of its value."""
        return self.activation_location_type.dst

    @property
    def location_within_layer(self) -> LocationWithinLayer | None:
        """That of the location."""
        return self.activation_location_type.location_within_layer

    @property
    def sub_activation_location_type_and_pass_types(self) -> tuple[ActivationLocationTypeAndPassType, ...]:
        """Itself."""
        return (ActivationLocationTypeAndPassType(self.activation_location_type, self.pass_type),)

    @property
    def source(self) -> ours.ScalarSource:
        """A raw source."""
        return raw_source(self.activation_location_type, self.pass_type, self.layer_indexer)


@final
@dataclass(frozen=True)
class DerivedScalarSource(ScalarSource):
    """A deriver in one pass."""

    scalar_deriver: ScalarDeriver
    pass_type: PassType
    layer_indexer: LayerIndexer = DEFAULT_LAYER_INDEXER

    @property
    def exists_by_default(self) -> bool:
        """No."""
        return False

    @property
    def dst(self) -> NamedScalar:
        """That of the deriver."""
        return self.scalar_deriver.dst

    @property
    def location_within_layer(self) -> LocationWithinLayer | None:
        """That of the deriver."""
        return self.scalar_deriver.location_within_layer

    @property
    def sub_activation_location_type_and_pass_types(self) -> tuple[ActivationLocationTypeAndPassType, ...]:
        """Those of the deriver."""
        return self.scalar_deriver.get_sub_activation_location_type_and_pass_types()

    @property
    def source(self) -> ours.ScalarSource:
        """A derived source."""
        return ours.DerivedSource(self.scalar_deriver.deriver(self.pass_type), self.layer_indexer)


@final
@dataclass(frozen=True)
class _Whole(ScalarSource):
    """One of the 106 scalars as this library derives it, forward."""

    name: NamedScalar
    inner: Deriver
    pass_type: PassType = PassType.FORWARD
    layer_indexer: LayerIndexer = DEFAULT_LAYER_INDEXER

    @property
    def exists_by_default(self) -> bool:
        return False

    @property
    def dst(self) -> NamedScalar:
        return self.name

    @property
    def location_within_layer(self) -> LocationWithinLayer | None:
        return None if self.inner.basis is None else location_of(self.inner.basis.kind)

    @property
    def sub_activation_location_type_and_pass_types(self) -> tuple[ActivationLocationTypeAndPassType, ...]:
        by_kind = {location.kind: location for location in ActivationLocationType}
        found = [(by_kind[kind], pass_) for kind, pass_ in _captured(self.inner) if kind in by_kind]
        return tuple(
            ActivationLocationTypeAndPassType(location, PassType(pass_)) for location, pass_ in dict.fromkeys(found)
        )

    @property
    def source(self) -> ours.ScalarSource:
        return ours.DerivedSource(self.inner)


def _captured(deriver: Deriver) -> Iterator[tuple[str, str]]:
    """Kinds and passes of the raw sources below a deriver; the gradient at the end is that after the last block."""
    for source in deriver.sources:
        if isinstance(source, ours.RawSource):
            yield source.kind, source.pass_
        elif isinstance(source, ours.DerivedSource):
            yield from _captured(source.deriver)
        elif isinstance(source, DirectionSource) and isinstance(source.direction, MetricGrad):
            yield "resid.post", "backward"


@final
@dataclass(frozen=True)
class ScalarDeriver:
    """A scalar as a function of some sources, layer by layer.

    A transformed deriver is derived in the pass whose output is transformed, and in no other.

    Attributes:
        dst: its name.
        dst_config: what its name needs; ``layer_indices`` says which layers are derived.
        sub_scalar_sources: what the function takes.
        tensor_calculate_derived_scalar_fn: from the sources' tensors, the layer and the pass to the tensor.
        location: where in a block it is computed, if the sources do not say.
        passes: the passes that it can be derived in; by ``derive_gradients`` if None.
    """

    dst: NamedScalar
    dst_config: DstConfig
    sub_scalar_sources: tuple[ScalarSource, ...]
    tensor_calculate_derived_scalar_fn: TensorFunction
    location: LocationWithinLayer | None = None
    passes: tuple[PassType, ...] | None = None

    @property
    def shape_of_activation_per_token_spec(self) -> tuple[Axis, ...]:
        """What the axes after the token's count."""
        return self.dst.shape_spec_per_token_sequence[1:]

    @property
    def location_within_layer(self) -> LocationWithinLayer | None:
        """Where in a block it is computed: that of the first source unless given."""
        return self.sub_scalar_sources[0].location_within_layer if self.location is None else self.location

    @property
    def derivable_pass_types(self) -> tuple[PassType, ...]:
        """The passes that it can be derived in."""
        if self.passes is not None:
            return self.passes
        return tuple(PassType) if self.dst_config.derive_gradients else (PassType.FORWARD,)

    @property
    def n_input_tensors(self) -> int:
        """How many tensors its function takes."""
        return len(self.sub_scalar_sources)

    @property
    def n_total_required_tensors(self) -> int:
        """How many raw tensors are needed, those of sources of sources among them."""
        return len(self.get_sub_activation_location_type_and_pass_types())

    def get_sub_scalar_sources(self) -> tuple[ScalarSource, ...]:
        """What the function takes."""
        return self.sub_scalar_sources

    def get_sub_dst_and_pass_types(self) -> tuple[DerivedScalarTypeAndPassType, ...]:
        """Names and passes of what the function takes."""
        return tuple(source.dst_and_pass_type for source in self.sub_scalar_sources)

    def get_sub_activation_location_type_and_pass_types(self) -> tuple[ActivationLocationTypeAndPassType, ...]:
        """The raw locations that all of it comes from, repeated as they are used."""
        return tuple(
            one for source in self.sub_scalar_sources for one in source.sub_activation_location_type_and_pass_types
        )

    def deriver(self, pass_type: PassType) -> Deriver:
        """The deriver of ours that it is in one pass; its ``needs`` are for `capture`.

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
        """Its tensors, at the layers of its configuration that are there.

        Raises:
            UsageError: it cannot be derived in that pass.
            SiteError: what it needs was not captured.
        """
        source = ours.DerivedSource(self.deriver(pass_type))
        wanted = self.dst_config.layer_indices
        return derived(self.dst, source, raw_activation_store, pass_type, wanted)

    def to_serializable_dict(self) -> dict[str, Any]:
        """Name and configuration."""
        return {"dst": self.dst, "dst_config": self.dst_config}

    def apply_transform_fn_to_output(
        self,
        transform_fn: Callable[[Tensor], Tensor],
        pass_type_to_transform: PassType,
        output_dst: NamedScalar,
    ) -> ScalarDeriver:
        """Another scalar: a function of this one's output in one pass."""
        return self.apply_layerwise_transform_fn_to_output(
            lambda tensor, _layer, _pass: transform_fn(tensor), pass_type_to_transform, output_dst
        )

    def apply_layerwise_transform_fn_to_output(
        self,
        layerwise_transform_fn: Callable[[Tensor, LayerIndex, PassType], Tensor],
        pass_type_to_transform: PassType,
        output_dst: NamedScalar,
    ) -> ScalarDeriver:
        """Another scalar: a function of this one's output in one pass, of the layer and of the pass."""
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
        """Another scalar: a function of this one's output and of another source's, of the layer and of the pass."""
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
    """The deriver of one of the 106 names; of raw locations in both passes, of the others forward.

    Raises:
        UsageError: the configuration lacks what the name needs.
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
    return ScalarDeriver(dst, config, (_Whole(dst, inner),), lambda tensors, _, __: tensors[0], passes=passes)
