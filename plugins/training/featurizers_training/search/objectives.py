"""Loss functions that a search minimises."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from featurizers.errors import UsageError, did_you_mean
from torch import Tensor, nn


@dataclass(frozen=True)
class Answers:
    """Answers that an objective compares logits with.

    Attributes:
        label: tokens ``(n, n_label)`` that the model should answer.
        there: mask of the same shape, true for tokens and false for padding.
        base_labels: returns the tokens and the mask of the answers without an intervention.
    """

    label: Tensor
    there: Tensor
    base_labels: Callable[[], tuple[Tensor, Tensor]]


Objective: TypeAlias = Callable[[Tensor, Answers], Tensor]
"""Maps logits ``(n, n_label, vocabulary)`` and answers to a loss for each pair, ``(n,)``."""


def cross_entropy(logits: Tensor, answers: Answers) -> Tensor:
    """Return the mean negative log probability of the label's tokens, in nats: ``(n,)``."""
    losses = nn.functional.cross_entropy(logits.flatten(0, 1).float(), answers.label.flatten(), reduction="none")
    losses = losses.reshape(answers.label.shape) * answers.there
    return losses.sum(-1) / answers.there.sum(-1)


def logit_difference(logits: Tensor, answers: Answers) -> Tensor:
    """Return the logit of the base's own answer minus that of the label, of the first token of each: ``(n,)``.

    Raises:
        UsageError: a pair has no ``base_label``.
    """
    base_label, _ = answers.base_labels()
    first = logits[:, 0].float()
    of_label, of_base = (first.gather(-1, tokens[:, :1]).squeeze(-1) for tokens in (answers.label, base_label))
    return of_base - of_label


OBJECTIVES: dict[str, Objective] = {"cross-entropy": cross_entropy, "logit-difference": logit_difference}
"""The objectives that have a name."""


def named_objective(objective: str | Objective) -> tuple[str, Objective]:
    """Return an objective and its name, given either.

    Raises:
        UsageError: there is no objective of this name.
    """
    if not isinstance(objective, str):
        return getattr(objective, "__name__", type(objective).__name__), objective
    if objective not in OBJECTIVES:
        near = did_you_mean(objective, OBJECTIVES, " ").strip()
        raise UsageError(f"the objective is one of {', '.join(OBJECTIVES)} or a function, not {objective!r}. {near}")
    return objective, OBJECTIVES[objective]
