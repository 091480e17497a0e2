"""`Subject`: a featurizer or a map as it is measured: what it reads, what it reconstructs, and how."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from featurizers import FeatureSpace, Featurizer, Site, SiteMap
from featurizers.errors import UsageError, shown
from featurizers.features import Active, without_autocast
from featurizers.models import site_of
from torch import Tensor


@dataclass(frozen=True)
class Limit:
    """Features that are kept of each token; the others are set to 0.

    Attributes:
        k: number of features of each group with the largest magnitudes; None for all.
        threshold: magnitude that a feature must exceed; None for any.
    """

    k: int | None = None
    threshold: float | None = None

    def __post_init__(self) -> None:
        """Raise UsageError for a number that is no limit."""
        if self.k is not None and (type(self.k) is not int or self.k < 1):
            raise UsageError(f"k is a number of features, at least 1, not {shown(self.k)}")
        if self.threshold is not None and not 0 <= self.threshold < float("inf"):
            raise UsageError(f"a threshold is a magnitude of at least 0, not {shown(self.threshold)}")

    def __str__(self) -> str:
        """Return the limit as text, such as ``k=8``."""
        parts = [f"k={self.k}"] if self.k is not None else []
        return ", ".join(parts + ([f"threshold={self.threshold:g}"] if self.threshold is not None else []))

    def of(self, features: Tensor) -> Tensor:
        """Return features with those set to 0 that are not kept."""
        size = features.abs()
        if self.threshold is not None:
            features = torch.where(size > self.threshold, features, 0)
        if self.k is not None and self.k < features.shape[-1]:
            top = size.topk(self.k, dim=-1).indices
            features = torch.zeros_like(features).scatter(-1, top, features.gather(-1, top))
        return features


@dataclass(frozen=True)
class StoredFeatures:
    """Features of some rows.

    Attributes:
        rows: of each, the features by group.
        groups: number of the features of each group.
        width: tokens of a row.
    """

    rows: Sequence[Sequence[Active]]
    groups: Sequence[int]
    width: int

    def dense(self, rows: slice, limit: Limit) -> Tensor:
        """Return ``(rows, width, n_features)`` of some rows, the groups side by side, with those that a limit keeps."""
        some = self.rows[rows]
        parts = []
        for group, n in enumerate(self.groups):
            x = torch.zeros(len(some), self.width, n)
            for number, row in enumerate(some):
                x[number, row[group].rows, row[group].columns] = row[group].values
            parts.append(limit.of(x))
        return torch.cat(parts, dim=-1)


@dataclass(frozen=True)
class Subject:
    """A featurizer of one site, or a map between sites, as it is measured.

    Attributes:
        space: the featurizer or the map.
        reads: sites by name whose activations it is given; ``site`` of a featurizer.
        writes: sites by name whose activations it reconstructs.
        limit: features that are kept.
    """

    space: Featurizer[Any] | SiteMap[Any]
    reads: Mapping[str, Site]
    writes: Mapping[str, Site]
    limit: Limit = Limit()

    @classmethod
    def of(cls, space: FeatureSpace[Any], site: Site | str | None, limit: Limit = Limit()) -> Subject:
        """Return a featurizer at its own site, or at another.

        Raises:
            UsageError: it does not know its sites, or a site is given for a map.
        """
        if isinstance(space, SiteMap):
            if site is not None:
                raise UsageError(f"{space.id!r} maps between sites: set its reads and writes, and give no site")
            if not space.reads or not space.writes:
                raise UsageError(f"{space.id!r} does not say where it belongs; set its reads and its writes")
            return cls(space, space.reads, space.writes, limit)
        if not isinstance(space, Featurizer):
            raise UsageError(f"evaluate takes a Featurizer or a SiteMap, not {type(space).__name__}")
        where = {"site": site_of(space) if site is None else Site.parse(site)}
        return cls(space, where, where, limit)

    @property
    def sites(self) -> tuple[Site, ...]:
        """All sites, each once."""
        return tuple(dict.fromkeys([*self.reads.values(), *self.writes.values()]))

    def reconstruct(self, x: Mapping[Site, Tensor], is_token: Tensor) -> tuple[Tensor, dict[Site, Tensor]]:
        """Return features ``(rows, width, n_features)`` and the reconstructions ``(rows, width, d)`` by site.

        Args:
            x: activations by site.
            is_token: ``(rows, width)``, False for padding.
        """
        device = next((t.device for t in (*self.space.parameters(), *self.space.buffers())), is_token.device)
        read = {name: x[site].to(device) for name, site in self.reads.items()}
        if isinstance(self.space, Featurizer):
            features, reconstruction = self._of_featurizer(self.space, read["site"])
            return features, {self.writes["site"]: reconstruction}
        return self._of_map(self.space, read, is_token.to(device))

    def _of_featurizer(self, f: Featurizer[Any], x: Tensor) -> tuple[Tensor, Tensor]:
        with without_autocast(x):
            if self.limit == Limit():
                return f.reconstruct(x)
            features, error = f.featurize(x)
            features = self.limit.of(features)
            return features, f.inverse_featurize(features, f.without_residual(error))

    def _of_map(self, f: SiteMap[Any], x: Mapping[str, Tensor], is_token: Tensor) -> tuple[Tensor, dict[Site, Tensor]]:
        whole = None if bool(is_token.all()) else is_token
        with without_autocast(next(iter(x.values()))):
            features = {
                group: self.limit.of(f.encode_sequences(group, x, whole) if f.encodes_sequences else f.encode(group, x))
                for group in f.groups
            }
            decoded = {site: f.decode(write, features, x) for write, site in self.writes.items()}
        return torch.cat(list(features.values()), dim=-1), decoded
