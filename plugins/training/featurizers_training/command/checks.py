"""Checks of a search: can the model do the task, and does anything at the sites carry the answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from featurizers import Site
from torch import nn

from featurizers_training.evaluation import Accuracy, accuracy_alone
from featurizers_training.methods.searches import FullVector
from featurizers_training.pairs import Pairs
from featurizers_training.search.settings import Settings
from featurizers_training.search.training import train

LOW: Final = 0.5
"""An accuracy below this is warned of."""


@dataclass(frozen=True)
class Checks:
    """Accuracy of a model on pairs without a search.

    Attributes:
        part: name of the pairs, ``test`` or ``train``.
        sites: of the search.
        base: share of base prompts that the model answers with their ``base_label``; None if no pair has one.
        source: share of source prompts that it answers with the label; None if pairs have several sources.
        unchanged: share of base prompts that it answers with the label, without an interchange.
        ceiling: accuracy of interchanging the whole activations of the sites.
    """

    part: str
    sites: tuple[str, ...]
    base: Accuracy | None
    source: Accuracy | None
    unchanged: Accuracy
    ceiling: Accuracy

    @classmethod
    def of(cls, model: nn.Module, pairs: Pairs, part: str, sites: Sequence[Site], settings: Settings) -> Checks:
        """Measure a model on pairs."""
        size = settings.micro_batch or settings.batch_size
        known = [(pair.base, pair.base_label) for pair in pairs if pair.base_label is not None]
        single = [(pair.sources[0], pair.label) for pair in pairs if len(pair.sources) == 1]
        whole = train(model, pairs, list(sites), FullVector(), settings=replace(settings, patience=None))
        return cls(
            part,
            tuple(map(str, sites)),
            accuracy_alone(model, known, batch_size=size) if known else None,
            accuracy_alone(model, single, batch_size=size) if len(single) == len(pairs) else None,
            accuracy_alone(model, [(pair.base, pair.label) for pair in pairs], batch_size=size),
            whole.accuracy["train"],
        )

    def lines(self) -> list[str]:
        """Return the measurements as text."""
        alone = {
            "base prompts with their base_label": self.base,
            "source prompts with the label": self.source,
            "base prompts with the label": self.unchanged,
        }
        measured = [
            f"The model alone answers {name}: {value} ({self.part})"
            for name, value in alone.items()
            if value is not None
        ]
        return [*measured, f"Whole activations of {', '.join(self.sites)} interchanged: {self.ceiling} ({self.part})"]

    def warnings(self) -> list[str]:
        """Return what makes a search at these sites with these pairs doubtful."""
        found = []
        if self.base is not None and self.base.value < LOW:
            found.append(
                f"the model itself answers only {self.base.value:.0%} of the base prompts with their base_label; "
                "search with pairs that it answers"
            )
        if self.source is not None and self.source.value < LOW:
            found.append(
                f"the model itself answers only {self.source.value:.0%} of the source prompts with the label; search "
                "with pairs that it answers, unless the label is not the answer to the source"
            )
        if self.ceiling.value < LOW or self.ceiling.value <= self.unchanged.value:
            found.append(
                f"whole activations of {', '.join(self.sites)} give the label for only {self.ceiling.value:.0%} of the "
                f"pairs, and the model alone for {self.unchanged.value:.0%}; choose another site or position"
            )
        return found

    def record(self) -> dict[str, Any]:
        """Return the measurements as JSON data."""
        named = {"base": self.base, "source": self.source, "unchanged": self.unchanged, "ceiling": self.ceiling}
        return {"part": self.part, **{name: value and value.record() for name, value in named.items()}}
