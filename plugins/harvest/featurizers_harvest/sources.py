"""Documents that can be read again from any shard on: a file of lines, a Parquet file, a sequence, any iterable."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from featurizers.errors import UsageError, one_line, printable, shown
from featurizers_evaluate import content, text_of_line
from torch import Tensor

MAX_LINE_BYTES = 2**28


class Source(Protocol):
    """Documents in a fixed order.

    A place is where a document begins, in numbers of the source's own: bytes of a file, or documents.
    """

    def read(self, document: int, place: int) -> Iterator[tuple[int, Any]]:
        """Yield the documents from one on, each with its place.

        Args:
            document: number of the first one.
            place: where it begins.
        """
        ...


@dataclass(frozen=True)
class Lines:
    """File with a text in a line, or in a ``.jsonl`` file a record; empty lines are no documents.

    Attributes:
        path: of the file.
        key: under which a record has its text, or its token ids.
    """

    path: Path
    key: str = "text"

    def read(self, document: int, place: int) -> Iterator[tuple[int, Any]]:
        """See `Source.read`; a place is a number of bytes."""
        is_json = self.path.suffix == ".jsonl"
        try:
            with self.path.open("rb") as file:
                file.seek(place)
                for line in file:
                    if line.strip():
                        where = f"{printable(str(self.path), 200)}, document {document}"
                        text = text_of_line(line, self.key, where) if is_json else line.decode().rstrip("\r\n")
                        yield place, text
                        document += 1
                    place += len(line)
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"cannot read documents from {shown(str(self.path))}: {one_line(error)}") from error


@dataclass(frozen=True)
class Table:
    """Column of a Parquet file; a document that is null is refused.

    Attributes:
        path: of the file.
        key: name of the column, of texts or of lists of token ids.
    """

    path: Path
    key: str = "text"

    def read(self, document: int, place: int) -> Iterator[tuple[int, Any]]:
        """See `Source.read`; a place is a number of documents, and one row group is held at a time."""
        import pyarrow.parquet as pq

        try:
            with pq.ParquetFile(self.path) as file:
                if self.key not in file.schema_arrow.names:
                    columns = shown(sorted(file.schema_arrow.names))
                    missing = f"{shown(str(self.path))} has no column {self.key!r}, but {columns}"
                    raise UsageError(f"{missing}; name one with key=… or --key")
                first = 0
                for group in range(file.num_row_groups):
                    last = first + file.metadata.row_group(group).num_rows
                    if last > document:
                        at = first
                        for batch in file.iter_batches(256, row_groups=[group], columns=[self.key]):
                            for row in batch.column(0).slice(max(0, document - at)):
                                yield document, self._value(row.as_py(), document)
                                document += 1
                            at += batch.num_rows
                    first = last
        except (OSError, ValueError) as error:
            if isinstance(error, UsageError):
                raise
            raise UsageError(f"cannot read documents from {shown(str(self.path))}: {one_line(error)}") from error

    def _value(self, value: Any, document: int) -> Any:
        if value is None:
            raise UsageError(f"document {document} of {shown(str(self.path))} is null; leave such rows out")
        return value


@dataclass(frozen=True)
class Items:
    """Sequence of documents, such as a list, a tensor of token ids or a data set on disk.

    Attributes:
        items: the documents.
        key: under which a record has its text or token ids; None for the names that are known.
    """

    items: Any
    key: str | None = None

    def read(self, document: int, place: int) -> Iterator[tuple[int, Any]]:
        """See `Source.read`; a place is a number of documents."""
        for number in range(document, len(self.items)):
            yield number, picked(self.items[number], self.key, number)


@dataclass
class Stream:
    """Iterable of documents that begins anew each time; to read from the middle it is read from the beginning.

    Attributes:
        items: the documents.
        key: as in `Items`.
    """

    items: Iterable[Any]
    key: str | None = None
    _open: Iterator[Any] | None = field(default=None, init=False, repr=False)
    _at: int = field(default=0, init=False, repr=False)

    def read(self, document: int, place: int) -> Iterator[tuple[int, Any]]:
        """See `Source.read`; a place is a number of documents. Shards in their order cost one reading."""
        if self._open is None or self._at > document:
            self._open, self._at = iter(self.items), 0
        for _ in itertools.islice(self._open, document - self._at):
            self._at += 1
        for item in self._open:
            self._at += 1
            yield self._at - 1, picked(item, self.key, self._at - 1)
        self._open = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave the open iterator out of what another process gets."""
        return {**vars(self), "_open": None, "_at": 0}


def picked(document: Any, key: str | None, number: int) -> Any:
    """Return what a record has under a key; a document that is no record, and any without a key, unchanged.

    Raises:
        UsageError: a record does not have the key.
    """
    if key is None or not isinstance(document, Mapping):
        return document
    if key not in document:
        raise UsageError(f"document {number} has no {key!r}, but {shown(sorted(document))}; name the key with key=…")
    return document[key]


def source_of(data: Any, key: str | None = None) -> Source:
    """Return the documents that ``data`` stands for.

    Args:
        data: path of a ``.jsonl``, ``.parquet`` or text file; a tensor of token ids ``(documents, tokens)``; inputs of
            a model with ``attention_mask``; a sequence, or an iterable that can be read again, of texts, token ids or
            records.
        key: under which a record has its text or token ids.

    Raises:
        UsageError: it is none of these.
    """
    if isinstance(data, Lines | Table | Items | Stream):
        return data
    if isinstance(data, str | Path):
        return _of_path(Path(data).expanduser(), key or "text")
    if isinstance(data, Mapping):
        return Items(_unpadded(data))
    if isinstance(data, Tensor):
        if data.is_floating_point() or data.is_complex() or data.dim() != 2:
            raise UsageError(f"token ids are integers, (documents, tokens), not {data.dtype} {tuple(data.shape)}")
        return Items(data)
    if isinstance(data, Iterator):
        raise UsageError(
            "data is an iterator, which can be read once, and a harvest that goes on after a stop reads it again: "
            "give a list, a data set or the path of a file"
        )
    if isinstance(data, bytes) or not isinstance(data, Iterable):
        raise UsageError(f"data is the path of a file or documents, such as a list of texts, not {shown(data)}")
    if isinstance(data, Sequence) or (hasattr(data, "__getitem__") and hasattr(data, "__len__")):
        return Items(data, key)
    return Stream(data, key)


def _of_path(path: Path, key: str) -> Source:
    if not path.is_file():
        raise UsageError(f"there is no file {shown(str(path))}; data is a .jsonl, .parquet or text file, or documents")
    return Table(path, key) if path.suffix == ".parquet" else Lines(path, key)


def _unpadded(inputs: Mapping[str, Any]) -> list[Tensor]:
    ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        raise UsageError("inputs of a model have input_ids, a tensor of (documents, tokens)")
    if mask is None:
        return list(ids)
    if mask.shape != ids.shape:
        raise UsageError(f"input_ids are {tuple(ids.shape)}, and the attention_mask is {tuple(mask.shape)}")
    return [row[real != 0] for row, real in zip(ids, mask, strict=True)]


def encoded(document: Any, number: int) -> tuple[bytes, int]:
    """Return a document as bytes for a checksum, and about how many tokens it has.

    The bytes do not depend on whether the document comes from a file or from memory. Of a text four bytes count as a
    token.

    Raises:
        UsageError: it is no text and no token ids.
    """
    found = content(document, number)
    if isinstance(found, str):
        raw = found.encode("utf-8", "surrogatepass")
        return b"t%d:" % len(raw) + raw, len(raw) // 4 + 1
    text = ",".join(map(str, found)).encode()
    return b"i%d:" % len(text) + text, len(found)
