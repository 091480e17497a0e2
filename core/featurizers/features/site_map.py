"""`SiteMap`: features that are read at some sites of a model and written at others, as those of a transcoder."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, final

import torch
from jaxtyping import Float
from torch import Tensor

from featurizers.errors import ShapeError, SiteError, UsageError, shown
from featurizers.features.active import Active, nonzero
from featurizers.features.feature_space import ConfigT, FeatureSpace, Numbering
from featurizers.features.indices import Indices, Selection, select
from featurizers.features.precision import without_autocast
from featurizers.format.sites import Site


@dataclass(frozen=True)
class Group:
    """Features of a `SiteMap` that are encoded together.

    Attributes:
        reads: names of the reads that they are encoded from.
        n_features: number of features.
    """

    reads: tuple[str, ...]
    n_features: int


class Edit(NamedTuple):
    """Features of one group before and after an edit.

    Attributes:
        features: ``(*batch, k)``, as encoded.
        edited: ``(*batch, k)``, new values; the same tensor if nothing changes.
        columns: numbers of the features within their group, int64 ``(k,)``; None for all.
    """

    features: Tensor
    edited: Tensor
    columns: Tensor | None


class SiteMap(FeatureSpace[ConfigT]):
    """Map from the activations at some sites of a model, its reads, to those at others, its writes.

    Transcoders, cross-layer transcoders and crosscoders are such maps. Features come in groups g. A group is encoded
    from the reads r that it names, and some writes w have a decoder for it. With x the activations at the reads and y
    those at the writes of one token,

        z_g = encode(g, x)        ŷ_w = decode(w, z, x)        y_w = ŷ_w + e_w

    Laws, which `featurizers.testing.SiteMapContract` checks for every kind:

    - The error lives at the write: ``e_w = y_w - ŷ_w``, and an edit of features keeps it.
    - An edit from z to z' gives ``y'_w = y_w + decode(w, z', x) - decode(w, z, x)``; what does not depend on the
      features, such as a bias or a skip connection, cancels. An edit that changes no feature gives ``y_w`` back, equal
      in every element in fp32, fp16 and bf16.
    - Features have the dtype of the map's own tensors; writes keep the dtype of the activations.
    - Inputs are never changed in place or detached; gradients reach the features, the parameters and the inputs.

    An autoencoder of one site is the case in which the only read is the only write.

    Args:
        config: configuration of the kind.
        groups: groups by name, in the order in which the model computes their reads.
        reads: width of the activations at each read, by its name.
        writes: width of the activations at each write, by its name.
        decoders: pairs of a group and a write that it is decoded to; None for all pairs.

    The attributes are those of `FeatureSpace`, and:

    Attributes:
        groups: by name.
        read_widths: as given.
        write_widths: as given.
        decoders: as given.
        encodes_sequences: True if the features of a token depend on earlier tokens, so that a read is encoded whole.
    """

    encodes_sequences: ClassVar[bool] = False

    def __init__(
        self,
        config: ConfigT,
        *,
        groups: Mapping[str, Group],
        reads: Mapping[str, int],
        writes: Mapping[str, int],
        decoders: Iterable[tuple[str, str]] | None = None,
    ) -> None:
        super().__init__(config)
        self.groups: dict[str, Group] = dict(groups)
        self.read_widths: dict[str, int] = dict(reads)
        self.write_widths: dict[str, int] = dict(writes)
        pairs = ((group, write) for group in groups for write in writes)
        self.decoders: frozenset[tuple[str, str]] = frozenset(pairs if decoders is None else decoders)
        self.n_features: int = sum(group.n_features for group in self.groups.values())
        self._reads: dict[str, Site] = {}
        self._writes: dict[str, Site] = {}

    # ------------------------------------------------------------------ where it belongs
    @property
    def reads(self) -> Mapping[str, Site]:
        """Site of each read by its name; strings such as ``mlp.in:3`` may be assigned. Empty if they are not known."""
        return self._reads

    @reads.setter
    def reads(self, sites: Mapping[str, Site | str]) -> None:
        self._reads = self._checked_sites(sites, self.read_widths, "reads")

    @property
    def writes(self) -> Mapping[str, Site]:
        """Site of each write by its name; as `reads`."""
        return self._writes

    @writes.setter
    def writes(self, sites: Mapping[str, Site | str]) -> None:
        self._writes = self._checked_sites(sites, self.write_widths, "writes")

    @property
    def sites(self) -> Mapping[str, Site]:
        """Sites of reads and writes; a name that is both has one site or is given as the write's."""
        return {**self._reads, **self._writes}

    @property
    def sites_text(self) -> str | None:
        """Reads and writes in short; of many, the first and the last."""
        if not self._reads or not self._writes:
            return None
        return f"{_in_short(self._reads)} -> {_in_short(self._writes)}"

    def numbering(self) -> Mapping[str | None, Numbering]:
        """See `FeatureSpace.numbering`. Kinds whose features are numbered otherwise override it."""
        return {name: Numbering(range(group.n_features), group.n_features) for name, group in self.groups.items()}

    def _checked_sites(self, sites: Mapping[str, Site | str], widths: Mapping[str, int], what: str) -> dict[str, Site]:
        if not isinstance(sites, Mapping) or (sites and sites.keys() != widths.keys()):
            raise SiteError(
                f"the {what} of {self.id!r} are {', '.join(map(repr, widths))}; give a site for each by its name, "
                f"not {shown(sites)}"
            )
        return {name: Site.parse(sites[name]) for name in widths if sites}

    # ------------------------------------------------------------------ what a kind implements
    @abstractmethod
    def encode(
        self, group: str, x: Mapping[str, Float[Tensor, "*batch d_read"]], columns: Tensor | None = None
    ) -> Float[Tensor, "*batch k"]:
        """Return the features of a group: all, or those in ``columns``.

        Args:
            group: name of the group.
            x: activations at each of its reads, by name; others may be there too.
            columns: numbers of features within the group, int64 ``(k,)``.
        """

    @abstractmethod
    def decode(
        self, write: str, features: Mapping[str, Tensor], x: Mapping[str, Tensor]
    ) -> Float[Tensor, "*batch d_write"]:
        """Return the reconstruction at a write, biases and skip connections included.

        Args:
            write: name of the write.
            features: all features of each group that is decoded to it.
            x: activations at the reads.
        """

    @abstractmethod
    def decode_change(
        self, write: str, group: str, change: Float[Tensor, "*batch k"], columns: Tensor | None = None
    ) -> Float[Tensor, "*batch d_write"]:
        """Return the change of `decode` for a change of all features of a group, or of those in ``columns``."""

    def encode_sequences(
        self, group: str, x: Mapping[str, Tensor], is_token: Tensor | None, columns: Tensor | None = None
    ) -> Float[Tensor, "batch sequence k"]:
        """Return features of whole sequences; a kind with ``encodes_sequences`` implements it in place of `encode`.

        Args:
            group: name of the group.
            x: activations at each of its reads, ``(batch, sequence, width)``, from the first token on.
            is_token: ``(batch, sequence)``, False for padding; None if nothing is padded.
            columns: as in `encode`.
        """
        return self.encode(group, x, columns)

    def encode_active(self, group: str, x: Mapping[str, Float[Tensor, "*batch d_read"]]) -> Active:
        """Return the features of a group that are not 0 in flat form, the tokens numbered in their order.

        Raises:
            UsageError: the features of a token depend on earlier ones: see `encode_sequences`.
        """
        if self.encodes_sequences:
            raise UsageError(f"{self.id!r} encodes whole sequences: take the nonzero features of encode_sequences")
        features = self.encode(group, x)
        return nonzero(features.reshape(-1, features.shape[-1]))

    def skip_change(
        self, write: str, change: Mapping[str, Float[Tensor, "*batch d_read"]]
    ) -> Float[Tensor, "*batch d_write"] | None:
        """Return the change of `decode` for a change of the reads with the features held; None without a skip."""
        return None

    def apply_edit(
        self, write: str, base: Float[Tensor, "*batch d_write"], edits: Mapping[str, Edit]
    ) -> Float[Tensor, "*batch d_write"]:
        """Return ``base`` with the decoded differences of features added, in the dtype of ``base``.

        Args:
            write: name of the write.
            base: activations at it.
            edits: by group; groups that are not decoded to this write are passed over.
        """
        change: Tensor | None = None
        for group, edit in edits.items():
            if edit.edited is edit.features or (group, write) not in self.decoders:
                continue
            part = self.decode_change(write, group, edit.edited - edit.features, edit.columns)
            change = part if change is None else change + part
        return base if change is None else (base + change).to(base.dtype)

    def select(self, group: str, indices: Indices, x: Tensor) -> Selection:
        """Check ``indices`` against the features of a group. Kinds whose features are numbered otherwise override it.

        Raises:
            FeatureIndexError: an index is out of range, repeated, or not an integer.
        """
        return select(indices, self.groups[group].n_features, x.device)

    @classmethod
    def sliced(
        cls, config: ConfigT, columns: Mapping[str, Tensor]
    ) -> tuple[ConfigT, dict[str, Tensor], dict[str, Tensor]]:
        """See `FeatureSpace.rows_of_slice`. Kinds whose features are rows of their tensors override it."""
        raise UsageError(f"a map of kind {cls.kind!r} is loaded whole; give the indices to the operation instead")

    # ------------------------------------------------------------------ the map, final
    @final
    def featurize(
        self, x: Mapping[str, Tensor], y: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the features of each group and the error at each write.

        Args:
            x: activations at every read, ``(*batch, width)``, by name.
            y: activations at every write, by name.

        Raises:
            ShapeError: activations are missing or have another width.
        """
        self.check_widths(x, self.read_widths, "read")
        self.check_widths(y, self.write_widths, "write")
        with without_autocast(next(iter(x.values()))):
            features = {group: self.encode(group, x) for group in self.groups}
            return features, {write: y[write] - self.decode(write, features, x) for write in self.write_widths}

    @final
    def inverse_featurize(
        self, features: Mapping[str, Tensor], error: Mapping[str, Tensor], x: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return the activations at the writes that have these features and this error, by name."""
        with without_autocast(next(iter(x.values()))):
            return {write: self.decode(write, features, x) + error[write] for write in self.write_widths}

    @final
    def by_group(self, indices: Indices | Mapping[str, Indices]) -> dict[str, Indices]:
        """Return the indices of each group that an operation names.

        Args:
            indices: a mapping from groups to indices; None for all features of all groups; of a map with one group,
                indices in any form.

        Raises:
            UsageError: a group is not known, or plain indices are given to a map with several groups.
        """
        if isinstance(indices, Mapping):
            if unknown := [name for name in indices if name not in self.groups]:
                raise UsageError(f"{self.id!r} has no group {shown(unknown[0])}; its groups are {self._group_names()}")
            return {group: indices[group] for group in self.groups if group in indices}
        if indices is None:
            return dict.fromkeys(self.groups)
        if len(self.groups) > 1:
            raise UsageError(
                f"{self.id!r} has the groups {self._group_names()}; give indices by group, such as "
                f"{{{next(iter(self.groups))!r}: [0, 1]}}"
            )
        return dict.fromkeys(self.groups, indices)

    @final
    def checked_columns(self, indices: Any) -> dict[str, Tensor]:
        """See `FeatureSpace.checked_columns`."""
        chosen: dict[str, Tensor] = {}
        by_group = self.by_group(indices)
        if not by_group:
            raise UsageError("the indices name no group: give the features to load by group, or no indices for all")
        # raises for a kind that cannot load some of its features, whatever the indices are
        some = [group for group, own in by_group.items() if own is not None]
        self.sliced(self.config, dict.fromkeys(some, torch.zeros(1, dtype=torch.long)))
        for group, own in by_group.items():
            n = self.groups[group].n_features
            columns = torch.arange(n) if own is None else select(own, n).as_columns()
            if columns is None or not columns.numel():
                raise UsageError(f"give the features to load of the group {group!r} as a list of numbers")
            chosen[group] = columns
        return chosen

    @classmethod
    @final
    def rows_of_slice(cls, config: ConfigT, columns: Any) -> tuple[ConfigT, dict[str, Tensor], dict[str, Tensor]]:
        """See `FeatureSpace.rows_of_slice`."""
        return cls.sliced(config, columns)

    @final
    def check_widths(self, activations: Mapping[str, Tensor], widths: Mapping[str, int], what: str) -> None:
        """Raise ShapeError unless there are floating-point activations of each name with its width."""
        for name, width in widths.items():
            x = activations.get(name)
            if x is None or not x.dim() or x.shape[-1] != width or not x.is_floating_point():
                given = "nothing" if x is None else f"{x.dtype} of shape {tuple(x.shape)}"
                raise ShapeError(f"{self.id!r} ({self.kind}): the {what} {name!r} takes width {width}, got {given}")

    def _group_names(self) -> str:
        names = list(map(repr, self.groups))
        return ", ".join(names if len(names) < 9 else [*names[:7], "…", names[-1]])

    def extra_repr(self) -> str:
        """Return the text that ``print`` shows after the class name."""
        return f"id={self.id!r}, {self.sites_text or 'no sites'}, groups={len(self.groups)}, features={self.n_features}"


def _in_short(sites: Mapping[str, Site]) -> str:
    first, *others = map(str, sites.values())
    return f"{first} … {others[-1]}" if others else first
