"""transformer-debugger's scalar derivers, over those of `featurizers_derived_scalars`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from featurizers.errors import UsageError
from featurizers_derived_scalars import Deriver, quantities
from featurizers_derived_scalars.nodes import NodeAxis
from featurizers_derived_scalars.quantities import Context, DerivedSource
from torch import Tensor

from featurizers_transformer_debugger.activations import (
    ActivationLocationTypeAndPassType,
    ActivationsAndMetadata,
    DerivedScalarTypeAndPassType,
)
from featurizers_transformer_debugger.config import DstConfig
from featurizers_transformer_debugger.indexers import DEFAULT_LAYER_INDEXER, LayerIndex, LayerIndexer
from featurizers_transformer_debugger.names import LocationWithinLayer, NamedScalar, PassType
from featurizers_transformer_debugger.sources import ScalarSource
from featurizers_transformer_debugger.stores import RawActivationStore, derived

TensorFunction = Callable[[tuple[Tensor, ...], LayerIndex, PassType], Tensor]


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
class ScalarDeriver:
    """A scalar as a function of some sources, layer by layer.

    A transformed deriver is derived only in the pass whose output is transformed.

    Attributes:
        dst: its name.
        dst_config: options of its name; ``layer_indices`` says which layers are derived.
        sub_scalar_sources: sources of the function's tensors.
        tensor_calculate_derived_scalar_fn: from the sources' tensors, the layer and the pass to the tensor.
        _specified_location_within_layer: location in a block; None for that of its name or of its first source.
        passes: passes that it can be derived in; None for those that ``derive_gradients`` gives.
    """

    dst: NamedScalar
    dst_config: DstConfig
    sub_scalar_sources: tuple[ScalarSource, ...]
    tensor_calculate_derived_scalar_fn: TensorFunction
    _specified_location_within_layer: LocationWithinLayer | None = None
    passes: tuple[PassType, ...] | None = None

    @property
    def shape_of_activation_per_token_spec(self) -> tuple[NodeAxis, ...]:
        """Axes after the token's."""
        return self.dst.shape_spec_per_token_sequence[1:]

    @property
    def location_within_layer(self) -> LocationWithinLayer | None:
        """Location in a block.

        Raises:
            UsageError: the specified one is not that of the name.
        """
        specified, own = self._specified_location_within_layer, self.dst.location_within_layer
        if specified is not None and own is not None and specified is not own:
            raise UsageError(f"{self.dst.value} is at {own.name}, and {specified.name} was specified; leave it out")
        known = own if specified is None else specified
        return self.sub_scalar_sources[0].location_within_layer if known is None else known

    @property
    def device_for_raw_activations(self) -> torch.device:
        """Device that its configuration reads raw activations onto."""
        return self.dst_config.get_device()

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

    def _check_pass(self, pass_type: PassType) -> None:
        if pass_type not in self.derivable_pass_types:
            able = " and ".join(self.derivable_pass_types)
            raise UsageError(f"{self.dst.value} is derived {able}, not {pass_type.value}")

    def deriver(self, pass_type: PassType) -> Deriver:
        """Return the equivalent deriver of `featurizers_derived_scalars` in one pass; its ``needs`` are for `capture`.

        Raises:
            UsageError: it cannot be derived in that pass.
        """
        self._check_pass(pass_type)

        def fn(context: Context, *tensors: Tensor) -> Tensor:
            return self.tensor_calculate_derived_scalar_fn(tensors, context.layer, pass_type)

        sources = tuple(source.source for source in self.sub_scalar_sources)
        return Deriver(self.dst.value, sources, self.dst.shape_spec_per_token_sequence, fn)

    def derive_from_raw(self, raw_activation_store: RawActivationStore, pass_type: PassType) -> ActivationsAndMetadata:
        """Return its tensors at the layers of its configuration; what the model has once, whatever these are.

        Raises:
            UsageError: it cannot be derived in that pass, or its configuration is of another model or device.
            SiteError: what it needs was not captured.
        """
        self.dst_config.check(raw_activation_store.raw)
        source = DerivedSource(self.deriver(pass_type))
        there = source.layers(raw_activation_store.raw)
        layers = None if there is None or there == {None} else self.dst_config.layer_indices
        return derived(self.dst, source, raw_activation_store, pass_type, layers)

    def activations_and_metadata_calculate_derived_scalar_fn(
        self, activation_data_tuple: tuple[ActivationsAndMetadata, ...], pass_type: PassType
    ) -> ActivationsAndMetadata:
        """Return its tensors from those of its sources, at the layers of its configuration.

        A deriver of `make_scalar_deriver` that is of no raw location has itself as its only source.

        Args:
            activation_data_tuple: tensors of each source, in order.
            pass_type: the pass.

        Raises:
            UsageError: the tensors are not those of the sources, or of different layers, or it cannot be derived in
                that pass.
        """
        self._check_pass(pass_type)
        wanted = [(one.dst.value, one.pass_type.value) for one in self.get_sub_dst_and_pass_types()]
        found = [(one.dst.value, one.pass_type.value) for one in activation_data_tuple]
        if found != wanted:
            raise UsageError(f"{self.dst.value} is computed from {_listed(wanted)}, not from {_listed(found)}")
        first, *others = (one.filter_layers(self.dst_config.layer_indices) for one in activation_data_tuple)
        return first.apply_layerwise_transform_fn_to_multiple_activations(
            lambda *tensors, layer_index: self.tensor_calculate_derived_scalar_fn(tensors, layer_index, pass_type),
            tuple(others),
            self.dst,
            pass_type,
        )

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
            _specified_location_within_layer=self.location_within_layer,
            passes=(pass_type,),
        )


def _listed(pairs: Sequence[tuple[str, str]]) -> str:
    return " and ".join(f"{name} ({pass_})" for name, pass_ in pairs) or "nothing"
