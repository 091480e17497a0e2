"""Files of one shard: written to temporaries while rows come, and put together when all are complete."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final, Self

import pyarrow as pa
import pyarrow.parquet as pq
from featurizers.files import os_errors
from featurizers.format import sha256
from pydantic import BaseModel, ConfigDict

from featurizers_harvest.folders import Folder
from featurizers_harvest.tables import RowsChecksum

THREADS: Final = 4
"""Most threads that compress and write while the model runs."""


class Part(BaseModel):
    """What is known of one file of a shard.

    Attributes:
        rows: number of rows.
        bytes: size of the file.
        sha256: of the file.
        rows_sha256: of the rows, which another version of Parquet's writer does not change.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    rows: int
    bytes: int
    sha256: str
    rows_sha256: str


class _Writer:
    """One file that is being written; a table becomes a row group."""

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.name = path, name
        self.rows, self.checksum = 0, RowsChecksum()
        self._file: Any = None

    def write(self, table: pa.Table) -> None:
        """Add rows."""
        with os_errors(Path(self.name)):
            if self._file is None:
                self._file = pq.ParquetWriter(self.path, table.schema, compression="zstd", use_dictionary=["document"])
            self._file.write_table(table, row_group_size=max(1, table.num_rows))
        self.checksum.add(table)
        self.rows += table.num_rows

    def close(self) -> None:
        """Finish the file, or leave it as it is after an error."""
        if self._file is not None:
            with os_errors(Path(self.name)):
                file, self._file = self._file, None
                file.close()

    def part(self) -> Part:
        """Return what is known of the finished file."""
        checksum = self.checksum.hexdigest()
        with os_errors(Path(self.name)):
            size = self.path.stat().st_size
        return Part(rows=self.rows, bytes=size, sha256=sha256(self.path, self.name), rows_sha256=checksum)


class Parts:
    """Files of one shard, as a context; nothing has its name before `put`.

    Args:
        folder: of the harvest.
        names: of the files, by the name of what they hold.
    """

    def __init__(self, folder: Folder, names: Mapping[str, str]) -> None:
        self._folder, self._names = folder, dict(names)

    def __enter__(self) -> Self:
        """Make the temporaries."""
        self._stack = ExitStack()
        with ExitStack() as stack:
            paths = {key: stack.enter_context(self._folder.scratch(name)) for key, name in self._names.items()}
            self._writers = {key: _Writer(paths[key], name) for key, name in self._names.items()}
            for writer in self._writers.values():
                stack.callback(writer.close)
            self._pool = stack.enter_context(ThreadPoolExecutor(min(THREADS, len(self._writers)), "harvest-writer"))
            self._stack = stack.pop_all()
        self._pending: list[Future[None]] = []
        return self

    def __exit__(self, *_: object) -> None:
        """Remove what was not put."""
        self._stack.close()

    def write(self, tables: Mapping[str, pa.Table]) -> None:
        """Write rows in threads, when those of the call before are written."""
        self._wait()
        self._pending = [self._pool.submit(self._writers[key].write, table) for key, table in tables.items()]

    def _wait(self) -> None:
        pending, self._pending = self._pending, []
        for each in pending:
            each.result()

    def finish(self) -> dict[str, Part]:
        """Finish the files, and return what is known of each by its key."""
        self._wait()
        for writer in self._writers.values():
            writer.close()
        return {key: writer.part() for key, writer in self._writers.items()}

    def put(self) -> None:
        """Give the files their names."""
        for key, writer in self._writers.items():
            self._folder.put(writer.path, self._names[key])
