"""`Metric`: the scalar whose gradient a capture takes, and the usual ones of the logits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias, final

import torch
from featurizers.errors import PositionError, UsageError, shown
from jaxtyping import Float
from torch import Tensor

from featurizers_derived_scalars.places import Need, Place

if TYPE_CHECKING:
    from featurizers_derived_scalars.activations import RawActivations

LogitFunction: TypeAlias = "Callable[[Float[Tensor, 'token vocab']], Float[Tensor, '']]"


class Metric(ABC):
    """A scalar of one sequence.

    `capture` runs the model as far as the metric's needs, hands it the activations with their graph, and takes the
    gradient of what it answers. A traced node is a metric that needs a residual and calls ``raw.circuit.recompute``.
    """

    @property
    @abstractmethod
    def needs(self) -> frozenset[Need]:
        """What it reads, forward only."""

    @abstractmethod
    def __call__(self, raw: RawActivations) -> Float[Tensor, ""]:
        """The scalar, differentiable in the tensors of ``raw``."""


class _OfLogits(Metric):
    """A metric that reads the logits alone."""

    @property
    @final
    def needs(self) -> frozenset[Need]:
        """The logits."""
        return frozenset({Need("logits")})

    @final
    def __call__(self, raw: RawActivations) -> Float[Tensor, ""]:
        """The scalar of the logits, in float32 or better."""
        logits = raw[Place("logits"), "forward"]
        return self.of(logits if logits.dtype == torch.float64 else logits.float())

    @abstractmethod
    def of(self, logits: Float[Tensor, "token vocab"]) -> Float[Tensor, ""]:
        """The scalar of one sequence's logits."""


@final
@dataclass(frozen=True)
class LogitMetric(_OfLogits):
    """Any function of the logits as a metric.

    Attributes:
        function: from logits, ``(token, vocab)``, to a scalar.
    """

    function: LogitFunction

    def of(self, logits: Float[Tensor, "token vocab"]) -> Float[Tensor, ""]:
        """What the function answers."""
        return self.function(logits)


@final
@dataclass(frozen=True)
class LogitDifference(_OfLogits):
    """Mean logit of the targets, less the mean logit of the distractors; nothing is taken off if there are none.

    Attributes:
        targets: token ids.
        distractors: token ids.
        position: of the token whose next token is meant.
    """

    targets: tuple[int, ...]
    distractors: tuple[int, ...] = ()
    position: int = -1

    def of(self, logits: Float[Tensor, "token vocab"]) -> Float[Tensor, ""]:
        """The difference."""
        row = _row(logits, self.position, (*self.targets, *self.distractors))
        value = row[list(self.targets)].mean()
        return value - row[list(self.distractors)].mean() if self.distractors else value


@final
@dataclass(frozen=True)
class LogitMinusMean(_OfLogits):
    """Mean logit of the targets, less the mean logit of the whole vocabulary.

    Attributes:
        targets: token ids.
        position: of the token whose next token is meant.
    """

    targets: tuple[int, ...]
    position: int = -1

    def of(self, logits: Float[Tensor, "token vocab"]) -> Float[Tensor, ""]:
        """The difference."""
        row = _row(logits, self.position, self.targets)
        return row[list(self.targets)].mean() - row.mean()


@final
@dataclass(frozen=True)
class Probability(_OfLogits):
    """Probability that the next token is one of the targets, or its logarithm.

    Attributes:
        targets: token ids.
        position: of the token whose next token is meant.
        log: whether the logarithm is taken.
    """

    targets: tuple[int, ...]
    position: int = -1
    log: bool = False

    def of(self, logits: Float[Tensor, "token vocab"]) -> Float[Tensor, ""]:
        """The (logarithm of the) summed probability."""
        row = _row(logits, self.position, self.targets)
        log = row.log_softmax(-1)[list(self.targets)].logsumexp(-1)
        return log if self.log else log.exp()


def logit_difference(
    targets: int | Sequence[int], distractors: int | Sequence[int] = (), *, position: int = -1
) -> LogitDifference:
    """Mean logit of the targets less that of the distractors, at one position.

    Raises:
        UsageError: there is no target, or an id is not one.

    Example:
        >>> logit_difference(5, [7, 8])
        LogitDifference(targets=(5,), distractors=(7, 8), position=-1)
    """
    return LogitDifference(_ids(targets), _ids(distractors, some=False), position)


def logit_minus_mean(targets: int | Sequence[int], *, position: int = -1) -> LogitMinusMean:
    """Mean logit of the targets less that of the vocabulary, at one position; raises as `logit_difference`."""
    return LogitMinusMean(_ids(targets), position)


def probability(targets: int | Sequence[int], *, position: int = -1) -> Probability:
    """Probability of the targets together, at one position; raises as `logit_difference`."""
    return Probability(_ids(targets), position)


def log_probability(targets: int | Sequence[int], *, position: int = -1) -> Probability:
    """Logarithm of the probability of the targets together; raises as `logit_difference`."""
    return Probability(_ids(targets), position, log=True)


def as_metric(metric: Metric | LogitFunction) -> Metric:
    """A metric as it is, and any function of the logits as a metric.

    Raises:
        UsageError: it is neither.
    """
    if isinstance(metric, Metric):
        return metric
    if not callable(metric):
        raise UsageError(f"a metric is a Metric or a function of the logits (token, vocab), not {shown(metric)}")
    return LogitMetric(metric)


def _ids(tokens: int | Sequence[int], *, some: bool = True) -> tuple[int, ...]:
    ids = (tokens,) if isinstance(tokens, int) else tuple(tokens)
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids) or (some and not ids):
        raise UsageError(f"token ids are integers from 0, at least one; not {shown(tokens)}")
    return ids


def _row(logits: Tensor, position: int, ids: tuple[int, ...]) -> Tensor:
    length, vocabulary = logits.shape
    if not -length <= position < length:
        raise PositionError(f"the metric is at position {position}, but the prompt has {length} tokens")
    if max(ids) >= vocabulary:
        raise UsageError(f"token {max(ids)} is not in the vocabulary, which has {vocabulary}")
    return logits[position]
