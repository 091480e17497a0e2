"""transformer-debugger's configuration and stores, over `RawActivations` and `Scalars`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor

from featurizers_derived_scalars.activations import RawActivations
from featurizers_derived_scalars.compat.names import LayerIndex, NamedLocation, NamedScalar, PassType
from featurizers_derived_scalars.debugger_table import ROWS
from featurizers_derived_scalars.derivers import Context, Deriver
from featurizers_derived_scalars.layer_maps import SAME, LayerMap
from featurizers_derived_scalars.nodes import Node
from featurizers_derived_scalars.sources import DerivedSource, RawSource, ScalarSource


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
    """What derivers of some names need; one that lacks a field says which.

    Attributes:
        layer_indices: layers of the results; None for all.
        derive_gradients: whether the backward pass is offered too, where there is one.
        featurizers: by kind of place; in the stead of a registry of autoencoders.
        node: of traced nodes and edges.
        latent: of the names of one feature.
    """

    layer_indices: Sequence[int] | None = None
    derive_gradients: bool = False
    featurizers: Mapping[str, Any] = field(default_factory=dict)
    node: Node | None = None
    latent: int | None = None


@final
@dataclass(frozen=True)
class ActivationsAndMetadata:
    """Tensors by layer, of one scalar and one pass.

    Attributes:
        activations_by_layer_index: the tensors.
        dst: which scalar.
        pass_type: which pass.
    """

    activations_by_layer_index: Mapping[LayerIndex, Tensor]
    dst: NamedScalar
    pass_type: PassType

    @property
    def layer_indices(self) -> tuple[LayerIndex, ...]:
        """The layers, in order."""
        return tuple(sorted(self.activations_by_layer_index, key=lambda layer: -1 if layer is None else layer))

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the first layer's tensor."""
        return tuple(self.activations_by_layer_index[self.layer_indices[0]].shape)

    def filter_layers(self, layer_indices: Sequence[LayerIndex] | None) -> ActivationsAndMetadata:
        """Those of some layers; all if None."""
        if layer_indices is None:
            return self
        kept = {layer: x for layer, x in self.activations_by_layer_index.items() if layer in layer_indices}
        return dataclasses.replace(self, activations_by_layer_index=kept)

    def apply_transform_fn_to_activations(
        self, transform_fn: Callable[[Tensor], Tensor], output_dst: NamedScalar, output_pass_type: PassType
    ) -> ActivationsAndMetadata:
        """A function of each layer's tensor, as another scalar."""
        made = {layer: transform_fn(x) for layer, x in self.activations_by_layer_index.items()}
        return ActivationsAndMetadata(made, output_dst, output_pass_type)

    def sum(self) -> Tensor:
        """Of all entries of all layers."""
        return torch.stack([x.sum() for x in self.activations_by_layer_index.values()]).sum()


@final
@dataclass(frozen=True)
class RawActivationStore:
    """What was captured of a sequence, by raw location and pass."""

    raw: RawActivations

    def get_activations_and_metadata(self, location: NamedLocation, pass_type: PassType) -> ActivationsAndMetadata:
        """Every layer that was captured of a location.

        Raises:
            SiteError: none was.
        """
        return derived(location.dst, raw_source(location, pass_type), self, pass_type, None)


def raw_source(location: NamedLocation, pass_type: PassType, at: LayerMap = SAME) -> ScalarSource:
    """What a location holds; queries and keys have the factor ``d_head ** -0.25`` in them there, and not here."""
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
    """The tensors of a source at some layers; all if None."""
    if layers is not None and source.layers(store.raw) is None:  # one tensor for whichever layer is asked for
        return ActivationsAndMetadata({layer: source.derive(store.raw, layer) for layer in layers}, dst, pass_type)
    deriver = Deriver(dst.value, (source,), source.axes, lambda _, x: x)
    found = deriver.derive(store.raw, layers)
    return ActivationsAndMetadata({layer: found[name, layer] for name, layer in found}, dst, pass_type)
