"""Documents that a command names: a file of texts, a table, or a data set of the Hub."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from featurizers.errors import ArtefactError, MissingDependencyError, UsageError, one_line, printable, shown
from featurizers.format import parse_json
from featurizers.hub import REPO_ID

MAX_LINE_BYTES: Final = 2**28


@dataclass(frozen=True)
class TextFile:
    """Documents of a file, which is read anew each time: a text in a line, or in a ``.jsonl`` file a record.

    Attributes:
        path: of the file.
        key: under which a record has its text, or its token ids.
    """

    path: Path
    key: str

    def __iter__(self) -> Iterator[Any]:
        """Iterate over texts and lists of token ids; empty lines are left out."""
        try:
            with self.path.open(encoding="utf-8") as file:
                for number, line in enumerate(file, 1):
                    if not line.strip():
                        continue
                    if self.path.suffix == ".jsonl":
                        yield text_of_line(line.encode(), self.key, f"{printable(str(self.path), 200)}:{number}")
                    else:
                        yield line.rstrip("\r\n")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"cannot read documents from {shown(str(self.path))}: {one_line(error)}") from error


@dataclass(frozen=True)
class Column:
    """Documents of a column of a data set.

    Attributes:
        rows: records.
        key: of the column.
        where: name of the data set in errors.
    """

    rows: Iterable[Any]
    key: str
    where: str

    def __iter__(self) -> Iterator[Any]:
        """Iterate over the values."""
        for row in self.rows:
            if self.key not in row:
                columns = shown(sorted(row))
                raise UsageError(f"{self.where} has no column {self.key!r}, but {columns}; name one with --key")
            yield row[self.key]


def text_of_line(line: bytes, key: str, where: str) -> str | list[Any]:
    """Return the text, or the token ids, of a record in a line of JSON.

    Args:
        line: of the file.
        key: under which the record has it.
        where: name of the line in errors.

    Raises:
        UsageError: the line is no such record.
    """
    try:
        record = parse_json(line, where, "the line", most=MAX_LINE_BYTES)
    except ArtefactError as error:
        raise UsageError(f"{where}: {error.problem}") from error
    found = record.get(key) if isinstance(record, dict) else None
    if not isinstance(found, str | list):
        wanted = f"an object with a text or token ids under {key!r}"
        raise UsageError(f"{where}: expected {wanted}, not {shown(record)}; name the key with key=… or --key")
    return found


def documents_of(data: str, key: str, split: str) -> Iterable[Any]:
    """Return the documents that ``--data`` names.

    Args:
        data: a ``.jsonl``, ``.parquet`` or text file, or the id of a data set of the Hub.
        key: of the text in a record.
        split: of a data set of the Hub.

    Raises:
        UsageError: there is no such file, or the data set cannot be loaded.
        MissingDependencyError: it needs `datasets`, which is not installed.
    """
    path = Path(data).expanduser()
    if path.is_file() and path.suffix != ".parquet":
        return TextFile(path, key)
    is_repository = REPO_ID.fullmatch(data) is not None and "/" in data and not path.exists()
    if not path.is_file() and not is_repository:
        raise UsageError(f"there is no file {shown(data)}; --data is a .jsonl, .parquet or text file, or owner/name")
    return (
        hub_documents(data, key, split) if is_repository else _loaded(shown(data), key, "parquet", str(path), "train")
    )


def hub_documents(name: str, key: str, split: str) -> Iterable[Any]:
    """Return the documents of a data set of the Hub, which is streamed, anew each time that it is iterated.

    Args:
        name: id of the data set.
        key: of the text, or the token ids, in a record.
        split: of the data set.

    Raises:
        UsageError: the data set cannot be loaded.
        MissingDependencyError: it needs `datasets`, which is not installed.
    """
    return _loaded(shown(name), key, name, None, split)


def _loaded(where: str, key: str, name: str, files: str | None, split: str) -> Column:
    try:
        from datasets import load_dataset
    except ImportError as error:
        command = "pip install 'featurizers-evaluate[datasets]'"
        raise MissingDependencyError("a table or a data set of the Hub", "datasets", command) from error
    try:
        rows = load_dataset(name, data_files=files, split=split, streaming=True)
    except Exception as error:  # datasets and the libraries under it raise many kinds
        raise UsageError(f"cannot load the data set {where}: {one_line(error)}") from error
    return Column(rows, key, where)
