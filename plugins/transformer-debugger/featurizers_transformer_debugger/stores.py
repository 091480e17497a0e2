"""transformer-debugger's configuration and stores, over `RawActivations` and `Scalars`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import torch
from featurizers_derived_scalars import Deriver, Node, RawActivations
from featurizers_derived_scalars.quantities import SAME, Context, DerivedSource, LayerMap, RawSource, ScalarSource
from torch import Tensor

from featurizers_transformer_debugger.indexers import LayerIndex
from featurizers_transformer_debugger.names import NamedLocation, NamedScalar, PassType
from featurizers_transformer_debugger.table import ROWS


@dataclass(frozen=True)
class ActivationLocationTypeAndPassType:
    """A raw location and a pass."""

    activation_location_type: NamedLocation
    pass_type: PassType


@dataclass(frozen=True)
class DerivedScalarTypeAndPassType:
    """A scalar and a pass."""

    dst: NamedScalar
    pass_type: PassType


@dataclass(frozen=True)
class DstConfig:
    """Options of derivers; a name that lacks an option raises an error that names it.

    Attributes:
        layer_indices: layers of the results; None for all.
        derive_gradients: offer the backward pass too, where there is one.
        featurizers: featurizers by kind of place, instead of a registry of autoencoders.
        node: for names of traced nodes and edges.
        latent: for names of one feature.
    """

    layer_indices: Sequence[int] | None = None
    derive_gradients: bool = False
    featurizers: Mapping[str, Any] = field(default_factory=dict)
    node: Node | None = None
    latent: int | None = None


@final
@dataclass(frozen=True)
class ActivationsAndMetadata:
    """Tensors of one scalar and one pass, by layer.

    Attributes:
        activations_by_layer_index: the tensors.
        dst: the scalar.
        pass_type: the pass.
    """

    activations_by_layer_index: Mapping[LayerIndex, Tensor]
    dst: NamedScalar
    pass_type: PassType

    @property
    def layer_indices(self) -> tuple[LayerIndex, ...]:
        """Layers, in order."""
        return tuple(sorted(self.activations_by_layer_index, key=lambda layer: -1 if layer is None else layer))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the first layer's tensor."""
        return tuple(self.activations_by_layer_index[self.layer_indices[0]].shape)

    def filter_layers(self, layer_indices: Sequence[LayerIndex] | None) -> ActivationsAndMetadata:
        """Return the tensors of some layers; all if None."""
        if layer_indices is None:
            return self
        kept = {layer: x for layer, x in self.activations_by_layer_index.items() if layer in layer_indices}
        return dataclasses.replace(self, activations_by_layer_index=kept)

    def apply_transform_fn_to_activations(
        self, transform_fn: Callable[[Tensor], Tensor], output_dst: NamedScalar, output_pass_type: PassType
    ) -> ActivationsAndMetadata:
        """Apply a function to each layer's tensor; the result is another scalar."""
        transformed = {layer: transform_fn(x) for layer, x in self.activations_by_layer_index.items()}
        return ActivationsAndMetadata(transformed, output_dst, output_pass_type)

    def sum(self) -> Tensor:
        """Sum all entries of all layers."""
        return torch.stack([x.sum() for x in self.activations_by_layer_index.values()]).sum()


@final
@dataclass(frozen=True)
class RawActivationStore:
    """Captured tensors of a sequence, by raw location and pass."""

    raw: RawActivations

    def get_activations_and_metadata(self, location: NamedLocation, pass_type: PassType) -> ActivationsAndMetadata:
        """Return every layer that was captured of a location.

        Raises:
            SiteError: none was.
        """
        return derived(location.dst, raw_source(location, pass_type), self, pass_type, None)


def raw_source(location: NamedLocation, pass_type: PassType, at: LayerMap = SAME) -> ScalarSource:
    """Return the source of a location; queries and keys are multiplied by ``d_head ** -0.25`` as they are there."""
    plain = RawSource(location.kind, "forward" if pass_type is PassType.FORWARD else "backward", at)
    if "scaled" not in ROWS[location.value].twists:
        return plain
    power = -0.25 if pass_type is PassType.FORWARD else 0.25

    def scaled(context: Context, x: Tensor) -> Tensor:
        factor: float = context.circuit.d_head**power
        return x * factor

    return DerivedSource(Deriver(location.value, (plain,), plain.axes, scaled))


def derived(
    dst: NamedScalar,
    source: ScalarSource,
    store: RawActivationStore,
    pass_type: PassType,
    layers: Sequence[LayerIndex] | None,
) -> ActivationsAndMetadata:
    """Return the tensors of a source at some layers; all if None."""
    if layers is not None and source.layers(store.raw) is None:  # one tensor for every layer
        return ActivationsAndMetadata({layer: source.derive(store.raw, layer) for layer in layers}, dst, pass_type)
    deriver = Deriver(dst.value, (source,), source.axes, lambda _, x: x)
    scalars = deriver.derive(store.raw, layers)
    return ActivationsAndMetadata({layer: scalars[name, layer] for name, layer in scalars}, dst, pass_type)
