"""Derived scalars as featurizers, where they are: a diagonal map, or one direction."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from featurizers import Featurizer
from featurizers.errors import UsageError

if TYPE_CHECKING:
    from featurizers_derived_scalars.activations import RawActivations
    from featurizers_derived_scalars.derivers import Deriver


def as_featurizer(deriver: Deriver, raw: RawActivations | None, layer: int | None) -> Featurizer[Any]:
    """See `Deriver.as_featurizer`."""
    raise UsageError(f"{deriver.name} is no featurizer {raw} {layer}")
