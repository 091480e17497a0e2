"""transformer-debugger's pairs of a name and a pass, and the tensors of one scalar."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from featurizers.errors import UsageError
from torch import Tensor

from featurizers_transformer_debugger.indexers import LayerIndex
from featurizers_transformer_debugger.names import NamedLocation, NamedScalar, PassType


@dataclass(frozen=True)
class ActivationLocationTypeAndPassType:
    """A raw location and a pass."""

    activation_location_type: NamedLocation
    pass_type: PassType

    @property
    def exists_by_default(self) -> bool:
        """True if a run of the model computes the location."""
        return self.activation_location_type.exists_by_default


@dataclass(frozen=True)
class DerivedScalarTypeAndPassType:
    """A scalar and a pass."""

    dst: NamedScalar
    pass_type: PassType


@final
@dataclass(frozen=True)
class DerivedScalarIndex:
    """One entry of a scalar's tensors.

    Attributes:
        dst: the scalar.
        tensor_indices: index on each axis.
        layer_index: layer of the tensor.
        pass_type: the pass.
    """

    dst: NamedScalar
    tensor_indices: tuple[int | None, ...]
    layer_index: LayerIndex
    pass_type: PassType


@final
@dataclass(frozen=True, eq=False)
class ActivationsAndMetadata:
    """Tensors of one scalar and one pass, by layer.

    Two are equal if their layers and shapes are and their entries are close, whatever their names and passes.

    Attributes:
        dst: the scalar.
        pass_type: the pass.
        activations_by_layer_index: the tensors.
    """

    dst: NamedScalar
    pass_type: PassType
    activations_by_layer_index: Mapping[LayerIndex, Tensor]

    @property
    def layer_indices(self) -> tuple[LayerIndex, ...]:
        """Layers, in order."""
        return tuple(sorted(self.activations_by_layer_index, key=lambda layer: -1 if layer is None else layer))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the first layer's tensor."""
        return tuple(self.activations_by_layer_index[self.layer_indices[0]].shape)

    @property
    def device(self) -> torch.device | None:
        """Device of the tensors; None if there are none."""
        return next((x.device for x in self.activations_by_layer_index.values()), None)

    def numel(self) -> int:
        """Return the number of entries of all layers."""
        return sum(x.numel() for x in self.activations_by_layer_index.values())

    def cpu(self) -> ActivationsAndMetadata:
        """Move the tensors to the CPU."""
        return self._each(lambda x, _: x.cpu())

    def clone(self) -> ActivationsAndMetadata:
        """Copy the tensors, detached from autograd."""
        return self._each(lambda x, _: x.detach().clone())

    def filter_layers(self, layer_indices: Sequence[LayerIndex] | None) -> ActivationsAndMetadata:
        """Return the tensors of some layers, and that of no layer; all if None."""
        if layer_indices is None:
            return self
        wanted = {*layer_indices, None}
        kept = {layer: x for layer, x in self.activations_by_layer_index.items() if layer in wanted}
        return dataclasses.replace(self, activations_by_layer_index=kept)

    # ---- functions of the tensors

    def _each(self, fn: Callable[[Tensor, LayerIndex], Tensor]) -> ActivationsAndMetadata:
        changed = {layer: fn(x, layer) for layer, x in self.activations_by_layer_index.items()}
        return dataclasses.replace(self, activations_by_layer_index=changed)

    def apply_transform_fn_to_activations(
        self, transform_fn: Callable[[Tensor], Tensor], output_dst: NamedScalar, output_pass_type: PassType
    ) -> ActivationsAndMetadata:
        """Apply a function to each layer's tensor; the result is another scalar."""
        return self.apply_layerwise_transform_fn_to_activations(
            lambda x, _: transform_fn(x), output_dst, output_pass_type
        )

    def apply_layerwise_transform_fn_to_activations(
        self,
        layerwise_transform_fn: Callable[[Tensor, LayerIndex], Tensor],
        output_dst: NamedScalar,
        output_pass_type: PassType,
    ) -> ActivationsAndMetadata:
        """Apply a function of the tensor and the layer to each layer's tensor; the result is another scalar."""
        return dataclasses.replace(self._each(layerwise_transform_fn), dst=output_dst, pass_type=output_pass_type)

    def apply_transform_fn_to_multiple_activations(
        self,
        transform_fn: Callable[..., Tensor],
        others: tuple[ActivationsAndMetadata, ...],
        output_dst: NamedScalar,
        output_pass_type: PassType,
    ) -> ActivationsAndMetadata:
        """Apply a function to the tensors of this and others, layer by layer; the result is another scalar.

        Raises:
            UsageError: the layers are not the same.
        """

        def fn(*tensors: Tensor, layer_index: LayerIndex) -> Tensor:  # noqa: ARG001
            return transform_fn(*tensors)

        return self.apply_layerwise_transform_fn_to_multiple_activations(fn, others, output_dst, output_pass_type)

    def apply_layerwise_transform_fn_to_multiple_activations(
        self,
        layerwise_transform_fn: Callable[..., Tensor],
        others: tuple[ActivationsAndMetadata, ...],
        output_dst: NamedScalar,
        output_pass_type: PassType,
    ) -> ActivationsAndMetadata:
        """Apply a function of tensors and ``layer_index=`` to those of this and others; the result is another scalar.

        Raises:
            UsageError: the layers are not the same.
        """
        for other in others:
            if other.layer_indices != self.layer_indices:
                raise UsageError(
                    f"{self.dst.value} has the layers {list(self.layer_indices)} and {other.dst.value} has "
                    f"{list(other.layer_indices)}; bring both to the same with filter_layers"
                )
        tensors = [other.activations_by_layer_index for other in others]
        return self.apply_layerwise_transform_fn_to_activations(
            lambda x, layer: layerwise_transform_fn(x, *(other[layer] for other in tensors), layer_index=layer),
            output_dst,
            output_pass_type,
        )

    def __eq__(self, other: object) -> bool:
        """Return True if layers and shapes are equal and all entries close."""
        if not isinstance(other, ActivationsAndMetadata) or self.layer_indices != other.layer_indices:
            return False
        pairs = [(x, other.activations_by_layer_index[layer]) for layer, x in self.activations_by_layer_index.items()]
        return all(a.shape == b.shape and torch.allclose(a, b) for a, b in pairs)

    __hash__ = None  # type: ignore[assignment]

    def __add__(self, other: ActivationsAndMetadata) -> ActivationsAndMetadata:
        """Add the tensors of another, layer by layer."""
        return self.apply_transform_fn_to_multiple_activations(torch.add, (other,), self.dst, self.pass_type)

    def __sub__(self, other: ActivationsAndMetadata) -> ActivationsAndMetadata:
        """Subtract the tensors of another, layer by layer."""
        return self.apply_transform_fn_to_multiple_activations(torch.sub, (other,), self.dst, self.pass_type)

    # ---- numbers

    def sum(self) -> Tensor:
        """Sum all entries of all layers."""
        return torch.stack([x.sum() for x in self.activations_by_layer_index.values()]).sum()

    def sum_abs(self) -> Tensor:
        """Sum the magnitudes of all entries of all layers."""
        return self._each(lambda x, _: x.abs()).sum()

    def topk(self, k: int, largest: bool) -> tuple[Tensor, list[DerivedScalarIndex]]:
        """Return the largest or the smallest k entries of all layers, or all if there are fewer, and where they are."""
        tensors = self.activations_by_layer_index
        ends = [(layer, tensors[layer].flatten()) for layer in self.layer_indices]
        tops = [(layer, *x.topk(min(k, x.numel()), largest=largest)) for layer, x in ends]
        values = torch.cat([value for _, value, _ in tops])
        where = [(layer, flat) for layer, _, indices in tops for flat in indices]
        best = values.topk(min(k, values.numel()), largest=largest)
        return best.values, [self._index(*where[i]) for i in best.indices.tolist()]

    def max(self) -> tuple[Tensor, DerivedScalarIndex]:
        """Return the largest entry of all layers, and where it is."""
        values, indices = self.topk(1, largest=True)
        return values[0], indices[0]

    def _index(self, layer: LayerIndex, flat: Tensor) -> DerivedScalarIndex:
        at = torch.unravel_index(flat, self.activations_by_layer_index[layer].shape)
        return DerivedScalarIndex(self.dst, tuple(int(i) for i in at), layer, self.pass_type)
