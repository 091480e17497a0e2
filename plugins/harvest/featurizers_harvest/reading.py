"""`Harvest`: a finished harvest that is read: tables, batches for trainers, densities, contexts of a feature."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from featurizers import Anatomy, FeatureSpace, Site
from featurizers.errors import ArtefactError, UsageError, did_you_mean, shown
from featurizers_evaluate import HarvestedRow
from torch import Tensor

from featurizers_harvest.folders import Folder, folder_of
from featurizers_harvest.plan import Plan
from featurizers_harvest.prepared import finished, known_plan
from featurizers_harvest.rows import rows_of_shard
from featurizers_harvest.shards import TOKENS, Entry, part_name
from featurizers_harvest.targets import checksum_of, checksum_of_model

BUFFER: Final = 2**16
"""Activations among which `Harvest.batches` shuffles, at least."""


class Harvest:
    """A harvest in a folder; what `featurizers_harvest.open` returns.

    Attributes:
        folder: where it is.
        plan: what its rows depend on.
        entries: of the committed shards, by number.
    """

    def __init__(self, folder: Folder, plan: Plan, entries: dict[int, Entry]) -> None:
        self.folder, self.plan, self.entries = folder, plan, entries

    def __repr__(self) -> str:
        """Say what there is."""
        return (
            f"Harvest({self.folder.where!r}, names={self.names}, shards={len(self.entries)} of {self.n_shards}, "
            f"tokens={self.n_tokens})"
        )

    @property
    def names(self) -> list[str]:
        """Names under which something was harvested."""
        return list(self.plan.features)

    @property
    def n_shards(self) -> int:
        """Number of shards of the plan."""
        return int(self.plan.data["shards"])

    @property
    def n_tokens(self) -> int:
        """Number of tokens that were read."""
        return sum(entry.tokens for entry in self.entries.values())

    @property
    def is_complete(self) -> bool:
        """Whether all shards are committed."""
        return len(self.entries) == self.n_shards

    def n_features(self, name: str) -> int | None:
        """Return the number of features of a featurizer; None if it is the width of the activations."""
        self._check(name, sparse=True)
        found = self.plan.features[name]["n_features"]
        return None if found is None else int(found)

    def files(self, name: str | None = None) -> list[str]:
        """Return the names of the files in their order: of the tokens, or of what has a name."""
        where = TOKENS if name is None else f"site={self._known(name)}"
        return [f"{where}/{part_name(number)}.parquet" for number in sorted(self.entries)]

    def file_of(self, document: int) -> str:
        """Return the name of the file with the tokens of a document.

        Raises:
            UsageError: the harvest has no such document.
        """
        for number, entry in self.entries.items():
            if entry.document <= document < entry.document + entry.documents:
                return f"{TOKENS}/{part_name(number)}.parquet"
        raise UsageError(f"there is no document {shown(document)} in {self.folder.where}")

    def dataset(self, name: str | None = None) -> Any:
        """Return a `pyarrow.dataset.Dataset` of the rows of a name, or of all tokens; nothing is read yet."""
        return self.folder.dataset(self.files(name))

    def table(self, name: str | None = None, **options: Any) -> Any:
        """Return all rows as a `pyarrow.Table`; ``columns`` and ``filter`` as in ``Dataset.to_table``."""
        return self.dataset(name).to_table(**options)

    def batches(
        self, name: str, batch_size: int, *, seed: int | None = 0, epochs: int = 1, buffer: int = BUFFER
    ) -> Iterator[Tensor]:
        """Yield activations in batches for a trainer, shuffled.

        Shards come in another order each epoch, and rows are drawn from a buffer, so that memory is bounded: about the
        buffer and one window of a shard. The same seed gives the same batches. The last batch of an epoch may be
        smaller.

        Args:
            name: of a site that was harvested.
            batch_size: number of activations.
            seed: of the order; None to keep that of the documents.
            epochs: how many times all activations come.
            buffer: activations among which a batch is drawn.

        Yields:
            ``(batch_size, d)``, float32.

        Raises:
            UsageError: there are features under this name, or a number is invalid.
        """
        self._check(name, sparse=False)
        for what, number in (("batch_size", batch_size), ("epochs", epochs), ("buffer", buffer)):
            if type(number) is not int or number < 1:
                raise UsageError(f"{what} is a whole number of at least 1, not {shown(number)}")
        return self._batches(name, batch_size, seed, epochs, buffer)

    def _batches(self, name: str, size: int, seed: int | None, epochs: int, buffer: int) -> Iterator[Tensor]:
        for epoch in range(epochs):
            generator = None if seed is None else np.random.default_rng([seed, epoch])
            held: list[Any] = []
            n = 0
            for rows in self._row_groups(name, generator):
                held.append(rows)
                n += len(rows)
                if n >= buffer + size:
                    pool = _shuffled(np.concatenate(held), generator)
                    whole = (n - buffer) // size * size if generator is not None else n // size * size
                    yield from map(_batch, np.split(pool[:whole], whole // size))
                    held, n = [pool[whole:]], n - whole
            if n:
                pool = _shuffled(np.concatenate(held), generator)
                yield from (_batch(pool[start : start + size]) for start in range(0, n, size))

    def _row_groups(self, name: str, generator: np.random.Generator | None) -> Iterator[Any]:
        files = self.files(name)
        order = range(len(files)) if generator is None else generator.permutation(len(files))
        for number in order:
            dataset = self.folder.dataset([files[number]])
            for batch in dataset.to_batches(columns=["activation"], batch_readahead=1, fragment_readahead=1):
                column = batch.column(0)
                if len(column):
                    yield column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1).astype(np.float32)

    def densities(self, name: str) -> Tensor:
        """Return the share of the tokens at which each feature is not 0, ``(n_features,)``, float64."""
        counts, tokens = np.zeros(self.n_features(name) or 0, np.int64), 0
        for batch in self.dataset(name).to_batches(columns=["indices"]):
            indices = batch.column(0).flatten().to_numpy()
            if len(indices) and indices.max() >= len(counts):
                counts = np.concatenate([counts, np.zeros(int(indices.max()) + 1 - len(counts), np.int64)])
            counts += np.bincount(indices, minlength=len(counts))
            tokens += len(batch)
        return torch.from_numpy(counts).double() / max(tokens, 1)

    @property
    def about(self) -> dict[str, Any]:
        """Names for people: the model, its revision and dtype, and the dtype of the values."""
        own = {name: self.plan.about.get(name) for name in ("model", "model_revision")}
        return {**own, "dtype": self.plan.model.get("dtype"), "values": self.plan.rows["values"]}

    @property
    def context(self) -> int:
        """Tokens of the longest row that the model read."""
        return int(self.plan.rows["context"])

    @property
    def excluded_tokens(self) -> list[int]:
        """Token ids that have neither features nor activations."""
        return list(self.plan.rows["excluded_tokens"])

    def features_of(self, space: FeatureSpace[Any], reads: Mapping[str, Site]) -> dict[str | None, str]:
        """Return the names of the features of each group of a map, under None of a featurizer; empty if one is missing.

        Args:
            space: featurizer or map; its kind, configuration and tensors are those of the harvested one.
            reads: sites by name at which it reads, likewise.
        """
        checksum, sites = checksum_of(space), {name: str(site) for name, site in reads.items()}
        found = {
            each["group"]: name
            for name, each in self.plan.features.items()
            if each.get("checksum") == checksum and all(sites.get(k) == site for k, site in each["sites"].items())
        }
        return found if all(group in found for group in space.numbering()) else {}

    def activations_at(self, site: Site) -> str | None:
        """Return the name of the activations at a site; None if there are none."""
        wanted = {"site": str(site)}
        own = (name for name, each in self.plan.features.items() if each["kind"] == "activations")
        return next((name for name in own if self.plan.features[name]["sites"] == wanted), None)

    def is_of(self, model: object) -> bool:
        """Return whether a model has the parameters of the one that was run, in the same dtype."""
        return checksum_of_model(Anatomy(model)) == self.plan.model.get("checksum")

    def rows(self, features: Sequence[str] = (), activations: Sequence[str] = ()) -> Iterator[HarvestedRow]:
        """Yield rows of tokens as the model read them, in the order of the documents, with what was harvested at them.

        Args:
            features: names of features.
            activations: names of activations.

        Raises:
            UsageError: nothing was harvested under such a name.
            ArtefactError: the files do not fit each other.
        """
        for name in (*features, *activations):
            self._check(name, sparse=name in features)
        for number in sorted(self.entries):
            part = f"{part_name(number)}.parquet"
            of_features, of_activations = (
                {
                    name: (
                        f"site={name}/{part}",
                        [*self.excluded_tokens, *self.plan.features[name].get("special_tokens", [])],
                    )
                    for name in names
                }
                for names in (features, activations)
            )
            yield from rows_of_shard(self.folder, f"{TOKENS}/{part}", self.context, of_features, of_activations)

    def _known(self, name: str) -> str:
        if name not in self.plan.features:
            raise UsageError(f"nothing was harvested as {shown(name)}. {did_you_mean(name, self.names)}")
        return name

    def _check(self, name: str, *, sparse: bool) -> None:
        is_sparse = self.plan.features[self._known(name)]["kind"] != "activations"
        if sparse and not is_sparse:
            raise UsageError(f"{name!r} has activations and no features; name one that was harvested with a featurizer")
        if is_sparse and not sparse:
            raise UsageError(
                f"{name!r} has features; activations are harvested by naming the site, {{'name': 'resid.post:8'}}"
            )


def _shuffled(rows: Any, generator: np.random.Generator | None) -> Any:
    return rows if generator is None else rows[generator.permutation(len(rows))]


def _batch(rows: Any) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(rows))


def open(folder: str | Path, *, partial: bool = False) -> Harvest:
    """Open a harvest to read it.

    Args:
        folder: as in `featurizers_harvest.harvest`.
        partial: accept a harvest that is not finished, and read the shards that are.

    Raises:
        ArtefactError: there is no harvest, it is damaged, or shards are missing.
    """
    found = folder_of(folder)
    plan = None if found.read("plan.json") is None else known_plan(found)
    if plan is None:
        raise ArtefactError(found.where, "there is no harvest here")
    entries = finished(found, plan.sha256, [TOKENS, *(f"site={name}" for name in plan.features)])
    harvest = Harvest(found, plan, entries)
    if not harvest.is_complete and not partial:
        missing = harvest.n_shards - len(entries)
        raise ArtefactError(
            found.where,
            f"{missing} of {harvest.n_shards} shards are missing; run the harvest again to compute them, or open what "
            "is there with partial=True",
        )
    return harvest
