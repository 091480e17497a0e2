"""A lock on the folder of a long run, so that two programs do not write to it in turns."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from filelock import FileLock, Timeout

from featurizers.errors import ArtefactError
from featurizers.files.replacement import os_errors

LOCK_NAME: Final = ".lock"
"""Name of the file that is locked. It is empty and stays in the folder: deleting it would let two programs in."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other programs, and other threads of this one, out of a folder while the block runs.

    The system releases the lock when the process ends, however it ends. Readers need no lock. On disks without locks
    nothing is kept out.

    Args:
        folder: made if it does not exist.

    Raises:
        ArtefactError: another program has the lock, or the folder cannot be written.
    """
    path = folder / LOCK_NAME
    with os_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            if not stat.S_ISREG(path.lstat().st_mode):
                raise ArtefactError(str(path), "it is no regular file, so it cannot be locked; delete it")
        except FileNotFoundError:
            pass
    lock = FileLock(path, timeout=0, thread_local=False)
    held = True
    with os_errors(folder):
        try:
            lock.acquire()
        except Timeout:
            text = "another program is writing to it; wait until that one has finished, or name another folder"
            raise ArtefactError(str(folder), text) from None
        except NotImplementedError:  # a disk without locks
            held = False
    try:
        yield
    finally:
        if held:
            lock.release()
