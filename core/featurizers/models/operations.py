"""Operations: edits of the activations of a site, made through a featurizer.

Each operation is a frozen description; `featurizers.intervene` carries it out with hooks on a model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, Literal

from torch import Tensor, nn

from featurizers.errors import UsageError, shown
from featurizers.features.featurizer import Featurizer
from featurizers.features.indices import Indices
from featurizers.models.positions import Inputs, Positions


@dataclass(frozen=True, eq=False)
class Operation(ABC):
    """Base of the operations.

    Attributes:
        featurizer: maps the activations to features and back.
        positions: tokens to edit; see `Positions`.
    """

    featurizer: Featurizer[Any]
    positions: Positions = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        """Raise UsageError unless the first argument is a featurizer."""
        if not isinstance(self.featurizer, Featurizer):
            raise UsageError(f"{type(self).__name__} needs a Featurizer first, got {type(self.featurizer).__name__}")

    @abstractmethod
    def apply(self, base: Tensor, source: Tensor | None) -> Tensor:
        """Return edited activations, or features to collect, for activations ``(batch, n_positions, d_in)``."""


@dataclass(frozen=True, eq=False)
class SourcedOperation(Operation):
    """Base of the operations that take features from a source.

    Attributes:
        source: activations of the same site, ``(batch, n_positions, d_in)``, or ``(batch, d_in)`` for a single
            position; or inputs of the model, whose activations are then collected without gradient.
        source_positions: tokens to read in those inputs; None for ``positions``.
    """

    source: Tensor | Inputs = field(kw_only=True)
    source_positions: Positions = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        """Raise UsageError unless the source is activations or model inputs."""
        super().__post_init__()
        if not isinstance(self.source, Tensor | Mapping):
            raise UsageError(
                f"the source of {type(self).__name__} is a tensor of activations or a mapping of model inputs, "
                f"not {type(self.source).__name__}"
            )
        if isinstance(self.source, Tensor) and not self.source.is_floating_point():
            raise UsageError("the source holds integers; give token ids as a mapping: source={'input_ids': ids}")


@dataclass(frozen=True, eq=False)
class Interchange(SourcedOperation):
    """Replaces features by those of a source: `Featurizer.interchange`.

    Attributes:
        indices: features to replace, the same for all examples or for each example its own.
    """

    indices: Indices = field(default=None, kw_only=True)

    def apply(self, base: Tensor, source: Tensor | None) -> Tensor:
        """Return base with the source's features."""
        return self.featurizer.interchange(base, given(source), self.indices)


@dataclass(frozen=True, eq=False)
class Mask(SourcedOperation):
    """Moves each feature towards the source's by a gate: `Featurizer.mask`.

    Attributes:
        gate: ``(n_features,)`` between 0 and 1, or a module that returns such a tensor, as `featurizers.SigmoidGate`
            does.
    """

    gate: Tensor | nn.Module = field(kw_only=True)

    def __post_init__(self) -> None:
        """Raise UsageError unless the gate is a tensor or a module."""
        super().__post_init__()
        if not isinstance(self.gate, Tensor | nn.Module):
            raise UsageError(f"the gate of Mask is a tensor or a module that returns one, not {shown(self.gate)}")

    def apply(self, base: Tensor, source: Tensor | None) -> Tensor:
        """Return base with its features moved towards the source's."""
        gate = self.gate() if isinstance(self.gate, nn.Module) else self.gate
        return self.featurizer.mask(base, given(source), gate)


@dataclass(frozen=True, eq=False)
class Steer(Operation):
    """Adds to features: `Featurizer.steer`.

    Attributes:
        delta: a number, or one number for each of the features, in units of the features.
        indices: features to add to.
    """

    delta: float | Tensor = field(kw_only=True)
    indices: Indices = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        """Raise UsageError unless delta is a number or a tensor."""
        super().__post_init__()
        if not _is_value(self.delta):
            raise UsageError(f"the delta of Steer is a number or a tensor, not {shown(self.delta)}")

    def apply(self, base: Tensor, source: Tensor | None) -> Tensor:
        """Return base with delta added to its features."""
        return self.featurizer.steer(base, self.delta, self.indices)


@dataclass(frozen=True, eq=False)
class Ablate(Operation):
    """Sets features to a value: `Featurizer.ablate`.

    Attributes:
        value: a number; a number for each of the features, such as a mean over a data set; or ``"mean"``, the mean
            over the examples and positions of the batch.
        indices: features to set.
    """

    value: float | Tensor | Literal["mean"] = field(default=0.0, kw_only=True)
    indices: Indices = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        """Raise UsageError unless the value is a number, a tensor or ``"mean"``."""
        super().__post_init__()
        if not (_is_value(self.value) or (isinstance(self.value, str) and self.value == "mean")):
            raise UsageError(f"Ablate takes a number, a tensor or 'mean', not {shown(self.value)}")

    def apply(self, base: Tensor, source: Tensor | None) -> Tensor:
        """Return base with its features set."""
        value = self.value
        if isinstance(value, str):
            value = self.featurizer.collect(base, self.indices).flatten(0, -2).mean(dim=0)
        return self.featurizer.ablate(base, self.indices, value)


@dataclass(frozen=True, eq=False)
class Collect(Operation):
    """Collects the features of a site, and edits nothing.

    Attributes:
        indices: features to collect, in this order.
    """

    indices: Indices = field(default=None, kw_only=True)

    def apply(self, base: Tensor, source: Tensor | None) -> Tensor:
        """Return the features, ``(batch, n_positions, k)``."""
        return self.featurizer.collect(base, self.indices)


def _is_value(value: object) -> bool:
    return isinstance(value, Tensor | Real)


def given(source: Tensor | None) -> Tensor:
    """Return the source's activations, which `intervene` has read.

    Raises:
        UsageError: the source is None, because the operation has model inputs and is not run by `intervene`.
    """
    if source is None:
        raise UsageError("the operation has a source in the form of inputs, which only `intervene` can run")
    return source
