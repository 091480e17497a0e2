"""Harvests in the place of a model: features and activations that were written down before are measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol, runtime_checkable

import torch
from featurizers import FeatureSpace, Site, SiteMap
from featurizers.errors import MissingDependencyError, UsageError, shown
from featurizers.features import Active
from featurizers.registry import host
from torch import Tensor

from featurizers_evaluate.documents import Batch, Reading, Row, padded
from featurizers_evaluate.runs import Clean
from featurizers_evaluate.subjects import StoredFeatures, Subject

NO_MODEL: Final = "it needs the model, and a harvest has none: give the model and the documents instead"


class HarvestedRow(NamedTuple):
    """Tokens that the model read at once, with what was harvested at them.

    Attributes:
        row: the tokens.
        features: by name, those that are not 0: tokens of the row, columns of the features, float32 values.
        activations: by name, ``(tokens, d)`` float32; 0 at tokens that were excluded.
    """

    row: Row
    features: Mapping[str, Active]
    activations: Mapping[str, Tensor]


@runtime_checkable
class Harvested(Protocol):
    """Harvest that can be measured, such as one of featurizers-harvest."""

    @property
    def about(self) -> Mapping[str, Any]:
        """``model``, ``model_revision`` and ``dtype`` of the model, and ``values``, the dtype of what was written."""
        ...

    @property
    def context(self) -> int:
        """Tokens of the longest row."""
        ...

    @property
    def excluded_tokens(self) -> Sequence[int]:
        """Token ids that have neither features nor activations."""
        ...

    def features_of(self, space: FeatureSpace[Any], reads: Mapping[str, Site]) -> Mapping[str | None, str]:
        """Return the names of the features of each group of a map, under None of a featurizer; empty if one is missing.

        Args:
            space: featurizer or map, whose kind, configuration and tensors are compared.
            reads: sites by name.
        """
        ...

    def activations_at(self, site: Site) -> str | None:
        """Return the name of the activations at a site; None if there are none."""
        ...

    def is_of(self, model: object) -> bool:
        """Return whether a model has the parameters of the one that was run."""
        ...

    def rows(self, features: Sequence[str], activations: Sequence[str]) -> Iterator[HarvestedRow]:
        """Yield all rows in the order of the documents, with what has these names."""
        ...


def harvest_of(given: Any) -> Harvested:
    """Return a harvest, or open the one in a folder.

    Raises:
        UsageError: it is neither.
        MissingDependencyError: featurizers-harvest is not installed.
        ArtefactError: there is no finished harvest in the folder.
    """
    if isinstance(given, str | Path):
        if "harvest" not in host().names():
            raise MissingDependencyError("a harvest", "featurizers-harvest", "pip install featurizers-harvest")
        given = host().module("harvest").open(given)
    if not isinstance(given, Harvested):
        raise UsageError(f"a harvest is a folder, or what featurizers_harvest.open returns, not {shown(given)}")
    return given


def check_of_model(harvest: Harvested, model: object) -> None:
    """Raise UsageError if a harvest is of another model."""
    if not harvest.is_of(model):
        raise UsageError(
            f"the harvest is of {shown(harvest.about.get('model'))}, and this model has other parameters or another "
            "dtype; give that model or none, or any_model=True if that is what you want"
        )


def check_named(space: FeatureSpace[Any], harvest: Harvested) -> None:
    """Raise UsageError if an artefact names another model of the Hub than that of a harvest."""
    found = harvest.about.get("model")
    for name in {site.model for site in space.sites.values() if site.model is not None}:
        if isinstance(found, str) and name != found and name.count("/") == found.count("/") == 1:
            raise UsageError(
                f"{space.id!r} was found in the model {shown(name)}, and the harvest is of {shown(found)}; measure it "
                "with any_model=True if that is what you want"
            )


class HarvestRuns:
    """Reads a harvest as `Runs` runs a model.

    Args:
        harvest: that is read.
        subjects: what is measured.

    Raises:
        UsageError: the harvest has neither the features of a subject nor the activations that they are computed from,
            or is of another model than the artefact names.
    """

    device: Final = torch.device("cpu")

    def __init__(self, harvest: Harvested, subjects: Sequence[Subject]) -> None:
        self._harvest = harvest
        self._features = {each.space: harvest.features_of(each.space, each.reads) for each in subjects}
        self._sites: dict[Site, str] = {}
        for each in subjects:
            names = {site: name for site in each.sites if (name := harvest.activations_at(site)) is not None}
            if len(names) == len(each.sites) and not self._is_cut(each.space):
                self._sites |= names
            elif not self._features[each.space]:
                missing = ", ".join(str(site) for site in each.sites if site not in names) or "the tokens left out"
                raise UsageError(
                    f"{harvest!r} has no features of {each.space.id!r}, with the same tensors and at the same sites, "
                    f"and no activations of {missing}; harvest one of the two"
                )

    def _is_cut(self, space: FeatureSpace[Any]) -> bool:
        """Return whether a map reads tokens that the harvest left out."""
        return isinstance(space, SiteMap) and space.encodes_sequences and bool(self._harvest.excluded_tokens)

    def has_activations(self, subject: Subject) -> bool:
        """Return whether there are the activations that a subject reads and reconstructs."""
        return all(site in self._sites for site in subject.sites)

    def why_not(self, subject: Subject) -> dict[str, str]:
        """Return the groups of metrics that cannot be measured, each with the reason."""
        found = {"effect": NO_MODEL, "fidelity": NO_MODEL}
        if not self.has_activations(subject):
            sites = ", ".join(str(site) for site in subject.sites if self._harvest.activations_at(site) is None)
            found["reconstruction"] = (
                f"it needs the activations at {sites}, which were not harvested: harvest the sites beside the features"
                if sites
                else "the map reads all tokens of a row, and the harvest left some out"
            )
        return found

    def read(
        self, tokens: Any, reading: Reading, batch_size: int, *, logits: bool = False, has: object = None
    ) -> Iterator[tuple[Batch, Clean]]:
        """Yield batches of rows with what was harvested; see `Runs.read`. The tokens are those of the harvest.

        Raises:
            UsageError: there is no token.
        """
        features = [name for names in self._features.values() for name in names.values()]
        found = self._harvest.rows(list(dict.fromkeys(features)), list(dict.fromkeys(self._sites.values())))
        group: list[HarvestedRow] = []
        left, is_empty = reading.max_tokens, True
        for each in found:
            row = each.row if left is None else each.row._replace(ids=each.row.ids[:left])
            left = None if left is None else left - len(row.ids)
            group.append(each._replace(row=row))
            is_empty = False
            if len(group) == batch_size or left == 0:
                yield self._batch(group, reading)
                group = []
            if left == 0:
                break
        if group:
            yield self._batch(group, reading)
        if is_empty:
            raise UsageError("the harvest has no tokens to measure on")

    def _batch(self, rows: Sequence[HarvestedRow], reading: Reading) -> tuple[Batch, Clean]:
        batch = padded([each.row for each in rows], reading, self.device)
        width = batch.ids.shape[1]
        activations = {}
        for site, name in self._sites.items():
            x = torch.zeros(len(rows), width, rows[0].activations[name].shape[-1])
            for number, each in enumerate(rows):
                x[number, : len(each.row.ids)] = each.activations[name][: len(each.row.ids)]
            activations[site] = x
        stored: dict[FeatureSpace[Any], StoredFeatures] = {
            space: _stored(space, names, rows, width) for space, names in self._features.items() if names
        }
        return batch, Clean(activations, None, stored=stored)


def _stored(
    space: FeatureSpace[Any], names: Mapping[str | None, str], rows: Sequence[HarvestedRow], width: int
) -> StoredFeatures:
    numbers = {group: torch.tensor(each.numbers) for group, each in space.numbering().items()}
    of_rows = [
        [_in_columns(each.features[names[group]], numbers[group], len(each.row.ids)) for group in numbers]
        for each in rows
    ]
    return StoredFeatures(of_rows, [len(each) for each in numbers.values()], width)


def _in_columns(active: Active, numbers: Tensor, tokens: int) -> Active:
    """Return the features of the first tokens by column; a slice has other columns than the numbers in the whole."""
    kept = active.rows < tokens
    order = numbers.argsort()
    columns = order[torch.searchsorted(numbers[order], active.columns[kept])]
    return Active(active.rows[kept], columns, active.values[kept])
