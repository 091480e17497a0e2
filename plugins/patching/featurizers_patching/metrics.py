"""Metrics: a number for each edited run, from its logits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Final, TypeAlias

import torch
from featurizers.errors import ShapeError, UsageError, did_you_mean, shown
from torch import Tensor, nn

from featurizers_patching.pairs import Pair, Tokens, answer_ids

Answer: TypeAlias = "None | str | int | Sequence[str | int | Sequence[int]]"
"""An answer, as text or token id, for all pairs; a list with one for each pair, which may also be several ids; None for
the records' own labels."""


@dataclass(frozen=True)
class Scored:
    """Logits of runs to be measured.

    Attributes:
        logits: ``(runs, n, k)`` at the tokens that are read: of the whole vocabulary, or of the tokens that all metrics
            read.
        clean: the same of each run's base without edits.
        pairs: number of each run's pair, ``(runs,)``.
        columns: tokens of the last axis, ascending; None for the whole vocabulary.
    """

    logits: Tensor
    clean: Tensor
    pairs: Tensor
    columns: Tensor | None

    def of(self, tokens: Tokens) -> Tensor:
        """Return the logits of one token for each pair, ``(runs, n)``, given the tokens of all pairs."""
        chosen = torch.tensor(tokens, device=self.logits.device)[self.pairs.to(self.logits.device)]
        index = chosen if self.columns is None else torch.searchsorted(self.columns, chosen)
        return self.logits.gather(-1, index.view(-1, 1, 1).expand(-1, self.logits.shape[1], 1)).squeeze(-1)


class Metric(ABC):
    """Measure of edited runs. Several tokens that are read give their mean."""

    name: ClassVar[str] = "metric"

    def bound(self, pairs: Sequence[Pair], tokenizer: Any) -> Metric:
        """Return the metric with the token ids of these pairs.

        Raises:
            UsageError: an answer is missing, or is not one token.
        """
        return self

    @property
    def reads(self) -> frozenset[int] | None:
        """Tokens whose logits a bound metric reads; None for the whole vocabulary."""
        return None

    @property
    def named(self) -> frozenset[int]:
        """Tokens that the answers of a bound metric are made of."""
        return self.reads or frozenset()

    @property
    def continuation(self) -> tuple[Tokens, ...] | None:
        """Tokens that have to follow each prompt so that a bound metric can be read; None if none have to."""
        return None

    @abstractmethod
    def __call__(self, scored: Scored) -> Tensor:
        """Return a number for each run, ``(runs,)``."""


@dataclass(frozen=True)
class LogitDifference(Metric):
    """Logit of the answer minus that of another token.

    Attributes:
        answer: None for the records' ``label``, the answer to the source.
        counter: None for their ``base_label``, the answer to the base.
    """

    name: ClassVar[str] = "logit_difference"
    answer: Answer = None
    counter: Answer = None

    def bound(self, pairs: Sequence[Pair], tokenizer: Any) -> LogitDifference:
        """Return the metric with token ids."""
        answer = _tokens(self.answer, pairs, tokenizer, "label")
        return replace(self, answer=answer, counter=_tokens(self.counter, pairs, tokenizer, "base_label"))

    @property
    def reads(self) -> frozenset[int]:
        """The two tokens of each pair."""
        return frozenset(_ids(self.answer)) | frozenset(_ids(self.counter))

    def __call__(self, scored: Scored) -> Tensor:
        """Return the mean difference."""
        return (scored.of(_ids(self.answer)) - scored.of(_ids(self.counter))).mean(-1)


@dataclass(frozen=True)
class LogProbability(Metric):
    """Log probability of the answer, in nats: of several tokens the sum, each after those before it.

    Attributes:
        answer: None for the records' ``label``.
    """

    name: ClassVar[str] = "log_probability"
    answer: Answer = None

    def bound(self, pairs: Sequence[Pair], tokenizer: Any) -> LogProbability:
        """Return the metric with token ids."""
        return replace(self, answer=_answers(self.answer, pairs, tokenizer, "label"))

    @property
    def named(self) -> frozenset[int]:
        """Tokens of all answers."""
        return frozenset(token for answer in _sequences(self.answer) for token in answer)

    @property
    def continuation(self) -> tuple[Tokens, ...] | None:
        """All tokens of each answer but the last, if one has several."""
        before = tuple(answer[:-1] for answer in _sequences(self.answer))
        return before if any(before) else None

    def __call__(self, scored: Scored) -> Tensor:
        """Return the log probability; the mean over tokens that are read for an answer of one token."""
        return self.log_probability(scored).mean(-1)

    def log_probability(self, scored: Scored) -> Tensor:
        """Return log probabilities of the answer, ``(runs, n)``; ``(runs, 1)`` for answers of several tokens."""
        tokens, counts = self._tokens(scored)
        found = scored.logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - scored.logits.logsumexp(-1)
        return found if self.continuation is None else (found * counts).sum(-1, keepdim=True)

    def _tokens(self, scored: Scored) -> tuple[Tensor, Tensor]:
        """Return the token of the answer at each token that is read, ``(runs, n)``, and whether it counts there."""
        n, device = scored.logits.shape[1], scored.logits.device
        answers = _sequences(self.answer)
        repeated = torch.tensor([[*answer, *[answer[-1]] * n][:n] for answer in answers], device=device)
        lengths = torch.tensor([n if self.continuation is None else len(answer) for answer in answers], device=device)
        pairs = scored.pairs.to(device)
        return repeated[pairs], torch.arange(n, device=device) < lengths[pairs].unsqueeze(-1)


class Probability(LogProbability):
    """Probability of the answer; of several tokens the product."""

    name: ClassVar[str] = "probability"

    def __call__(self, scored: Scored) -> Tensor:
        """Return the probability."""
        return self.log_probability(scored).exp().mean(-1)


class Loss(LogProbability):
    """Cross-entropy of the answer, in nats; of several tokens the sum."""

    name: ClassVar[str] = "loss"

    def __call__(self, scored: Scored) -> Tensor:
        """Return the loss."""
        return -self.log_probability(scored).mean(-1)


class Accuracy(LogProbability):
    """Accuracy: 1 if the answer is the most probable token, else 0; for several tokens, 1 if each of them is."""

    name: ClassVar[str] = "accuracy"

    def __call__(self, scored: Scored) -> Tensor:
        """Return the share of the tokens that are read at which it is; 1 or 0 for answers of several tokens."""
        tokens, counts = self._tokens(scored)
        right = scored.logits.argmax(-1) == tokens
        if self.continuation is not None:
            return (right | ~counts).all(-1).to(scored.logits.dtype)
        return right.to(scored.logits.dtype).mean(-1)


@dataclass(frozen=True)
class KL(Metric):
    """Kullback-Leibler divergence of the edited run's next token from the base's, in nats: how much changes at all."""

    name: ClassVar[str] = "kl"

    def __call__(self, scored: Scored) -> Tensor:
        """Return the mean divergence."""
        clean, edited = (x.log_softmax(-1) for x in (scored.clean, scored.logits))
        return nn.functional.kl_div(edited, clean, reduction="none", log_target=True).sum(-1).mean(-1)


@dataclass(frozen=True)
class Custom(Metric):
    """A function of the logits ``(runs, vocabulary)``, or ``(runs, n, vocabulary)`` where several tokens are read."""

    function: Callable[[Tensor], Tensor]

    def __call__(self, scored: Scored) -> Tensor:
        """Return what the function returns.

        Raises:
            ShapeError: that is no number for each run.
        """
        logits = scored.logits[:, 0] if scored.logits.shape[1] == 1 else scored.logits
        found = self.function(logits)
        if not isinstance(found, Tensor) or found.shape != (len(logits),):
            what = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ShapeError(f"a metric returns a number for each of {len(logits)} runs, a tensor (runs,), not {what}")
        return found


METRICS: Final[dict[str, type[Metric]]] = {
    metric.name: metric for metric in (LogitDifference, LogProbability, Probability, Loss, Accuracy, KL)
}


def metrics_of(metric: Any) -> dict[str, Metric]:
    """Return metrics by name.

    Args:
        metric: a name, a tuple of a name and its answers, a `Metric`, a function of logits, or a mapping of these.

    Raises:
        UsageError: it is none of these.
    """
    if isinstance(metric, Mapping):
        if not metric:
            raise UsageError("there are no metrics")
        return {str(name): _metric(each) for name, each in metric.items()}
    found = _metric(metric)
    function = getattr(found, "function", None)
    return {getattr(function, "__name__", found.name).strip("<>"): found}


def _metric(metric: Any) -> Metric:
    if isinstance(metric, Metric):
        return metric
    name, *answers = metric if isinstance(metric, tuple) and metric else (metric,)
    if isinstance(name, str):
        kind = METRICS.get(name.replace("-", "_"))
        if kind is None:
            raise UsageError(f"there is no metric {shown(name)}. {did_you_mean(name, METRICS)}")
        most = {"logit_difference": 2, "kl": 0}.get(kind.name, 1)
        if len(answers) > most:
            raise UsageError(f"the metric {kind.name!r} takes {most} answers, not {len(answers)}")
        return kind(*answers)
    if callable(metric):
        return Custom(metric)
    raise UsageError(
        f"a metric is a name such as 'logit_difference', a tuple such as ('logit_difference', ' Paris', ' Tokyo'), a "
        f"Metric, a function of logits, or a mapping of these, not {shown(metric)}"
    )


def _tokens(answer: Answer, pairs: Sequence[Pair], tokenizer: Any, key: str) -> Tokens:
    """Return the one token of an answer for each pair.

    Raises:
        UsageError: it is not known, or has several tokens.
    """
    found = _answers(answer, pairs, tokenizer, key)
    for number, ids in enumerate(found):
        if len(ids) != 1:
            raise UsageError(
                f"pair {number}: the answer {shown(ids)} has {len(ids)} tokens, and the metric reads one; give its "
                "first token, or take 'log_probability', which reads several"
            )
    return tuple(token for (token,) in found)


def _answers(answer: Answer, pairs: Sequence[Pair], tokenizer: Any, key: str) -> tuple[Tokens, ...]:
    """Return the tokens of the answer for each pair.

    Raises:
        UsageError: it is not known.
    """
    if answer is None:
        of_pairs: list[Any] = [getattr(pair, key) for pair in pairs]
        if None in of_pairs:
            raise UsageError(
                f"the metric needs an answer, and pair {of_pairs.index(None)} has no {key!r}; name it, as in "
                "('logit_difference', ' Paris', ' Tokyo')"
            )
    elif isinstance(answer, str | int):
        of_pairs = [answer] * len(pairs)
    else:
        of_pairs = list(answer)
        if len(of_pairs) != len(pairs):
            raise UsageError(f"there are {len(of_pairs)} answers and {len(pairs)} pairs; give one answer for each")
    return tuple(answer_ids(each, tokenizer, f"pair {n}: the answer") for n, each in enumerate(of_pairs))


def _ids(answer: Any) -> Tokens:
    """Return the token ids of a bound metric."""
    return answer  # type: ignore[no-any-return]


def _sequences(answer: Any) -> tuple[Tokens, ...]:
    """Return the tokens of each answer of a bound metric."""
    return answer  # type: ignore[no-any-return]
