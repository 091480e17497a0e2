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
from featurizers_training.methods import Method
from featurizers_training.pairs import Pairs


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        method: that found it.
        featurizers: one for each site, with the features that were selected, in evaluation mode.
        sites: where they belong.
        pairs: that they were found with.
        model: that they were found in.
        accuracy: interchange-intervention accuracy on the pairs of the search (``train``) and of the validation.
        history: what was measured in each epoch.
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
        """The featurizer of a search at one site.

        Raises:
            UsageError: there were several.
        """
        if len(self.featurizers) != 1:
            raise UsageError(f"the search had {len(self.featurizers)} sites; take one of found.featurizers")
        return self.featurizers[0]

    @property
    def selected(self) -> list[int | None]:
        """How many features are interchanged at each site; None for all of a featurizer that does not say how many."""
        chosen = [featurizer.feature_sets.get(SELECTED) for featurizer in self.featurizers]
        return [f.n_features if c is None else len(c) for f, c in zip(self.featurizers, chosen, strict=True)]

    def measured(self, **accuracy: Accuracy) -> Found:
        """The same with more accuracies, such as that on the pairs of a test, which the artefact then tells too."""
        return dataclasses.replace(self, accuracy={**self.accuracy, **accuracy}).labelled()

    def save(self, folder: str | Path) -> Path:
        """Write an artefact, or a collection with a subfolder a site, and return its folder.

        Raises:
            ArtefactError: the folder holds something else.
        """
        if len(self.featurizers) == 1:
            return self.featurizer.save_pretrained(folder)
        return featurizers.save_collection(dict(zip(self._names(), self.featurizers, strict=True)), folder)

    def labelled(self) -> Found:
        """The same, after each featurizer was told where it belongs and how it was found."""
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

    def _names(self) -> list[str]:
        names: list[str] = []
        for site in self.sites:
            name = re.sub(r"[^A-Za-z0-9._-]+", "-", str(site)).lstrip(".")
            names.append(name if name not in names else f"{name}-{len(names)}")
        return names
