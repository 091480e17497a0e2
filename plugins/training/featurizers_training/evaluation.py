"""Interchange-intervention accuracy, with its confidence interval."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from featurizers import Featurizer
from featurizers.errors import UsageError
from featurizers.models import frozen, interchange, site_of
from torch import Tensor, nn

from featurizers_training.pairs import Pairs
from featurizers_training.records import Tokens
from featurizers_training.runs.activations import padded
from featurizers_training.runs.clean_runs import CleanRuns, Edit, SiteEdit
from featurizers_training.statistics import Estimate, clustered_mean, wilson


@dataclass(frozen=True)
class Accuracy:
    """Share of pairs that are answered correctly.

    Attributes:
        hits: number of pairs answered correctly.
        n: number of pairs.
        right: for each pair whether it is answered correctly, in their order; empty if that is not known.
    """

    hits: int
    n: int
    right: tuple[bool, ...] = field(default=(), repr=False, compare=False)

    @classmethod
    def of(cls, right: Tensor) -> Accuracy:
        """Return the share of pairs that are answered correctly, given booleans ``(n,)``."""
        outcomes = tuple(right.tolist())
        return cls(sum(outcomes), len(outcomes), outcomes)

    @property
    def value(self) -> float:
        """Share, 0 to 1."""
        return self.hits / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """95 % confidence interval of Wilson 1927, "Probable inference", for independent pairs."""
        return wilson(self.hits, self.n)

    def clustered(self, clusters: Sequence[Hashable]) -> Estimate:
        """Return the share with an interval for pairs that share something, such as a word; see `clustered_mean`.

        Args:
            clusters: what each pair shares with others, such as `Pairs.clusters` returns.

        Raises:
            UsageError: it is not known which pairs are answered correctly, or all pairs are in one cluster.
            ShapeError: there is not one cluster for each pair.
        """
        if not self.right:
            raise UsageError("this accuracy has numbers alone; take the one that evaluate or accuracy returned")
        return clustered_mean(self.right, clusters)

    def __str__(self) -> str:
        """Return the share and its interval as text, such as ``73.0% (63.6% to 80.7%)``."""
        low, high = self.interval
        return f"{self.value:.1%} ({low:.1%} to {high:.1%})"

    def record(self) -> dict[str, Any]:
        """Return the share, its interval and the number of pairs as JSON data."""
        return {"accuracy": self.value, "interval_95": list(self.interval), "pairs": self.n}


def evaluate(
    model: nn.Module,
    pairs: Pairs,
    featurizers: Featurizer[Any] | Sequence[Featurizer[Any]],
    *,
    batch_size: int = 64,
) -> Accuracy:
    """Measure the interchange-intervention accuracy of featurizers at their sites, with the features that each selects.

    Args:
        model: a decoder; it is run in evaluation mode.
        pairs: prompts, positions and labels.
        featurizers: one or several, as `featurizers.load` returns them.
        batch_size: pairs in a run.

    Raises:
        UsageError: a featurizer does not say where it belongs.
        SiteError: the model does not have its site.

    Examples:
        >>> import featurizers, featurizers_training, torch
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=20))
        >>> pairs = featurizers_training.Pairs.of([{"base": [1, 2], "source": [3, 4], "label": 5}])
        >>> f = featurizers.create("identity", d_in=8)
        >>> f.site = featurizers.Site("resid.post", 1)
        >>> featurizers_training.evaluate(model, pairs, f).n
        1
    """
    several = [featurizers] if isinstance(featurizers, Featurizer) else list(featurizers)
    sites = [site_of(featurizer) for featurizer in several]
    with frozen(model):
        return accuracy_of(CleanRuns(model, pairs, sites, batch_size=batch_size), several, batch_size=batch_size)


def accuracy_of(runs: CleanRuns, featurizers: Sequence[Featurizer[Any]], *, batch_size: int = 64) -> Accuracy:
    """Measure the same as `evaluate`, given clean runs."""
    numbers = runs.numbers([site_of(featurizer) for featurizer in featurizers])
    edits = [SiteEdit(j, f, interchanged(f)) for j, f in zip(numbers, featurizers, strict=True)]
    return accuracy(runs, edits, batch_size=batch_size)


@torch.no_grad()
def accuracy(runs: CleanRuns, edits: Sequence[SiteEdit], *, batch_size: int = 64) -> Accuracy:
    """Measure the share of pairs for which every token of the label is the model's most likely one after edits."""
    right = []
    for start in range(0, len(runs), batch_size):
        rows = range(start, min(start + batch_size, len(runs)))
        right.append(answered(runs.logits(rows, edits), *runs.labels(rows)))
    return Accuracy.of(torch.cat(right))


@torch.no_grad()
def accuracy_alone(model: nn.Module, prompts: Sequence[tuple[Tokens, Tokens]], *, batch_size: int = 64) -> Accuracy:
    """Measure the share of prompts that a model answers with their label, given prompts with labels."""
    device, hits = next(model.parameters()).device, 0
    with frozen(model):
        for start in range(0, len(prompts), batch_size):
            part = prompts[start : start + batch_size]
            ids, mask = padded([(*prompt, *label[:-1]) for prompt, label in part], device)
            best = model(input_ids=ids, attention_mask=mask.long()).logits.argmax(-1)
            for row, (prompt, label) in zip(best.tolist(), part, strict=True):
                hits += row[len(prompt) - 1 :][: len(label)] == list(label)
    return Accuracy(hits, len(prompts))


def answered(logits: Tensor, label: Tensor, is_token: Tensor) -> Tensor:
    """Return for each pair whether the most likely tokens are those of its label: booleans ``(n,)``."""
    return is_right(logits.argmax(-1), label, is_token)


def is_right(answers: Tensor, label: Tensor, is_token: Tensor) -> Tensor:
    """Return for each pair whether some tokens ``(n, n_label)`` are those of its label: booleans ``(n,)``."""
    return ((answers == label) | ~is_token).all(-1)


def interchanged(featurizer: Featurizer[Any]) -> Edit:
    """Return the edit that takes from the source the features which a featurizer selects."""

    def edit(base: Tensor, source: Tensor) -> Tensor:
        return interchange(featurizer, source).apply(base, source)

    return edit
