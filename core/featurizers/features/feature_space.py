"""`FeatureSpace`: what a featurizer of one site and a map between sites have in common: a description, and saving."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Self, TypeVar, final

from pydantic import BaseModel
from torch import Tensor, nn

import featurizers
from featurizers.errors import UsageError
from featurizers.format.sites import Site

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

ConfigT = TypeVar("ConfigT", bound=BaseModel)


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

    def check(self) -> None:
        """Raise a `FeaturizerError` if the tensors lack a property that the kind promises.

        Called after loading. The default accepts all tensors.
        """

    # ------------------------------------------------------------------ artefacts
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
        """Copy the id, revision, metadata and feature sets of ``other``, and go to evaluation mode."""
        self.id, self.revision, self.metadata = other.id, other.revision, dict(other.metadata)
        self.feature_sets = dict(other.feature_sets)  # their numbers and masks refer to the whole, also in a slice
        return self.eval()
