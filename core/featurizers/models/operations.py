"""Operations: what is done to the activations of a site, through a featurizer.

Each is a frozen description; `featurizers.intervene` carries it out with hooks on a model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from featurizers.errors import UsageError
from featurizers.features.featurizer import Featurizer
from featurizers.features.indices import Indices
from featurizers.models.positions import Inputs, Positions


@dataclass(frozen=True, eq=False)
class Operation(ABC):
    """Base of the operations.

    Attributes:
        featurizer: what the activations are seen through.
        positions: which tokens; see `Positions`.
    """

    featurizer: Featurizer[Any]
    positions: Positions = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        """Refuse what is not a featurizer."""
        if not isinstance(self.featurizer, Featurizer):
            raise UsageError(f"{type(self).__name__} needs a Featurizer first, got {type(self.featurizer).__name__}")

    @abstractmethod
    def apply(self, base: Tensor, source: Tensor | None) -> Tensor:
        """What becomes of activations ``(batch, n_positions, d_in)``: edited ones, or features to keep."""


@dataclass(frozen=True, eq=False)
class SourcedOperation(Operation):
    """Base of the operations that take features from somewhere else.

    Attributes:
        source: activations of the same site, ``(batch, n_positions, d_in)``, or ``(batch, d_in)`` for one
            position; or the inputs of a model, whose activations are then collected without gradient.
        source_positions: tokens to read in those inputs; ``positions`` unless given.
    """

    source: Tensor | Inputs = field(kw_only=True)
    source_positions: Positions = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        """Refuse a source that is neither activations nor inputs."""
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
    """Swaps features for those of a source: `Featurizer.interchange`.

    Attributes:
        indices: which features, for all examples or for each its own.
    """

    indices: Indices = field(default=None, kw_only=True)

    def apply(self, base: Tensor, source: Tensor | None) -> Tensor:
        """Base with the source's features."""
        return self.featurizer.interchange(base, given(source), self.indices)


@dataclass(frozen=True, eq=False)
class Mask(SourcedOperation):
    """Moves each feature towards that of a source by a gate: `Featurizer.mask`.

    Attributes:
        gate: ``(n_features,)`` between 0 and 1, or a module that returns it, such as `featurizers.SigmoidGate`.
    """

    gate: Tensor | nn.Module = field(kw_only=True)

    def apply(self, base: Tensor, source: Tensor | None) -> Tensor:
        """Base with the gated features of the source."""
        gate = self.gate() if isinstance(self.gate, nn.Module) else self.gate
        return self.featurizer.mask(base, given(source), gate)


@dataclass(frozen=True, eq=False)
class Steer(Operation):
    """Adds to features: `Featurizer.steer`.

    Attributes:
        delta: a number, or one for each selected feature.
        indices: which features.
    """

    delta: float | Tensor = field(kw_only=True)
    indices: Indices = field(default=None, kw_only=True)

    def apply(self, base: Tensor, source: Tensor | None) -> Tensor:
        """Base with delta added to its features."""
        return self.featurizer.steer(base, self.delta, self.indices)


@dataclass(frozen=True, eq=False)
class Ablate(Operation):
    """Sets features to a value: `Featurizer.ablate`.

    Attributes:
        value: a number (0 unless given); one for each selected feature, such as a mean over a data set; or
            ``"mean"``, the mean over the examples and positions of the batch itself.
        indices: which features.
    """

    value: float | Tensor | Literal["mean"] = field(default=0.0, kw_only=True)
    indices: Indices = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        """Refuse a string that is not ``"mean"``."""
        super().__post_init__()
        if isinstance(self.value, str) and self.value != "mean":
            raise UsageError(f"Ablate takes a number, a tensor or 'mean', not {self.value!r}")

    def apply(self, base: Tensor, source: Tensor | None) -> Tensor:
        """Base with its features set."""
        value = self.value
        if isinstance(value, str):
            value = self.featurizer.collect(base, self.indices).flatten(0, -2).mean(dim=0)
        return self.featurizer.ablate(base, self.indices, value)


@dataclass(frozen=True, eq=False)
class Collect(Operation):
    """Keeps the features of a site, and edits nothing.

    Attributes:
        indices: which features, in the order wanted.
    """

    indices: Indices = field(default=None, kw_only=True)

    def apply(self, base: Tensor, source: Tensor | None) -> Tensor:
        """The features, ``(batch, n_positions, k)``."""
        return self.featurizer.collect(base, self.indices)


def given(source: Tensor | None) -> Tensor:
    """The activations that an operation's source was made to.

    Raises:
        UsageError: it is still in the form of inputs.
    """
    if source is None:
        raise UsageError("the operation has a source in the form of inputs, which only `intervene` can run")
    return source
