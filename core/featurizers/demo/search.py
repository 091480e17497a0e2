"""The search: a subspace for each layer that carries a variable, beside three baselines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import featurizers
from featurizers.featurizer import Featurizer
from featurizers.operations import Interchange
from featurizers.sites import Site

METHODS = ("full vector", "subspace", "PCA", "random")
POSITIONS = [-1]


@dataclass(frozen=True)
class Pairs:
    """Counterfactual pairs: base prompts, source prompts, and the answers once the variable is the source's.

    Attributes:
        base: token ids ``(n, t)``.
        source: likewise.
        label: token ``(n,)`` that the model should answer after the interchange.
    """

    base: Tensor
    source: Tensor
    label: Tensor

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.label)

    def take(self, rows: Tensor) -> Pairs:
        """Some of the pairs."""
        return Pairs(self.base[rows], self.source[rows], self.label[rows])


@dataclass(frozen=True)
class Task:
    """A model, a causal variable, and pairs of prompts that differ in it.

    Attributes:
        title: one line for people.
        model: frozen, in evaluation mode.
        model_id: what to record of it in an artefact.
        model_revision: its commit, if it came from the Hub.
        train: pairs to find the subspace with.
        test: pairs that nothing was fitted to.
        sites: where to look, the first to the last.
        n_features: dimensions of the subspace.
        steps: of the optimizer.
        batch: pairs a step.
        lr: largest learning rate.
        notes: what was found out while the task was made.
        spell: writes token ids for people.
        planted: where the variable is known to be, and on which direction, if the model was made for it.
    """

    title: str
    model: nn.Module
    model_id: str | None
    model_revision: str | None
    train: Pairs
    test: Pairs
    sites: list[Site]
    n_features: int
    steps: int
    batch: int
    lr: float
    notes: list[str]
    spell: Callable[[Tensor], str]
    planted: tuple[Site, Featurizer[Any]] | None = None


@dataclass(frozen=True)
class Row:
    """Interchange accuracy at one site, by method, and the subspace that was found there."""

    site: Site
    accuracy: dict[str, float]
    found: Featurizer[Any]


def sweep(task: Task, seed: int, tick: Callable[[], None]) -> list[Row]:
    """Search every site of a task; ``tick`` is called after each step of work (`work` tells how many)."""
    sources = {kind: _sources(task.model, pairs, task.sites) for kind, pairs in _both(task)}
    rows = []
    for number, site in enumerate(task.sites):
        at_train, at_test = sources["train"][site], sources["test"][site]
        d_in, k = at_train.shape[-1], task.n_features
        found = fit_subspace(task, site, at_train, seed + number, tick)
        methods = {
            "full vector": featurizers.create("identity", d_in=d_in),
            "subspace": found,
            "PCA": type(found).fit_pca(at_train, k),  # type: ignore[attr-defined]  # the subspace plugin's own
            "random": featurizers.create("subspace", d_in=d_in, n_features=k, seed=seed + 1000),
        }
        accuracy = {}
        for name in METHODS:
            accuracy[name] = interchange_accuracy(task.model, task.test, site, methods[name], at_test)
            tick()
        rows.append(Row(site, accuracy, found))
    return rows


def work(task: Task) -> int:
    """Steps of work in a sweep."""
    return len(task.sites) * (task.steps + len(METHODS))


def fit_subspace(task: Task, site: Site, sources: Tensor, seed: int, tick: Callable[[], None]) -> Featurizer[Any]:
    """The subspace whose interchange gives the counterfactual answer (distributed alignment, arXiv:2303.02536)."""
    featurizer = featurizers.create("subspace", d_in=sources.shape[-1], n_features=task.n_features, seed=seed)
    optimizer = torch.optim.Adam(featurizer.parameters(), lr=task.lr)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=task.steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(task.steps):
        rows = torch.randint(len(task.train), (task.batch,), generator=generator)
        pairs = task.train.take(rows)
        logits = interchanged_logits(task.model, pairs, site, featurizer, sources[rows])
        optimizer.zero_grad()
        nn.functional.cross_entropy(logits, pairs.label).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        tick()
    return featurizer


@torch.no_grad()
def interchange_accuracy(
    model: nn.Module, pairs: Pairs, site: Site, featurizer: Featurizer[Any], sources: Tensor | None = None
) -> float:
    """Share of pairs that the model answers with the counterfactual answer after the interchange."""
    if sources is None:
        sources = _sources(model, pairs, [site])[site]
    hits = 0
    for rows in torch.split(torch.arange(len(pairs)), 64):
        chunk = pairs.take(rows)
        logits = interchanged_logits(model, chunk, site, featurizer, sources[rows])
        hits += int((logits.argmax(-1) == chunk.label).sum())
    return hits / len(pairs)


def interchanged_logits(
    model: nn.Module, pairs: Pairs, site: Site, featurizer: Featurizer[Any], sources: Tensor
) -> Tensor:
    """Next-token logits ``(n, vocabulary)`` of the base prompts with the source's features at a site."""
    swap = Interchange(featurizer, source=sources, positions=POSITIONS)
    with featurizers.intervene(model, {site: swap}):
        logits: Tensor = model(input_ids=pairs.base, use_cache=False).logits[:, -1]
    return logits


@torch.no_grad()
def examples(task: Task, site: Site, featurizer: Featurizer[Any], count: int = 3) -> list[str]:
    """What the model answers to some held-out base prompts, before and after the interchange."""
    pairs = task.test.take(torch.arange(min(count, len(task.test))))
    sources = _sources(task.model, pairs, [site])[site]
    before = task.model(input_ids=pairs.base, use_cache=False).logits[:, -1].argmax(-1)
    after = interchanged_logits(task.model, pairs, site, featurizer, sources).argmax(-1)
    return [
        f"{task.spell(base)!r} is answered {task.spell(old)!r}, and {task.spell(new)!r} with the features of "
        f"{task.spell(source)!r}"
        for base, source, old, new in zip(pairs.base, pairs.source, before, after, strict=True)
    ]


def _both(task: Task) -> list[tuple[str, Pairs]]:
    return [("train", task.train), ("test", task.test)]


def _sources(model: nn.Module, pairs: Pairs, sites: list[Site]) -> dict[Site, Tensor]:
    """Activations of the source prompts at the position of the interchange, ``(n, 1, d)`` for each site."""
    # a prompt is the source of many pairs, and is run once
    prompts, which = torch.unique(pairs.source, dim=0, return_inverse=True)
    parts = [
        featurizers.collect(model, {"input_ids": chunk}, sites, positions=POSITIONS)
        for chunk in torch.split(prompts, 64)
    ]
    return {site: torch.cat([part[site] for part in parts])[which] for site in sites}
