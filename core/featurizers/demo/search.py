"""The search: a subspace for each layer that carries a variable, beside three baselines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from featurizers_training import DAS, PCA, Found, FullVector, Method, Pairs, RandomSubspace, Settings, train
from featurizers_training.evaluation import accuracy_of
from torch import Tensor, nn

from featurizers.features.featurizer import Featurizer
from featurizers.format.sites import Site

METHODS = ("full vector", "subspace", "PCA", "random")


@dataclass(frozen=True)
class Task:
    """A model, a causal variable, and pairs of prompts that differ in it.

    Attributes:
        title: one line for people.
        model: frozen, in evaluation mode.
        train: pairs to find the subspace with.
        test: pairs that nothing was fitted to.
        sites: where to look, the first to the last.
        subspace: the method of the search, which says the number of dimensions.
        settings: of the search.
        notes: what was found out while the task was made.
        spell: writes token ids for people.
        planted: where the variable is known to be, and on which direction, if the model was made for it.
    """

    title: str
    model: nn.Module
    train: Pairs
    test: Pairs
    sites: list[Site]
    subspace: DAS
    settings: Settings
    notes: list[str]
    spell: Callable[[Tensor], str]
    planted: tuple[Site, Featurizer[Any]] | None = None


@dataclass(frozen=True)
class Row:
    """Interchange accuracy at one site, by method, and the subspace that was found there."""

    site: Site
    accuracy: dict[str, float]
    found: Found


def search(task: Task, tick: Callable[[], None]) -> list[Row]:
    """Search every site of a task; ``tick`` is called after each of its `METHODS`."""
    k = task.subspace.n_features
    methods: tuple[Method, ...] = FullVector(), task.subspace, PCA(n_features=k), RandomSubspace(n_features=k)
    runs, unseen = (task.settings.clean_runs(task.model, pairs, task.sites) for pairs in (task.train, task.test))
    rows = []
    for site in task.sites:
        found = {}
        for name, method in zip(METHODS, methods, strict=True):
            one = train(task.model, task.train, site, method, settings=task.settings, runs=runs)
            found[name] = one.measured(test=accuracy_of(unseen, one.featurizers))
            tick()
        accuracy = {name: one.accuracy["test"].value for name, one in found.items()}
        rows.append(Row(site, accuracy, found["subspace"]))
    return rows


@torch.no_grad()
def examples(task: Task, featurizer: Featurizer[Any], count: int = 3) -> list[str]:
    """What the model answers to some held-out base prompts, before and after the interchange."""
    attached, lines = featurizer.attach(task.model), []
    for pair in task.test[:count]:
        base, source = (torch.tensor([ids]) for ids in (pair.base, pair.sources[0]))
        before = task.model(input_ids=base).logits[0, -1].argmax()
        after = attached({"input_ids": base}, {"input_ids": source}).logits[0, -1].argmax()
        old, new = task.spell(before), task.spell(after)
        with_source = f"and {new!r} with the features of {task.spell(source[0])!r}"
        lines.append(f"{task.spell(base[0])!r} is answered {old!r}, {with_source}")
    return lines
