"""Interchange-intervention accuracy, with its confidence interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from featurizers import Featurizer
from featurizers.models import frozen, interchange, site_of
from torch import Tensor, nn

from featurizers_training.pairs import Pairs
from featurizers_training.runs import CleanRuns, Edit, Work

Z_95 = 1.959963984540054


@dataclass(frozen=True)
class Accuracy:
    """A share of pairs.

    Attributes:
        hits: pairs of which it is true.
        n: pairs.
    """

    hits: int
    n: int

    @property
    def value(self) -> float:
        """The share, 0 to 1."""
        return self.hits / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % confidence interval of Wilson 1927, "Probable inference, the law of succession"."""
        centre = self.hits + Z_95**2 / 2
        half = Z_95 * math.sqrt(self.hits * (self.n - self.hits) / self.n + Z_95**2 / 4)
        total = self.n + Z_95**2
        return max(0.0, (centre - half) / total), min(1.0, (centre + half) / total)

    def __str__(self) -> str:
        """As ``73.0 % (63.6 to 80.7)``."""
        low, high = self.interval
        return f"{self.value:.1%} ({low:.1%} to {high:.1%})"

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return {"accuracy": self.value, "interval_95": list(self.interval), "pairs": self.n}


@torch.no_grad()
def accuracy(runs: CleanRuns, work: Sequence[Work], *, batch_size: int = 64) -> Accuracy:
    """The share of pairs of which the model gives every token of the label, the most likely each time, after edits."""
    hits = 0
    for start in range(0, len(runs), batch_size):
        rows = range(start, min(start + batch_size, len(runs)))
        hits += int(right(runs.logits(rows, work), *runs.labels(rows)).sum())
    return Accuracy(hits, len(runs))


def right(logits: Tensor, label: Tensor, there: Tensor) -> Tensor:
    """Of which pairs the most likely tokens are those of the label: booleans ``(n,)``."""
    return ((logits.argmax(-1) == label) | ~there).all(-1)


def evaluate(
    model: nn.Module,
    pairs: Pairs,
    featurizers: Featurizer[Any] | Sequence[Featurizer[Any]],
    *,
    batch_size: int = 64,
) -> Accuracy:
    """Interchange-intervention accuracy of featurizers at their sites, each with the features it selects.

    Args:
        model: a decoder; it is run in evaluation mode.
        pairs: at whose positions the features are interchanged.
        featurizers: one or several, as `featurizers.load` gives them.
        batch_size: pairs a run.

    Raises:
        UsageError: a featurizer does not say where it belongs.
        SiteError: the model does not have its site.

    Example:
        >>> import featurizers, featurizers_training, torch
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=20))
        >>> pairs = featurizers_training.Pairs.of([{"base": [1, 2], "source": [3, 4], "label": 5}])
        >>> f = featurizers.create("identity", d_in=8)
        >>> f.site = featurizers.Site("resid.post", 1)
        >>> featurizers_training.evaluate(model, pairs, f).n
        1
    """
    wanted = [featurizers] if isinstance(featurizers, Featurizer) else list(featurizers)
    sites = [site_of(featurizer) for featurizer in wanted]
    with frozen(model):
        return accuracy_of(CleanRuns(model, pairs, sites, batch_size=batch_size), wanted, batch_size=batch_size)


def accuracy_of(runs: CleanRuns, featurizers: Sequence[Featurizer[Any]], *, batch_size: int = 64) -> Accuracy:
    """As `evaluate`, on clean runs that are there already."""
    numbers = runs.numbers([site_of(featurizer) for featurizer in featurizers])
    work = [Work(j, f, _fixed(f)) for j, f in zip(numbers, featurizers, strict=True)]
    return accuracy(runs, work, batch_size=batch_size)


def _fixed(featurizer: Featurizer[Any]) -> Edit:
    """The interchange of the features that a featurizer selects, as an edit."""

    def edit(base: Tensor, source: Tensor) -> Tensor:
        return interchange(featurizer, source).apply(base, source)

    return edit
