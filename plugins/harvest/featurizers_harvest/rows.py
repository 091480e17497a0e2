"""Rows of a harvest as the model read them, each with its features and its activations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from featurizers.errors import ArtefactError
from featurizers.features import Active
from featurizers_evaluate import HarvestedRow, Row
from torch import Tensor

from featurizers_harvest.folders import Folder

TINY = torch.finfo(torch.float32).tiny
"""Value read in the place of one that float16 rounded to 0: the feature was not 0."""


class _Column:
    """Reads the rows of one name beside the tokens.

    Args:
        folder: of the harvest.
        file: of a shard.
        columns: to read.
    """

    def __init__(self, folder: Folder, file: str, columns: Sequence[str]) -> None:
        self._where, self._file = folder.where, file
        dataset = folder.dataset([file])
        self._columns = ["document", "position", *columns]
        self._batches = dataset.to_batches(columns=self._columns, batch_readahead=1, fragment_readahead=1)
        self._held: pa.Table = dataset.schema.empty_table().select(self._columns)

    def take(self, document: int, start: int, positions: Any) -> pa.Table:
        """Return the rows of some positions of a document, which are the next.

        Raises:
            ArtefactError: they are not.
        """
        n = len(positions)
        while len(self._held) < n and (batch := next(self._batches, None)) is not None:
            self._held = pa.concat_tables([self._held, pa.Table.from_batches([batch])]).combine_chunks()
        found, self._held = self._held.slice(0, n), self._held.slice(n)
        if len(found) < n or not (
            bool((found["document"].to_numpy() == document).all())
            and bool((found["position"].to_numpy() == start + positions).all())
        ):
            raise ArtefactError(
                self._where,
                f"{self._file} lacks rows of document {document}; delete the file and run the harvest again",
            )
        return found


def rows_of_shard(
    folder: Folder,
    tokens: str,
    context: int,
    features: Mapping[str, tuple[str, Sequence[int]]],
    activations: Mapping[str, tuple[str, Sequence[int]]],
) -> Iterator[HarvestedRow]:
    """Yield the rows of one shard.

    Args:
        folder: of the harvest.
        tokens: name of the file with the tokens.
        context: tokens of the longest row.
        features: by name, the file, and the token ids that have no row in it.
        activations: likewise.

    Raises:
        ArtefactError: the files do not fit each other.
    """
    columns = {name: _Column(folder, file, ["indices", "values"]) for name, (file, _) in features.items()}
    columns |= {name: _Column(folder, file, ["activation"]) for name, (file, _) in activations.items()}
    excluded = {name: np.array(ids, np.int64) for name, (_, ids) in {**features, **activations}.items()}
    for row in _rows(folder, tokens, context):
        ids = np.array(row.ids)
        found_features, found_activations = {}, {}
        for name, column in columns.items():
            positions = np.flatnonzero(~np.isin(ids, excluded[name]))
            table = column.take(row.document, row.start, positions)
            if name in features:
                found_features[name] = _active(table, positions)
            else:
                found_activations[name] = _dense(table, positions, len(ids))
        yield HarvestedRow(row, found_features, found_activations)


def _rows(folder: Folder, tokens: str, context: int) -> Iterator[Row]:
    """Yield the rows of tokens: a document, or as much of one as the model read at once."""
    document, start, ids = -1, 0, []  # type: tuple[int, int, list[int]]
    names = ["document", "position", "token"]
    for batch in folder.dataset([tokens]).to_batches(columns=names, batch_readahead=1, fragment_readahead=1):
        documents, positions, found = (batch.column(name).to_numpy() for name in names)
        rows = positions // context
        bounds = np.flatnonzero((np.diff(documents) != 0) | (np.diff(rows) != 0)) + 1
        for first, end in zip([0, *bounds.tolist()], [*bounds.tolist(), len(found)], strict=True):
            if first == end:
                continue
            key = (int(documents[first]), int(rows[first]) * context)
            if key != (document, start) and ids:
                yield Row(document, start, ids)
                ids = []
            document, start = key
            ids = ids + found[first:end].tolist()
    if ids:
        yield Row(document, start, ids)


def _active(table: pa.Table, positions: Any) -> Active:
    lists, values = (_chunk(table[name]) for name in ("indices", "values"))
    if lists is None or values is None:
        return Active(torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long), torch.zeros(0))
    counts = np.diff(lists.offsets.to_numpy())
    found = torch.from_numpy(values.flatten().to_numpy(zero_copy_only=False).astype(np.float32))
    return Active(
        torch.from_numpy(positions.repeat(counts)),
        torch.from_numpy(lists.flatten().to_numpy().astype(np.int64)),
        torch.where(found == 0, TINY, found),
    )


def _dense(table: pa.Table, positions: Any, n: int) -> Tensor:
    width = table.schema.field("activation").type.list_size
    x = torch.zeros(n, width)
    column = _chunk(table["activation"])
    if column is not None:
        flat = column.flatten().to_numpy(zero_copy_only=False).astype(np.float32)
        x[torch.from_numpy(positions)] = torch.from_numpy(flat.reshape(-1, width))
    return x


def _chunk(column: pa.ChunkedArray) -> pa.Array | None:
    """Return a column as one array; None if it has no rows."""
    return pa.concat_arrays(column.chunks) if len(column) else None
