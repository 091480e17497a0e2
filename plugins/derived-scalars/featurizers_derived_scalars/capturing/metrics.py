"""`Metric`: the scalar whose gradient a capture takes, and common metrics of the logits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias, final

import torch
from featurizers.errors import PositionError, UsageError, shown
from jaxtyping import Float
from torch import Tensor

from featurizers_derived_scalars.capturing.activations import RawActivations
from featurizers_derived_scalars.circuit import Need, Place

LogitFunction: TypeAlias = "Callable[[Float[Tensor, 'token vocab']], Float[Tensor, '']]"
TokenIds: TypeAlias = "int | Sequence[int]"
"""A token id, or several."""


class Metric(ABC):
    """A scalar of one sequence.

    `capture` runs the model as far as the metric's needs, calls the metric with the activations and their graph, and
    takes the gradient of the result. A traced node is a metric that needs a residual stream and calls
    `RawActivations.recompute`.
    """

    @property
    @abstractmethod
    def needs(self) -> frozenset[Need]:
        """Activations that it reads, forward only."""

    @property
    def logit_position(self) -> int | None:
        """Position of the only token whose logits are read; None if those of several may be.

        Where it is a number, and nobody else needs the logits, ``raw`` has the logits of this token alone,
        ``(1, vocab)``: the head is applied to one token.
        """
        return None

    @abstractmethod
    def __call__(self, raw: RawActivations) -> Float[Tensor, ""]:
        """Return the scalar, differentiable in the tensors of ``raw``."""


class _OfLogits(Metric):
    """A metric that reads only the logits."""

    @property
    @final
    def needs(self) -> frozenset[Need]:
        """Need for the logits."""
        return frozenset({Need("logits")})

    def __call__(self, raw: RawActivations) -> Float[Tensor, ""]:
        """Return the scalar of the logits, in float32 or better."""
        return self.of(_logits(raw))

    @abstractmethod
    def of(self, logits: Float[Tensor, "token vocab"]) -> Float[Tensor, ""]:
        """Return the scalar of one sequence's logits."""


class _AtPosition(_OfLogits):
    """A metric of the logits of one token."""

    position: int

    @property
    @final
    def logit_position(self) -> int:
        """Position of the metric."""
        return self.position

    @final
    def __call__(self, raw: RawActivations) -> Float[Tensor, ""]:
        """Return the scalar of the position's logits, which may be all that there are."""
        logits = _logits(raw)
        return self.of(logits) if len(logits) == len(raw.tokens) else self._of_row(logits[0])

    @final
    def of(self, logits: Float[Tensor, "token vocab"]) -> Float[Tensor, ""]:
        """Return the scalar of the logits at the metric's position."""
        check_position(self.position, len(logits))
        return self._of_row(logits[self.position])

    @abstractmethod
    def _of_row(self, row: Float[Tensor, " vocab"]) -> Float[Tensor, ""]:
        """Return the scalar of the position's logits."""


@final
@dataclass(frozen=True)
class LogitMetric(_OfLogits):
    """A function of the logits as a metric.

    Attributes:
        function: from logits, ``(token, vocab)``, to a scalar.
    """

    function: LogitFunction

    def of(self, logits: Float[Tensor, "token vocab"]) -> Float[Tensor, ""]:
        """Call the function."""
        return self.function(logits)


@final
@dataclass(frozen=True)
class LogitDifference(_AtPosition):
    """Mean logit of the targets, minus the mean logit of the distractors if there are any.

    Attributes:
        targets: token ids, kept as a tuple.
        distractors: token ids, likewise.
        position: position whose next token is predicted.

    Raises:
        UsageError: there is no target, or an id is not an integer from 0.

    Examples:
        >>> LogitDifference(5, [7, 8])
        LogitDifference(targets=(5,), distractors=(7, 8), position=-1)
    """

    targets: TokenIds
    distractors: TokenIds = ()
    position: int = field(default=-1, kw_only=True)

    def __post_init__(self) -> None:
        """Check the ids."""
        _keep_ids(self, "targets")
        _keep_ids(self, "distractors", at_least=0)

    def _of_row(self, row: Tensor) -> Tensor:
        value = _entries(row, self.targets).mean()
        return value - _entries(row, self.distractors).mean() if self.distractors else value


@final
@dataclass(frozen=True)
class LogitMinusMean(_AtPosition):
    """Mean logit of the targets, minus the mean logit of the whole vocabulary; arguments as in `LogitDifference`."""

    targets: TokenIds
    position: int = field(default=-1, kw_only=True)

    def __post_init__(self) -> None:
        """Check the ids."""
        _keep_ids(self, "targets")

    def _of_row(self, row: Tensor) -> Tensor:
        return _entries(row, self.targets).mean() - row.mean()


@final
@dataclass(frozen=True)
class Probability(_AtPosition):
    """Probability that the next token is among the targets, or its logarithm; arguments as in `LogitDifference`.

    Attributes:
        log: take the logarithm.
    """

    targets: TokenIds
    position: int = field(default=-1, kw_only=True)
    log: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        """Check the ids."""
        _keep_ids(self, "targets")

    def _of_row(self, row: Tensor) -> Tensor:
        log = _entries(row.log_softmax(-1), self.targets).logsumexp(-1)
        return log if self.log else log.exp()


logit_difference = LogitDifference
logit_minus_mean = LogitMinusMean
probability = Probability


def log_probability(targets: TokenIds, *, position: int = -1) -> Probability:
    """Return the metric of the logarithm of the targets' summed probability; see `Probability`."""
    return Probability(targets, position=position, log=True)


def as_metric(metric: Metric | LogitFunction) -> Metric:
    """Return a metric unchanged, and a function of the logits as a metric.

    Raises:
        UsageError: it is neither.
    """
    if isinstance(metric, Metric):
        return metric
    if not callable(metric):
        raise UsageError(f"a metric is a Metric or a function of the logits (token, vocab), not {shown(metric)}")
    return LogitMetric(metric)


def ids_of(tokens: TokenIds) -> tuple[int, ...]:
    """Return token ids as a tuple."""
    return (tokens,) if isinstance(tokens, int) else tuple(tokens)


def _keep_ids(metric: _OfLogits, name: str, *, at_least: int = 1) -> None:
    """Replace an attribute of token ids by a tuple, and check them."""
    ids = ids_of(getattr(metric, name))
    if len(ids) < at_least or not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        raise UsageError(f"{name} are token ids, integers from 0, at least {at_least}; not {shown(ids)}")
    object.__setattr__(metric, name, ids)


def check_position(position: int, length: int) -> None:
    """Check that a prompt has the position of a metric.

    Raises:
        PositionError: it has fewer tokens.
    """
    if not -length <= position < length:
        raise PositionError(f"the metric is at position {position}, but the prompt has {length} tokens")


def _logits(raw: RawActivations) -> Tensor:
    """Return the logits in float32 or better."""
    logits = raw[Place("logits"), "forward"]
    return logits if logits.dtype == torch.float64 else logits.float()


def _entries(row: Tensor, tokens: TokenIds) -> Tensor:
    ids = list(ids_of(tokens))
    if max(ids) >= len(row):
        raise UsageError(f"token {max(ids)} is not in the vocabulary, which has {len(row)}")
    return row[ids]
