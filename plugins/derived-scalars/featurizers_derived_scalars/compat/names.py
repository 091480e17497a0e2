"""transformer-debugger's enumerations and indexers, by their own names."""

from __future__ import annotations

from enum import IntEnum, StrEnum
from typing import Final, TypeAlias, cast

from featurizers_derived_scalars.axes import Axis
from featurizers_derived_scalars.debugger_table import ROWS
from featurizers_derived_scalars.layer_maps import SAME, At, LayerMap, Offset, Same, Unlayered
from featurizers_derived_scalars.places import KINDS

LayerIndex: TypeAlias = int | None
LayerIndexer: TypeAlias = LayerMap
IdentityLayerIndexer = Same
OffsetLayerIndexer = Offset
ConstantLayerIndexer = At
NoLayersLayerIndexer = Unlayered
StaticLayerIndexer = (At, Unlayered)
"""Those that always give one layer."""
DEFAULT_LAYER_INDEXER: Final = SAME


class PassType(StrEnum):
    """Activations, or the gradient in them."""

    FORWARD = "forward"
    BACKWARD = "backward"


class LocationWithinLayer(IntEnum):
    """Where in a block something is computed; what feeds another has the smaller number."""

    END_OF_PREV_LAYER = 0
    ATTN = 1
    RESID_POST_ATTN = 2
    MLP = 3
    RESID_POST_MLP = 4


def location_of(kind: str) -> LocationWithinLayer | None:
    """Where in a block a kind of place is computed; None for what the model has once."""
    return LocationWithinLayer(KINDS[kind].stage) if KINDS[kind].layered else None


class NamedScalar(StrEnum):
    """What `DerivedScalarType` is made of; it has no members of its own."""

    @property
    def shape_spec_per_token_sequence(self) -> tuple[Axis, ...]:
        """What the axes count, the token's first."""
        return ROWS[self.value].shape

    @property
    def spelled(self) -> str:
        """The scalar as a quantity, a basis and reductions."""
        return ROWS[self.value].spelled


class NamedLocation(StrEnum):
    """What `ActivationLocationType` is made of; it has no members of its own."""

    @property
    def kind(self) -> str:
        """Kind of place."""
        return ROWS[self.value].kind

    @property
    def dst(self) -> NamedScalar:
        """The scalar that its values are."""
        return DerivedScalarType(self.value)

    @property
    def has_no_layers(self) -> bool:
        """Whether the model has it once."""
        return not KINDS[self.kind].layered

    @property
    def location_within_layer(self) -> LocationWithinLayer | None:
        """Where in a block it is computed; None for what the model has once."""
        return location_of(self.kind)

    @property
    def exists_by_default(self) -> bool:
        """Whether a run of the model computes it: all do, for features are no locations here."""
        return True


RAW: Final = tuple(
    name
    for name, row in ROWS.items()
    if row.quantity == "value" and row.kind in KINDS and row.kind != "resid.pre" and not row.option
    if not {"pairs"} & set(row.twists)
)
"""The names that are raw locations too."""

DerivedScalarType: type[NamedScalar] = cast(
    "type[NamedScalar]",
    NamedScalar("DerivedScalarType", {name.upper(): name for name in ROWS}),  # type: ignore[call-arg]
)
"""The 106 names; the value of each is its name in lower case."""

ActivationLocationType: type[NamedLocation] = cast(
    "type[NamedLocation]",
    NamedLocation("ActivationLocationType", {name.upper(): name for name in RAW}),  # type: ignore[call-arg]
)
"""The raw locations, under the names of their values."""
