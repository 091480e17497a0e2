"""transformer-debugger's enumerations: passes, places within a layer, scalars and raw locations."""

from __future__ import annotations

from enum import IntEnum, StrEnum
from typing import Final, cast

from featurizers_derived_scalars.circuit import KINDS
from featurizers_derived_scalars.nodes import NodeAxis

from featurizers_transformer_debugger.table import ROWS


class PassType(StrEnum):
    """Activations, or the gradient in them."""

    FORWARD = "forward"
    BACKWARD = "backward"


class LocationWithinLayer(IntEnum):
    """Position in a block's order of computation; a tensor that feeds another has the smaller number."""

    END_OF_PREV_LAYER = 0
    ATTN = 1
    RESID_POST_ATTN = 2
    MLP = 3
    RESID_POST_MLP = 4


def location_of(kind: str) -> LocationWithinLayer | None:
    """Return the location of a kind of place; None for a kind that the model has once."""
    return LocationWithinLayer(KINDS[kind].stage) if KINDS[kind].layered else None


class NamedScalar(StrEnum):
    """Base of `DerivedScalarType`, without members."""

    @property
    def shape_spec_per_token_sequence(self) -> tuple[NodeAxis, ...]:
        """Axes, tokens first."""
        return ROWS[self.value].shape

    @property
    def spelled(self) -> str:
        """Scalar as a quantity, a basis and reductions."""
        return ROWS[self.value].spelled


class NamedLocation(StrEnum):
    """Base of `ActivationLocationType`, without members."""

    @property
    def kind(self) -> str:
        """Kind of place."""
        return ROWS[self.value].kind

    @property
    def dst(self) -> NamedScalar:
        """Scalar of its values."""
        return DerivedScalarType(self.value)

    @property
    def has_no_layers(self) -> bool:
        """True if the model has it once."""
        return not KINDS[self.kind].layered

    @property
    def location_within_layer(self) -> LocationWithinLayer | None:
        """Location in a block; None for a kind that the model has once."""
        return location_of(self.kind)

    @property
    def exists_by_default(self) -> bool:
        """True: a run of the model computes every location, since features are no locations here."""
        return True


RAW: Final = tuple(
    name
    for name, row in ROWS.items()
    if row.quantity == "value" and row.kind in KINDS and row.kind != "resid.pre" and not row.option
    if "pairs" not in row.twists
)
"""Names that are raw locations too."""

DerivedScalarType: type[NamedScalar] = cast(
    "type[NamedScalar]",
    NamedScalar("DerivedScalarType", {name.upper(): name for name in ROWS}),  # type: ignore[call-arg]
)
"""All 106 names; the value of each is its name in lower case."""

ActivationLocationType: type[NamedLocation] = cast(
    "type[NamedLocation]",
    NamedLocation("ActivationLocationType", {name.upper(): name for name in RAW}),  # type: ignore[call-arg]
)
"""Raw locations, under the names of their values."""
