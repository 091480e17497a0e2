"""Arrow tables of the rows of a harvest, one row a token, and checksums of rows."""

from __future__ import annotations

import hashlib
from typing import Any, Final

import numpy as np
import pyarrow as pa
import torch
from featurizers.errors import UsageError
from featurizers.features import Active
from torch import Tensor

DTYPES: Final = {"float16": torch.float16, "float32": torch.float32}
_ARROW: Final = {"float16": pa.float16(), "float32": pa.float32()}

KEYS: Final = (("document", pa.int64()), ("position", pa.int32()), ("token", pa.int32()))
"""Columns that say which token a row is of; the first two name it."""


def token_table(documents: Any, positions: Any, tokens: Any) -> pa.Table:
    """Return the columns that every file has.

    Args:
        documents: number of the document of each token, int64.
        positions: number of the token in its document, int32.
        tokens: token ids, int32.
    """
    arrays = [pa.array(each, type=kind) for each, (_, kind) in zip((documents, positions, tokens), KEYS, strict=True)]
    return pa.table(arrays, schema=pa.schema(KEYS))


def with_features(table: pa.Table, active: Active, dtype: str, where: str) -> pa.Table:
    """Return a table with the columns ``indices`` and ``values`` added, which are lists.

    Args:
        table: the tokens.
        active: their features.
        dtype: of the values, ``float16`` or ``float32``.
        where: name of the harvest in errors.

    Raises:
        UsageError: a value is not finite in the dtype.
    """
    n = table.num_rows
    offsets = pa.array(active.offsets(n).to("cpu", torch.int32).numpy())
    values = pa.array(_numbers(active.values, dtype, where))
    indices = pa.array(active.columns.to("cpu", torch.int32).numpy())
    table = table.append_column("indices", pa.ListArray.from_arrays(offsets, indices))
    return table.append_column("values", pa.ListArray.from_arrays(offsets, values))


def with_activations(table: pa.Table, activations: Tensor, dtype: str, where: str) -> pa.Table:
    """Return a table with the column ``activation`` added, lists of one length.

    Args:
        table: the tokens.
        activations: ``(tokens, d)``.
        dtype: as in `with_features`.
        where: as in `with_features`.

    Raises:
        UsageError: as in `with_features`.
    """
    numbers = pa.array(_numbers(activations.reshape(-1), dtype, where))
    return table.append_column("activation", pa.FixedSizeListArray.from_arrays(numbers, activations.shape[-1]))


def _numbers(values: Tensor, dtype: str, where: str) -> Any:
    found = values.detach().to("cpu", DTYPES[dtype])
    if not bool(found.isfinite().all()):
        if not bool(values.isfinite().all()):
            raise UsageError(f"{where}: NaN or infinity was computed; try another dtype of the model")
        largest = float(values.abs().max())
        raise UsageError(f"{where}: {largest:g} is too large for float16; give values='float32', or --values float32")
    return found.numpy()


def ordered(table: pa.Table) -> pa.Table:
    """Return the rows in the order of documents and positions."""
    documents, positions = (table[name].to_numpy() for name in ("document", "position"))
    order = np.lexsort((positions, documents))
    return table.combine_chunks() if bool((order == np.arange(len(order))).all()) else table.take(order)


class RowsChecksum:
    """Checksum of rows, whatever tables they come in: of counts, numbers and values as little-endian bytes."""

    def __init__(self) -> None:
        self._of_columns: dict[str, Any] = {}

    def add(self, table: pa.Table) -> None:
        """Add the rows of a table."""
        for name in table.column_names:
            digest = self._of_columns.setdefault(name, hashlib.sha256())
            column = table[name].combine_chunks()
            column = column if isinstance(column, pa.Array) else pa.concat_arrays(column.chunks)
            if pa.types.is_list(column.type):
                counts = np.diff(column.offsets.to_numpy())
                digest.update(counts.astype("<i4").data)
            flat = column if not isinstance(column, pa.ListArray | pa.FixedSizeListArray) else column.flatten()
            digest.update(np.ascontiguousarray(flat.to_numpy(zero_copy_only=False)).data)

    def hexdigest(self) -> str:
        """Return the checksum of all rows so far."""
        whole = hashlib.sha256()
        for name, digest in self._of_columns.items():
            whole.update(f"{name}:{digest.hexdigest()};".encode())
        return whole.hexdigest()
