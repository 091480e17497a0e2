"""Files that may come from a stranger: only regular ones are opened, and none outside the folder that was named."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Final

from featurizers.errors import ArtefactError, one_line, shown

MAX_LEVELS: Final = 64
"""How deep the folders of a folder may lie in each other."""
SNAPSHOT: Final = re.compile(r"(models|datasets|spaces)--[^/\\]+")
"""What the Hub's cache calls the folder of a repository."""

KINDS: Final = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}

LOOKALIKES: Final = {
    b"version https://git-lfs": "it is a Git-LFS pointer; fetch the file itself, with: git lfs pull",
    b"<": "it is a web page",
    b"\xef\xbb\xbf": "it begins with a byte-order mark; save it as UTF-8 without one",
    b"\x80": "it is a pickle, which is never opened",
    b"pk\x03\x04": "it is a zip archive, such as torch.save writes",
    b"\x93numpy": "it is a numpy array",
    b"\x89hdf": "it is an HDF5 file",
}
"""What is found under the name of another file, by how it begins, in lower case."""


@contextmanager
def opened(path: Path, where: str, error: type[ArtefactError], name: str | None = None) -> Iterator[BufferedReader]:
    """A regular file, open for reading.

    Args:
        path: of the file.
        where: what to call its artefact in an error.
        error: the class of that error.
        name: what to call the file, its last part if None.

    Raises:
        ArtefactError: of the class given: it is a pipe, a device or a folder, or cannot be read.
    """
    name = name or path.name
    try:
        _refuse_special(path.stat(), where, error, name)  # opening some devices has effects
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
        with open(os.open(path, flags), "rb") as file:
            _refuse_special(os.fstat(file.fileno()), where, error, name)  # it may be another one by now
            yield file
    except ArtefactError:  # some are an OSError too
        raise
    except OSError as cause:
        raise error(where, f"{_named(name)} cannot be read: {one_line(cause.strerror or cause)}") from cause


def read_bytes(path: Path, where: str, error: type[ArtefactError], most: int, name: str | None = None) -> bytes:
    """The contents of a file that is no larger than ``most`` bytes; the rest as `opened`.

    Raises:
        ArtefactError: of the class given: it is larger, or no regular file, or cannot be read.
    """
    with opened(path, where, error, name) as file:
        raw = file.read(most + 1)
    if len(raw) > most:
        raise error(where, f"{_named(name or path.name)} is larger than {most} bytes")
    return raw


def looks_like(head: bytes) -> str | None:
    """What a file seems to be that is not what its name says, by how it begins; None if that tells nothing."""
    head = head.lstrip(b" \t\r\n").lower()
    if not head:
        return "it is empty"
    return next((looks for start, looks in LOOKALIKES.items() if head.startswith(start)), None)


def contained(folder: Path, path: Path, where: str, error: type[ArtefactError]) -> Path:
    """The path itself, if the file that it leads to is in the folder, whatever links there are on the way.

    The links of the Hub's cache, from a snapshot to the blobs of its repository or to those of the whole cache, are
    followed too.

    Raises:
        ArtefactError: of the class given: it leads out of the folder.
    """
    root = folder.resolve()
    try:
        real = path.resolve()
    except (OSError, RuntimeError) as cause:  # a loop of links
        raise error(where, f"{_named(path.name)} cannot be read: {one_line(cause)}") from cause
    roots = [root]
    for repository in (root, *root.parents):
        if SNAPSHOT.fullmatch(repository.name) and root.is_relative_to(repository / "snapshots"):
            # as they are named: where a link in their place leads is a stranger's choice
            roots += [repository / "blobs", repository.parent / "blobs"]
            break
    if not any(real.is_relative_to(allowed) for allowed in roots):
        raise error(
            where,
            f"{_named(path.name)} is a link out of this folder, to {shown(str(real), 200)}; "
            "copy the file into the folder if you trust it",
        )
    return path


def stat_signature(folder: Path, *names: str) -> tuple[tuple[int, ...] | None, ...]:
    """What changes when one of the files of a folder is written again or replaced; None for one that is not there."""
    return tuple(_version(folder / name) for name in names)


def _version(path: Path) -> tuple[int, ...] | None:
    try:
        found = path.stat()
    except (OSError, ValueError):
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _refuse_special(found: os.stat_result, where: str, error: type[ArtefactError], name: str) -> None:
    if not stat.S_ISREG(found.st_mode):
        kind = KINDS.get(stat.S_IFMT(found.st_mode), "something else")
        raise error(where, f"{_named(name)} is {kind}, not a regular file")


def _named(name: str) -> str:
    """A file's name as an error shows it: bare if it is an ordinary one."""
    return name if re.fullmatch(r"[A-Za-z0-9._/-]{1,200}", name) else shown(name, 200)
