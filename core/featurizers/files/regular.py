"""Open untrusted files: only regular files, and none outside the folder that the user named."""

from __future__ import annotations

import errno
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
"""Largest nesting depth of folders within a folder."""
SNAPSHOT: Final = re.compile(r"(models|datasets|spaces)--[^/\\]+")
"""Name of a repository's folder in the Hub's cache."""

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
"""What files are that are often found under a wrong name, by their first bytes in lower case."""


@contextmanager
def opened(path: Path, where: str, error: type[ArtefactError], name: str | None = None) -> Iterator[BufferedReader]:
    """Open a regular file for reading.

    Args:
        path: the file.
        where: name of its artefact in errors.
        error: class of the errors.
        name: name of the file in errors; default: the last part of its path.

    Raises:
        ArtefactError: the file is a pipe, a device or a folder, or cannot be read; the class is ``error``.
    """
    name = name or path.name
    if "\0" in str(path):  # Python raises a ValueError for it
        raise error(where, f"{_named(name)} has a null character in its path")
    try:
        _refuse_special(path.stat(), where, error, name)  # opening a device may have side effects
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
        with open(os.open(path, flags), "rb") as file:
            _refuse_special(os.fstat(file.fileno()), where, error, name)  # it may have been replaced
            yield file
    except ArtefactError:  # some are OSErrors too
        raise
    except OSError as cause:
        raise error(where, f"{_named(name)} cannot be read: {one_line(cause.strerror or cause)}") from cause


def read_bytes(path: Path, where: str, error: type[ArtefactError], most: int, name: str | None = None) -> bytes:
    """Return the contents of a regular file of at most ``most`` bytes; the other arguments are those of `opened`.

    Raises:
        ArtefactError: the file is larger, not regular, or cannot be read; the class is ``error``.
    """
    with opened(path, where, error, name) as file:
        raw = file.read(most + 1)
    if len(raw) > most:
        raise error(where, f"{_named(name or path.name)} is larger than {most} bytes")
    return raw


def looks_like(head: bytes) -> str | None:
    """Guess what a misnamed file is from its first bytes; return None if they are not known."""
    head = head.lstrip(b" \t\r\n").lower()
    if not head:
        return "it is empty"
    return next((description for start, description in LOOKALIKES.items() if head.startswith(start)), None)


def contained(folder: Path, path: Path, where: str, error: type[ArtefactError]) -> Path:
    """Return the path if the file that it leads to, links resolved, is in the folder.

    Links of the Hub's cache may also lead from a snapshot to the blobs of its repository or of the whole cache.

    Raises:
        ArtefactError: the file is outside the folder; the class is ``error``.
    """
    root = folder.resolve()
    try:
        real = path.resolve()
        if real.is_symlink():  # a loop of links, for which Python before 3.13 raises an error itself
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
    except (OSError, RuntimeError) as cause:
        raise error(where, f"{_named(path.name)} cannot be read: {one_line(cause)}") from cause
    roots = [root]
    for repository in (root, *root.parents):
        if SNAPSHOT.fullmatch(repository.name) and root.is_relative_to(repository / "snapshots"):
            # not resolved: a stranger may have replaced a folder of blobs by a link
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
    """Return the stat signature (device, inode, size, mtime, ctime) of each file of a folder, None if absent."""
    return tuple(_signature(folder / name) for name in names)


def _signature(path: Path) -> tuple[int, ...] | None:
    try:
        info = path.stat()
    except (OSError, ValueError):
        return None
    return info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns


def _refuse_special(info: os.stat_result, where: str, error: type[ArtefactError], name: str) -> None:
    if not stat.S_ISREG(info.st_mode):
        kind = KINDS.get(stat.S_IFMT(info.st_mode), "something else")
        raise error(where, f"{_named(name)} is {kind}, not a regular file")


def _named(name: str) -> str:
    """Return a file's name for an error: as it is if it is plain ASCII, else its repr."""
    return name if re.fullmatch(r"[A-Za-z0-9._/-]{1,200}", name) else shown(name, 200)
