"""`Worker`: computes shards of a harvest and commits them; a shard whose entry is there is done."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import featurizers
import numpy as np
import pyarrow as pa
import torch
from featurizers.errors import ArtefactError, UsageError, one_line
from featurizers.models import evaluating
from featurizers_evaluate import Batch, Reading, Row, padded, rows_of
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor, nn

from featurizers_harvest.folders import Folder
from featurizers_harvest.parts import Part, Parts
from featurizers_harvest.plan import Shard
from featurizers_harvest.sources import Source, encoded
from featurizers_harvest.tables import ordered, token_table, with_activations, with_features
from featurizers_harvest.targets import Target

WINDOW: Final = 2**14
"""Tokens that are held at once: rows of so many tokens are sorted by length, and become a row group."""
TOKENS: Final = "tokens"
"""Folder of the tokens themselves."""
DONE: Final = "done"
"""Folder of the entries, which are the manifest: a shard whose entry is there was committed."""


class Entry(BaseModel):
    """Entry of the manifest: a committed shard.

    Attributes:
        shard: its number.
        plan: checksum of the plan.
        document: number of its first document.
        documents: how many it has.
        tokens: how many were read.
        files: by folder, what is known of the shard's file there.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    shard: int
    plan: str
    document: int
    documents: int
    tokens: int
    files: dict[str, Part]


class Result(NamedTuple):
    """What a worker tells of a shard.

    Attributes:
        shard: its number.
        tokens: how many were read.
        documents: how many it has.
        seconds: that it took.
    """

    shard: int
    tokens: int
    documents: int
    seconds: float


def part_name(shard: int) -> str:
    """Return the name of the files of a shard, without its ending."""
    return f"part-{shard:06d}"


def read_entry(folder: Folder, shard: int) -> Entry | None:
    """Return the entry of a shard, None if it was not committed.

    Raises:
        ArtefactError: the entry is damaged.
    """
    name = f"{DONE}/{part_name(shard)}.json"
    raw = folder.read(name)
    if raw is None:
        return None
    try:
        return Entry.model_validate_json(raw)
    except ValidationError as error:
        raise ArtefactError(folder.where, f"{name} is no entry of a harvest ({one_line(error)}); delete it") from error


@dataclass(frozen=True)
class Work:
    """All that shards are computed from.

    Attributes:
        model: the model, as in `featurizers.intervene`.
        device: of its inputs.
        targets: what is harvested.
        source: the documents.
        reading: how they are cut into rows.
        batch_size: rows that run together.
        values: dtype of the values.
        plan: checksum of the plan.
        threads: of torch.
    """

    model: object
    device: torch.device
    targets: Sequence[Target]
    source: Source
    reading: Reading
    batch_size: int
    values: str
    plan: str
    threads: int


class Worker:
    """Computes shards by their numbers.

    Args:
        work: what they are computed from.
        folder: of the harvest.
        shards: of the plan.
    """

    def __init__(self, work: Work, folder: Folder, shards: Sequence[Shard]) -> None:
        self._work, self._folder, self._shards = work, folder, shards
        self._module = featurizers.Anatomy(work.model).model

    def __call__(self, number: int) -> Result:
        """Compute a shard and commit it: its files get their names, then its entry is written."""
        begin = time.perf_counter()
        name = part_name(number)
        with self.computed(number, self._folder) as parts:
            found = parts.finish()
            parts.put()
        entry = Entry(
            shard=number,
            plan=self._work.plan,
            document=self._shards[number].document,
            documents=self._shards[number].documents,
            tokens=found[TOKENS].rows,
            files=found,
        )
        self._folder.write(f"{DONE}/{name}.json", (json.dumps(entry.model_dump(), indent=1) + "\n").encode())
        return Result(number, entry.tokens, entry.documents, time.perf_counter() - begin)

    def check(self, number: int, scratch: Folder) -> list[str]:
        """Compute a shard once more, and return what differs from what is in the folder.

        Args:
            number: of the shard.
            scratch: folder for its temporaries.
        """
        entry = read_entry(self._folder, number)
        if entry is None:
            return [f"shard {number} is not committed"]
        with self.computed(number, scratch) as parts:
            found = parts.finish()
        wrong = []
        for folder, part in found.items():
            name, known = f"{folder}/{part_name(number)}.parquet", entry.files.get(folder)
            if known is None or known.rows_sha256 != part.rows_sha256:
                wrong.append(f"{name}: other rows are computed now")
            elif hashlib.sha256(self._folder.read(name) or b"").hexdigest() != known.sha256:
                wrong.append(f"{name}: the file is lost or has changed")
        return wrong

    @contextmanager
    def computed(self, number: int, folder: Folder) -> Iterator[Parts]:
        """Yield the files of a shard, which are computed, and put nowhere unless the caller does."""
        folders = [TOKENS, *(target.folder for target in self._work.targets)]
        with Parts(folder, {each: f"{each}/{part_name(number)}.parquet" for each in folders}) as parts:
            self.compute(number, parts.write)
            yield parts

    def compute(self, number: int, write: Callable[[Mapping[str, pa.Table]], None]) -> None:
        """Compute the rows of a shard, in the order of documents and positions, window by window."""
        work = self._work
        empty = True
        with _threads(work.threads), torch.no_grad(), evaluating(self._module):
            for window in self._windows(number):
                write(self._tables(window))
                empty = False
            if empty:  # the documents have no tokens: files without rows say so
                write({key: table.slice(0, 0) for key, table in self._tables([Row(0, 0, [0])]).items()})

    def _windows(self, number: int) -> Iterator[list[Row]]:
        window, size = [], 0
        for document, index in self._documents(number):
            for row in rows_of(document, index, self._work.reading):
                window.append(row)
                size += len(row.ids)
                if size >= WINDOW:
                    yield window
                    window, size = [], 0
        if window:
            yield window

    def _documents(self, number: int) -> Iterator[tuple[Any, int]]:
        """Yield the documents of a shard, and raise UsageError at its end if they are not those of the plan."""
        shard, digest = self._shards[number], hashlib.sha256()
        index = shard.document
        for _, document in _first(self._work.source.read(shard.document, shard.place), shard.documents):
            digest.update(encoded(document, index)[0])
            yield document, index
            index += 1
        if digest.hexdigest() != shard.sha256:
            last = shard.document + shard.documents - 1
            raise UsageError(f"the documents {shard.document} to {last} have changed since the harvest began")

    def _tables(self, window: Sequence[Row]) -> dict[str, pa.Table]:
        """Return the rows of each folder, computed in batches of rows of about one length."""
        work = self._work
        rows = sorted(window, key=lambda row: len(row.ids))
        sites = list(dict.fromkeys(site for target in work.targets for site in target.reads.values()))
        found: dict[str, list[pa.Table]] = {TOKENS: [], **{target.folder: [] for target in work.targets}}
        for start in range(0, len(rows), work.batch_size):
            some = rows[start : start + work.batch_size]
            batch = padded(some, work.reading, work.device)
            x = featurizers.collect(work.model, batch.inputs(), sites)
            keys = _Keys(some, batch)
            found[TOKENS].append(keys.table(batch.is_token.cpu()))
            for target in work.targets:
                kept = target.kept(batch)
                table, where = keys.table(kept), f"{target.name}, documents {some[0].document} and others"
                if target.is_sparse:
                    table = with_features(table, target.features(x, batch, kept), work.values, where)
                else:
                    table = with_activations(table, target.activations(x, kept), work.values, where)
                found[target.folder].append(table)
        return {folder: ordered(pa.concat_tables(tables)) for folder, tables in found.items()}


class _Keys:
    """Documents, positions and token ids of a batch."""

    def __init__(self, rows: Sequence[Row], batch: Batch) -> None:
        width = batch.ids.shape[1]
        self._documents = np.array([row.document for row in rows], np.int64)[:, None].repeat(width, 1)
        self._positions = np.array([row.start for row in rows], np.int32)[:, None] + np.arange(width, dtype=np.int32)
        self._ids = batch.ids.cpu().numpy().astype(np.int32)

    def table(self, kept: Tensor) -> pa.Table:
        """Return the columns of the tokens kept."""
        mask = kept.numpy()
        return token_table(self._documents[mask], self._positions[mask], self._ids[mask])


def _first(documents: Iterable[Any], count: int) -> Iterator[Any]:
    """Yield so many documents, and ask for no more: an iterable that is read on must not lose one."""
    iterator = iter(documents)
    for _ in range(count):
        try:
            yield next(iterator)
        except StopIteration:
            return


@contextmanager
def _threads(number: int) -> Iterator[None]:
    """Let torch use another number of threads, as the last bits of a sum depend on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def device_of(module: nn.Module) -> torch.device:
    """Return the device of a model's inputs."""
    parameter = next(module.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device
