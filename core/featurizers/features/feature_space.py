"""`FeatureSpace`: what a featurizer of one site and a map between sites have in common: a description, and saving."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, NamedTuple, Self, TypeVar, final

from pydantic import BaseModel
from torch import Tensor, nn

import featurizers
from featurizers.errors import FeatureIndexError, UsageError, shown
from featurizers.format.html import html_table
from featurizers.format.labels import Label, Labels
from featurizers.format.pieces import Stored
from featurizers.format.reference import Reference
from featurizers.format.sites import Site

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

ConfigT = TypeVar("ConfigT", bound=BaseModel)


class Numbering(NamedTuple):
    """Numbers of the features of a group.

    Attributes:
        numbers: number of each feature, in the order of the columns; of a slice, its numbers in the whole.
        whole: number of features of the whole.
    """

    numbers: Sequence[int]
    whole: int


class FeatureSpace(nn.Module, ABC, Generic[ConfigT]):
    """Base of `Featurizer`, which reads and writes one site, and of `SiteMap`, which reads some and writes others.

    A kind derives from one of these two.

    Attributes:
        kind: registered name, stored in artefacts.
        Config: pydantic model of the kind's configuration; strict, unknown keys forbidden.
        config: the configuration this feature space was built from.
        n_features: number of features; None if it is the width of the activations.
        id: human-readable name; the kind unless set.
        revision: commit that it was loaded from, if any.
        feature_sets: named indices (int64) or masks (any other dtype) that belong to it; saved with it. ``selected``
            are the features that a search found, which `attach` interchanges.
        labels: what people or programs say that features mean; saved with it.
        origin: repository of the Hub and commit that it was loaded from, if any; see `featurizers.save_reference`.
        edits: operations through it, at its site, that belong to it; saved with it, and carried out by `attach`.
        metadata: anything that JSON can hold; saved with it.
        special_tokens: ids of tokens whose activations `featurizers.intervene` does not change.
    """

    kind: ClassVar[str]
    Config: ClassVar[type[BaseModel]]

    config: ConfigT
    n_features: int | None

    def __init__(self, config: ConfigT) -> None:
        super().__init__()
        self.config = config
        self.id: str = self.kind
        self.revision: str | None = None
        self.feature_sets: dict[str, Tensor] = {}
        self.metadata: dict[str, Any] = {}
        self.special_tokens: tuple[int, ...] = ()
        self.origin: Reference | None = None
        self.edits: list[Any] = []
        self._labels: Labels | None = None

    @property
    @abstractmethod
    def sites(self) -> Mapping[str, Site]:
        """Sites that it reads or writes, by name; empty if it does not know where it belongs."""

    @property
    @abstractmethod
    def sites_text(self) -> str | None:
        """Sites in a form for people, such as ``mlp.in:3 -> mlp.out:3``; None if they are not known."""

    @classmethod
    @abstractmethod
    def rows_of_slice(cls, config: ConfigT, columns: Any) -> tuple[ConfigT, dict[str, Tensor], dict[str, Tensor]]:
        """Describe how to load some features alone.

        Args:
            config: of the whole.
            columns: numbers of the features, int64 ``(k,)``; of a map with several groups, such numbers by group.

        Returns:
            The config of the slice, the rows to read of each tensor that is not read whole, and the extra tensors that
            the slice has.

        Raises:
            UsageError: the kind can only be loaded whole.
        """

    @abstractmethod
    def checked_columns(self, indices: Any) -> Any:
        """Check ``indices`` against the features, and return them in the form that `rows_of_slice` takes.

        Raises:
            FeatureIndexError: an index is out of range.
            UsageError: they are not a list of numbers, the same for every example.
        """

    @abstractmethod
    def numbering(self) -> Mapping[str | None, Numbering]:
        """Return the numbers of the features of each group; of a featurizer of one site, those under None."""

    def _repr_html_(self) -> str:
        """Return a small table of what it is and where it belongs, which notebooks show."""
        config = {name: value for name, value in self.config.model_dump(mode="json").items() if value is not None}
        models = ", ".join(dict.fromkeys(site.model for site in self.sites.values() if site.model))
        rows = {
            "id": None if self.id == self.kind else self.id,
            "config": json.dumps(config),
            "features": self.n_features,
            "site": self.sites_text,
            "model": models or None,
            "feature sets": ", ".join(self.feature_sets) or None,
            "labels": self.labels and len(self.labels),
            "revision": self.revision,
        }
        return html_table(f"{type(self).__name__} ({self.kind})", rows)

    @property
    def labels(self) -> Labels | None:
        """What is said of the features, saved with them; None if nothing is.

        A sequence of `Label` may be assigned. A slice keeps the labels of its own features.

        Raises:
            UsageError: a label is of a group that is not there, or one is repeated.
            FeatureIndexError: a label is of a feature that is not there.
        """
        return self._labels

    @labels.setter
    def labels(self, labels: Labels | Iterable[Label] | None) -> None:
        if labels is not None:
            labels = self._of_features(labels if isinstance(labels, Labels) else Labels(labels))
        self._labels = labels

    def _of_features(self, labels: Labels) -> Labels:
        """Check labels, and return those of the features that are here."""
        groups = self.numbering()
        if None not in groups and len(groups) == 1:  # then the group goes without saying
            (only,) = groups
            labels = Labels(replace(label, group=only) if label.group is None else label for label in labels)
        for group, feature in labels.features:
            if group not in groups:
                what = "a label is of no group" if group is None else f"a label is of the group {shown(group)}"
                names = ", ".join(map(shown, list(groups)[:8])) + (", …" if len(groups) > 8 else "")
                allowed = "whose features have no groups" if None in groups else f"whose groups are {names}"
                raise UsageError(f"{what}, of feature {feature} of {self.id!r}, {allowed}")
            if feature >= (whole := groups[group].whole):
                where = "" if group is None else f" in the group {shown(group)}"
                raise FeatureIndexError(
                    f"a label is of feature {feature}{where}, and {self.id!r} has {whole}, which are numbered from 0"
                )
        return labels.only({group: _lookup(own) for group, own in groups.items()})

    def check(self) -> None:
        """Raise a `FeaturizerError` if the tensors lack a property that the kind promises.

        Called after loading. The default accepts all tensors.
        """

    # ------------------------------------------------------------------ artefacts
    def stored_tensors(self) -> Mapping[str, Stored]:
        """Return what `featurizers.save` writes: the state dict. One that no process holds whole overrides it."""
        return self.state_dict()

    @contextmanager
    def saving(self) -> Iterator[bool]:
        """Enclose a save; yield True if this process writes. One that no process holds whole overrides it."""
        yield True

    @final
    def attach(self, model: object, *, any_model: bool = False) -> featurizers.Attached:
        """Attach this feature space to its sites in a model, ready to intervene with; see `featurizers.attach`."""
        return featurizers.attach(model, self, any_model=any_model)

    @final
    def save_pretrained(
        self, folder: str | Path, *, model: object | None = None, metrics: object | None = None
    ) -> Path:
        """Write an artefact and return its folder; see `featurizers.save`."""
        return featurizers.save(self, folder, model=model, metrics=metrics)

    @classmethod
    @final
    def from_pretrained(cls, source: str | Path, **options: Any) -> Self:
        """Load a feature space of this class; see `featurizers.load` for the options.

        Raises:
            UsageError: the source holds another kind.
        """
        loaded = featurizers.load(source, **options)
        if not isinstance(loaded, cls):
            raise UsageError(f"{source!s} holds a featurizer of kind {loaded.kind!r}, not a {cls.__name__}")
        return loaded

    @final
    def push_to_hub(self, repo_id: str, **options: Any) -> CommitInfo:
        """Save this feature space to a repository in one commit; see `featurizers.push` for the options."""
        return featurizers.push_featurizer(self, repo_id, **options)

    # ------------------------------------------------------------------ helpers
    @final
    def described_as(self, other: FeatureSpace[Any]) -> Self:
        """Copy the id, revision, metadata, feature sets and labels of ``other``, and go to evaluation mode."""
        self.id, self.revision, self.metadata = other.id, other.revision, dict(other.metadata)
        self.feature_sets = dict(other.feature_sets)  # their numbers and masks refer to the whole, also in a slice
        self.labels = other.labels
        return self.eval()


def _lookup(own: Numbering) -> Container[int]:
    """Return numbers in a form in which one is found fast."""
    return own.numbers if isinstance(own.numbers, range) else frozenset(own.numbers)
