"""`Task`: a model, a causal variable in it, and pairs of prompts that differ in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from featurizers import Featurizer, Site
from torch import Tensor, nn

from featurizers_training.methods.searches import DAS
from featurizers_training.pairs import Pairs
from featurizers_training.search.settings import Settings


@dataclass(frozen=True)
class Task:
    """A model, a causal variable in it, and pairs of prompts that differ in it.

    Attributes:
        title: one line for people.
        model: frozen, in evaluation mode.
        train: pairs to find the subspace with.
        test: held-out pairs.
        sites: where to look, from the first to the last.
        subspace: method of the search, which has the number of dimensions.
        settings: of the search.
        notes: lines about the model and the prompts, for people.
        spell: writes token ids for people.
        planted: site and direction of the variable, if the model was trained to keep it there.
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
