"""`Found`: the result of a search, and how it becomes an artefact."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import featurizers
from featurizers import Featurizer, Site
from featurizers.errors import UsageError
from featurizers.models import SELECTED
from torch import nn

from featurizers_training.evaluation import Accuracy
from featurizers_training.methods.base import Method
from featurizers_training.pairs import Pairs


@dataclass(frozen=True)
class Found:
    """Result of a search.

    Attributes:
        method: of the search.
        featurizers: one for each site, with the features that were selected, in evaluation mode.
        sites: where they belong.
        pairs: of the search.
        model: of the search.
        accuracy: interchange-intervention accuracy on the pairs of the search (``train``) and of the validation.
        history: measurements of each epoch.
        settings: of the search.
    """

    method: Method
    featurizers: Sequence[Featurizer[Any]]
    sites: Sequence[Site]
    pairs: Pairs
    model: nn.Module
    accuracy: dict[str, Accuracy]
    history: list[dict[str, Any]]
    settings: dict[str, Any]

    @property
    def featurizer(self) -> Featurizer[Any]:
        """Featurizer of a search at one site.

        Raises:
            UsageError: the search had several sites.
        """
        if len(self.featurizers) != 1:
            raise UsageError(f"the search had {len(self.featurizers)} sites; take one of found.featurizers")
        return self.featurizers[0]

    @property
    def selected(self) -> list[int | None]:
        """Number of features interchanged at each site; None for all of a featurizer that does not know its number."""
        chosen = [featurizer.feature_sets.get(SELECTED) for featurizer in self.featurizers]
        return [f.n_features if c is None else len(c) for f, c in zip(self.featurizers, chosen, strict=True)]

    def measured(self, **accuracy: Accuracy) -> Found:
        """Return the same result with more accuracies, such as ``test``, which the artefact then has too."""
        return dataclasses.replace(self, accuracy={**self.accuracy, **accuracy}).labelled()

    def save(self, folder: str | Path) -> Path:
        """Write an artefact, or for several sites a collection with a subfolder for each; return its folder.

        Raises:
            ArtefactError: the folder holds something else.
        """
        if len(self.featurizers) == 1:
            return self.featurizer.save_pretrained(folder)
        return featurizers.save_collection(dict(zip(self._names(), self.featurizers, strict=True)), folder)

    def labelled(self) -> Found:
        """Write to each featurizer where it belongs and how it was found; return the same result."""
        config = getattr(self.model, "config", None)
        revision = getattr(config, "_commit_hash", None)
        name = getattr(config, "_name_or_path", None) or None
        for number, (featurizer, site) in enumerate(zip(self.featurizers, self.sites, strict=True)):
            featurizer.eval()
            featurizer.site = site.at(
                position=self.pairs.common_position(number),
                model=name and (name if revision else Path(name).name),
                model_revision=revision,
            )
            featurizer.id = f"{self.method.name} at {site}"
            featurizer.metadata = {
                **featurizer.metadata,
                "summary": self._summary(number),
                "training": {
                    "method": {"name": self.method.name, **dataclasses.asdict(self.method)},
                    "settings": self.settings,
                    "sites": [str(each) for each in self.sites],
                    "pairs": {"count": len(self.pairs), "sha256": self.pairs.digest()},
                    "selected": self.selected[number],
                    "accuracy": {name: measured.record() for name, measured in self.accuracy.items()},
                    "history": self.history,
                },
            }
        return self

    def _summary(self, number: int) -> dict[str, str]:
        """Return what the model card and ``featurizers info`` show of the search, for one of its sites."""
        rows = {
            "method": self.method.name,
            "selected features": "all" if self.selected[number] is None else str(self.selected[number]),
            "pairs of the search": str(len(self.pairs)),
        }
        if len(self.sites) > 1:
            rows["sites of the search"] = ", ".join(map(str, self.sites))
        if self.pairs.common_position(number) is None:
            rows["tokens"] = "of each pair"
        for name, measured in self.accuracy.items():
            rows[f"accuracy ({name})"] = f"{measured}, {measured.n} pairs, 95 % interval"
        return rows

    def _names(self) -> list[str]:
        names: list[str] = []
        for site in self.sites:
            name = re.sub(r"[^A-Za-z0-9._-]+", "-", str(site)).lstrip(".")
            names.append(name if name not in names else f"{name}-{len(names)}")
        return names
