"""transformer-debugger's store of captured tensors, over `RawActivations`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

from featurizers_derived_scalars import Deriver, RawActivations
from featurizers_derived_scalars.quantities import SAME, Context, DerivedSource, LayerMap, RawSource, ScalarSource
from torch import Tensor

from featurizers_transformer_debugger.activations import ActivationLocationTypeAndPassType, ActivationsAndMetadata
from featurizers_transformer_debugger.indexers import LayerIndex
from featurizers_transformer_debugger.names import ActivationLocationType, NamedLocation, NamedScalar, PassType
from featurizers_transformer_debugger.table import ROWS


@final
@dataclass(frozen=True)
class RawActivationStore:
    """Captured tensors of a sequence, by raw location and pass."""

    raw: RawActivations

    @property
    def activations_by_sub_activation_location_type_and_pass_type(
        self,
    ) -> Mapping[ActivationLocationTypeAndPassType, ActivationsAndMetadata]:
        """Tensors of each raw location and pass that was captured."""
        captured = {(place.kind, pass_) for place, pass_ in self.raw}
        pairs = [(location, pass_type) for location in ActivationLocationType for pass_type in PassType]
        return {
            ActivationLocationTypeAndPassType(*pair): self.get_activations_and_metadata(*pair)
            for pair in pairs
            if (pair[0].kind, pair[1].value) in captured
        }

    def get_activations_and_metadata(self, location: NamedLocation, pass_type: PassType) -> ActivationsAndMetadata:
        """Return every layer that was captured of a raw location.

        Raises:
            SiteError: none was.
        """
        return derived(location.dst, raw_source(location, pass_type), self, pass_type, None)


def raw_source(location: NamedLocation, pass_type: PassType, at: LayerMap = SAME) -> ScalarSource:
    """Return the source of a location; queries and keys are multiplied by ``d_head ** -0.25`` as they are there."""
    plain = RawSource(location.kind, "forward" if pass_type is PassType.FORWARD else "backward", at)
    if "scaled" not in ROWS[location.dst.value].twists:
        return plain
    power = -0.25 if pass_type is PassType.FORWARD else 0.25

    def scaled(context: Context, x: Tensor) -> Tensor:
        factor: float = context.circuit.d_head**power
        return x * factor

    return DerivedSource(Deriver(location.dst.value, (plain,), plain.axes, scaled))


def derived(
    dst: NamedScalar,
    source: ScalarSource,
    store: RawActivationStore,
    pass_type: PassType,
    layers: Sequence[LayerIndex] | None,
) -> ActivationsAndMetadata:
    """Return the tensors of a source at some layers; all if None."""
    if layers is not None and source.layers(store.raw) is None:  # one tensor for every layer
        return ActivationsAndMetadata(dst, pass_type, {layer: source.derive(store.raw, layer) for layer in layers})
    deriver = Deriver(dst.value, (source,), source.axes, lambda _, x: x)
    scalars = deriver.derive(store.raw, layers)
    return ActivationsAndMetadata(dst, pass_type, {layer: scalars[name, layer] for name, layer in scalars})
