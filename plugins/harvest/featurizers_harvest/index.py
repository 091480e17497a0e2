"""Index of a harvest by feature: where each feature is not 0, largest first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from featurizers.errors import UsageError, shown
from featurizers.files import filling, os_errors, temporary_folder

from featurizers_harvest.folders import Disk
from featurizers_harvest.reading import Harvest

PAIRS: Final = 2**23
"""Pairs of a feature and a token that are sorted at once."""
ROW_GROUP: Final = 2**14
MOST_FILES: Final = 512
"""Files that are open at once."""

SCHEMA: Final = pa.schema(
    [("feature", pa.int32()), ("value", pa.float32()), ("document", pa.int64()), ("position", pa.int32())]
)


class Context(NamedTuple):
    """A token at which a feature is large, with the tokens around it.

    Attributes:
        document: number of the document.
        position: of the token in it.
        value: of the feature.
        tokens: token ids around it.
        start: position of the first of these.
    """

    document: int
    position: int
    value: float
    tokens: list[int]
    start: int


def build_index(harvest: Harvest, name: str) -> Path:
    """Write the index of a name beside the harvest, ``by=feature/name=NAME``, and return its folder.

    The pairs are spread over files by ranges of features, then each file is sorted, so that memory is bounded. An index
    that is there already is kept.

    Args:
        harvest: complete, on a disk.
        name: of features in it.

    Raises:
        UsageError: there are activations under this name, or the harvest is in object storage or not finished.
    """
    if not isinstance(harvest.folder, Disk):
        raise UsageError("an index is written beside a harvest on a disk, not in object storage")
    if not harvest.is_complete:
        raise UsageError("an index is of a harvest that is finished; run the harvest again to finish it")
    counts = _counts(harvest, name)
    target = harvest.folder.path / "by=feature" / f"name={name}"
    if target.exists():
        return target
    ranges = _ranges(counts)
    with os_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder() as scratch, filling(target) as new, os_errors(target):
        _spread(harvest, name, ranges, scratch)
        for number in range(len(ranges)):
            _sort(scratch / f"{number}.parquet", new / f"part-{number:06d}.parquet")
    return target


def top_contexts(harvest: Harvest, name: str, feature: int, *, k: int = 10, width: int = 16) -> list[Context]:
    """Return the tokens at which a feature is largest, with the tokens around each.

    Args:
        harvest: complete, on a disk; its index is built at the first call.
        name: of features in it.
        feature: its number.
        k: number of contexts.
        width: tokens on each side.

    Raises:
        UsageError: a number is invalid; else as `build_index`.
    """
    for what, number, least in (("feature", feature, 0), ("k", k, 1), ("width", width, 0)):
        if type(number) is not int or number < least:
            raise UsageError(f"{what} is a whole number of at least {least}, not {shown(number)}")
    folder = build_index(harvest, name)
    rows: list[dict[str, Any]] = []
    for path in sorted(folder.glob("*.parquet")):
        table = ds.dataset(str(path)).to_table(filter=ds.field("feature") == feature)
        rows += table.slice(0, k - len(rows)).to_pylist()
    return [_context(harvest, row, width) for row in rows]


def _context(harvest: Harvest, row: dict[str, Any], width: int) -> Context:
    start, end = max(0, row["position"] - width), row["position"] + width
    wanted = (ds.field("document") == row["document"]) & (ds.field("position") >= start) & (ds.field("position") <= end)
    dataset = harvest.folder.dataset([harvest.file_of(row["document"])])
    tokens = dataset.to_table(columns=["token"], filter=wanted)
    return Context(row["document"], row["position"], row["value"], tokens["token"].to_pylist(), start)


def _counts(harvest: Harvest, name: str) -> Any:
    """Return at how many tokens each feature is not 0."""
    density = harvest.densities(name).numpy()
    tokens = harvest.dataset(name).count_rows()
    return np.rint(density * tokens).astype(np.int64)


def _ranges(counts: Any) -> list[tuple[int, int]]:
    """Return ranges of features of about `PAIRS` pairs, each at least one feature."""
    most = max(PAIRS, -(-int(counts.sum()) // MOST_FILES))
    ranges: list[tuple[int, int]] = []
    first, held = 0, 0
    for feature, count in enumerate(counts.tolist()):
        if held and held + count > most:
            ranges.append((first, feature))
            first, held = feature, 0
        held += count
    return [*ranges, (first, max(len(counts), first + 1))]


def _spread(harvest: Harvest, name: str, ranges: Sequence[tuple[int, int]], scratch: Path) -> None:
    """Write the pairs of each range of features to a file of its own."""
    bounds = np.array([end for _, end in ranges])
    with ExitStack() as stack:
        writers = [
            stack.enter_context(pq.ParquetWriter(scratch / f"{number}.parquet", SCHEMA))
            for number in range(len(ranges))
        ]
        for table in _pairs(harvest, name):
            which = np.searchsorted(bounds, table["feature"].to_numpy(), side="right")
            for number in np.unique(which):
                writers[number].write_table(table.filter(pa.array(which == number)))


def _pairs(harvest: Harvest, name: str) -> Iterator[pa.Table]:
    columns = ["document", "position", "indices", "values"]
    for batch in harvest.dataset(name).to_batches(columns=columns, batch_size=2**12):
        indices = batch.column("indices")
        counts = np.diff(indices.offsets.to_numpy())
        values = batch.column("values").flatten().to_numpy(zero_copy_only=False).astype(np.float32)
        documents, positions = (batch.column(each).to_numpy().repeat(counts) for each in columns[:2])
        yield pa.table([indices.flatten(), pa.array(values), documents, positions], schema=SCHEMA)


def _sort(source: Path, target: Path) -> None:
    """Sort pairs by feature, the largest values first, then by document and position."""
    table = pq.read_table(source)
    feature, value, document, position = (table[name].to_numpy() for name in SCHEMA.names)
    order = np.lexsort((position, document, -value, feature))
    pq.write_table(table.take(order), target, row_group_size=ROW_GROUP, compression="zstd")
