"""What a cell does to its activations, through a featurizer or on the activations themselves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import featurizers
from featurizers import Featurizer
from featurizers.errors import UsageError, did_you_mean, shown
from torch import Tensor

Change: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""Maps activations of base and source, ``(k, d)`` each, to the activations to go on with, ``(k, d)``."""

OPERATIONS = ("interchange", "ablate", "mask")


@dataclass(frozen=True)
class Options:
    """What is done in each cell.

    Attributes:
        operation: ``interchange``, ``ablate`` or ``mask``, as the operations of `featurizers.intervene`; or a `Change`.
        indices: features to change, None for all.
        value: of ``ablate``: a number, or one for each feature.
        gate: of ``mask``: how far to move each feature towards the source, from 0 to 1.
    """

    operation: str | Change
    indices: Any = None
    value: float | Tensor = 0.0
    gate: Tensor | None = None

    def __post_init__(self) -> None:
        """Raise UsageError unless the options fit each other."""
        named = isinstance(self.operation, str)
        if named and self.operation not in OPERATIONS:
            near = did_you_mean(self.operation, OPERATIONS)
            raise UsageError(f"there is no operation {shown(self.operation)}. {near}")
        if not named and not callable(self.operation):
            raise UsageError(f"an operation is a name or a function of base and source, not {shown(self.operation)}")
        if (self.operation == "mask") != (self.gate is not None):
            raise UsageError("operation='mask' takes a gate, and no other operation does")
        if self.indices is not None and self.operation not in ("interchange", "ablate"):
            raise UsageError("indices are for the operations 'interchange' and 'ablate'")
        if isinstance(self.value, str):
            raise UsageError("the value of 'ablate' is a number or a tensor, such as a mean over a data set")

    @property
    def keeps_equal(self) -> bool:
        """Whether nothing changes where base and source are equal."""
        return self.operation in ("interchange", "mask")

    def through(self, featurizer: Featurizer[Any] | None) -> Change:
        """Return the change at a site.

        Raises:
            UsageError: an option needs a featurizer, or takes none.
        """
        operation = self.operation
        if not isinstance(operation, str):
            if featurizer is not None:
                raise UsageError("a function as operation works on activations; call the featurizer inside of it")
            return operation
        if featurizer is None and self.indices is not None:
            raise UsageError("indices are numbers of features; give the featurizer that they belong to")
        if featurizer is None and operation == "interchange":
            return lambda _, source: source
        f = featurizers.create("identity") if featurizer is None else featurizer
        return lambda base, source: self._edited(f, base.unsqueeze(1), source.unsqueeze(1)).squeeze(1)

    def _edited(self, featurizer: Featurizer[Any], base: Tensor, source: Tensor) -> Tensor:
        """Return activations of shape ``(k, 1, d)``, as `featurizers.intervene` gives them to operations."""
        if self.operation == "ablate":
            return featurizer.ablate(base, self.indices, self.value)
        if self.gate is not None:
            return featurizer.mask(base, source, self.gate)
        return featurizer.interchange(base, source, self.indices)
