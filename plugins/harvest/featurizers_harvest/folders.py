"""`Folder`: files of a harvest, each replaced as a whole: on a disk, or in object storage through fsspec."""

from __future__ import annotations

import os
import re
import shutil
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, Final

from featurizers.errors import ArtefactError, MissingDependencyError, UsageError, one_line, shown
from featurizers.files import locked, os_errors, temporary_folder

UNFINISHED: Final = re.compile(r"\.(part-\d{6,}|plan|known|work)\.[0-9a-f]{32}")
"""Names of temporaries that a killed program leaves."""
URL: Final = re.compile(r"[a-z][a-z0-9+.-]+://")


class Folder(ABC):
    """Folder of a harvest. Names of files are relative, with ``/``.

    Attributes:
        where: path or address, for errors.
    """

    where: str

    @abstractmethod
    def sizes(self, folder: str) -> dict[str, int]:
        """Return the sizes of the finished files in a folder by name; empty if there is none."""

    @abstractmethod
    def read(self, name: str) -> bytes | None:
        """Return the contents of a file; None if there is none."""

    @abstractmethod
    def scratch(self, name: str) -> Any:
        """Return a context that yields a new path to write ``name`` to; what is not put is removed."""

    @abstractmethod
    def put(self, new: Path, name: str) -> None:
        """Give a file of `scratch` its name, in one step that survives a crash of the system."""

    @abstractmethod
    def dataset(self, names: list[str]) -> Any:
        """Return a `pyarrow.dataset` of Parquet files in this order."""

    @abstractmethod
    def local(self, name: str) -> Any:
        """Return a context that yields a path on this machine with the contents of a file, to read."""

    def write(self, name: str, data: bytes) -> None:
        """Write a small file in one step."""
        with self.scratch(name) as new:
            with os_errors(Path(name)):
                new.write_bytes(data)
            self.put(new, name)

    def lock(self) -> Any:
        """Return a context in which other whole runs are kept out."""
        return nullcontext()

    def clear(self) -> None:  # noqa: B027  # nothing is left over in object storage
        """Remove temporaries of programs that were killed."""


class Disk(Folder):
    """Folder on a disk, which several machines may share."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.where = str(path)

    def sizes(self, folder: str) -> dict[str, int]:
        """See `Folder.sizes`."""
        try:
            with os.scandir(self.path / folder) as entries:
                return {each.name: each.stat().st_size for each in entries if each.is_file() and each.name[0] != "."}
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise ArtefactError(self.where, f"{folder} cannot be read: {one_line(error)}") from error

    def read(self, name: str) -> bytes | None:
        """See `Folder.read`."""
        try:
            return (self.path / name).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ArtefactError(self.where, f"{name} cannot be read: {one_line(error)}") from error

    @contextmanager
    def scratch(self, name: str) -> Iterator[Path]:
        """See `Folder.scratch`; the path is beside the file, so that a rename puts it."""
        target = self.path / name
        with os_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
        new = target.with_name(f".{target.name.partition('.')[0]}.{uuid.uuid4().hex}")
        try:
            yield new
        finally:
            with suppress(OSError):
                new.unlink(missing_ok=True)

    def put(self, new: Path, name: str) -> None:
        """See `Folder.put`."""
        with os_errors(self.path / name):
            with open(new, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(new, self.path / name)
            _flush(self.path / name)

    def dataset(self, names: list[str]) -> Any:
        """See `Folder.dataset`."""
        import pyarrow.dataset

        return pyarrow.dataset.dataset([str(self.path / name) for name in names], format="parquet")

    @contextmanager
    def local(self, name: str) -> Iterator[Path]:
        """See `Folder.local`."""
        yield self.path / name

    def lock(self) -> Any:
        """See `Folder.lock`."""
        return locked(self.path)

    def clear(self) -> None:
        """See `Folder.clear`."""
        for path in [*self.path.glob(".*"), *self.path.glob("*/.*")]:
            if UNFINISHED.fullmatch(path.name):
                with suppress(OSError):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()


class Bucket(Folder):
    """Folder in object storage. A file is written on this machine and put, which these stores do in one step."""

    def __init__(self, url: str) -> None:
        try:
            import fsspec
        except ImportError as error:
            raise MissingDependencyError("a harvest in object storage", "fsspec", "pip install fsspec") from error
        try:
            self.fs, self.root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise UsageError(f"cannot open {shown(url)}: {one_line(error)}") from error
        self.root, self.where = str(self.root).rstrip("/"), url

    def _path(self, name: str) -> str:
        return f"{self.root}/{name}"

    @contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # the libraries of each store raise kinds of their own
            if isinstance(error, ArtefactError):
                raise
            raise ArtefactError(self.where, f"{what}: {one_line(error)}") from error

    def sizes(self, folder: str) -> dict[str, int]:
        """See `Folder.sizes`."""
        with self._errors(f"{folder} cannot be listed"):
            self.fs.invalidate_cache()
            try:
                found = self.fs.ls(self._path(folder), detail=True)
            except FileNotFoundError:
                return {}
            return {each["name"].rpartition("/")[2]: each["size"] for each in found if each["type"] == "file"}

    def read(self, name: str) -> bytes | None:
        """See `Folder.read`."""
        with self._errors(f"{name} cannot be read"):
            try:
                return bytes(self.fs.cat_file(self._path(name)))
            except FileNotFoundError:
                return None

    @contextmanager
    def scratch(self, name: str) -> Iterator[Path]:
        """See `Folder.scratch`."""
        with temporary_folder() as folder:
            yield folder / "new"

    def put(self, new: Path, name: str) -> None:
        """See `Folder.put`."""
        with self._errors(f"{name} cannot be written"):
            self.fs.makedirs(self._path(name).rpartition("/")[0], exist_ok=True)
            self.fs.put_file(str(new), self._path(name))

    def dataset(self, names: list[str]) -> Any:
        """See `Folder.dataset`."""
        import pyarrow.dataset

        paths = [self._path(name) for name in names]
        return pyarrow.dataset.dataset(paths, format="parquet", filesystem=self.fs)

    @contextmanager
    def local(self, name: str) -> Iterator[Path]:
        """See `Folder.local`."""
        with temporary_folder() as folder:
            with self._errors(f"{name} cannot be read"):
                self.fs.get_file(self._path(name), str(folder / "file"))
            yield folder / "file"


def folder_of(out: str | Path) -> Folder:
    """Return the folder of a path, or of an address such as ``s3://bucket/name``."""
    if URL.match(str(out)):
        return Bucket(str(out))
    return Disk(Path(out).expanduser())


def _flush(path: Path) -> None:
    """Write the name of a new file to the disk."""
    try:
        folder = os.open(path.parent, os.O_RDONLY)
    except OSError:  # a system that opens no folders
        return
    try:
        with suppress(OSError):
            os.fsync(folder)
    finally:
        os.close(folder)
