"""Replace a folder atomically: after a crash at any point, the old or the new version is intact.

A saver locks the target folder and makes a new one beside it, named ``.NAME.`` and 32 hex digits. It hard-links the
files that it does not write into the new folder, writes the others, flushes all of them to the disk, and swaps the two
paths: in one system call, or by two renames where there is no such call. It then moves files that another program
changed in the old folder meanwhile to the new one, and deletes the old one. The next saver deletes what a killed saver
left behind; `recover` undoes the first of two renames.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import stat
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from featurizers.errors import ArtefactError, FeaturizerError, one_line
from featurizers.files.regular import MAX_LEVELS

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

TRIES: Final = 100
"""Attempts to lock or to rename a folder while other programs replace it."""
PATIENCE: Final = 600.0
"""Seconds to wait for another program that saves to the same folder."""
LEFTOVER: Final = re.compile(r"[0-9a-f]{32}(\.old)?")
"""End of the name of a folder that a saver has made or moved away, after a dot, the folder's name and a dot."""

Rewritten = Callable[[str], bool]
"""Returns True for a file that the save writes itself, named relative to the folder with ``/``; all others are kept."""
FileId = tuple[int, int]
"""Device and inode."""


@contextmanager
def replacing(target: Path, rewritten: Rewritten, check: Callable[[Path], None]) -> Iterator[Path]:
    """Yield a new folder, which replaces ``target`` if the block succeeds and is removed if it raises.

    The files that the block does not write are kept. Savers of one folder wait for each other.

    Args:
        target: the folder to write or to replace, with symbolic links resolved.
        rewritten: whether the block writes a file itself, in which case the old one is not kept.
        check: raises an exception if the present folder may not be replaced; called while the folder is locked.

    Raises:
        ArtefactError: the folder or its parent cannot be written.
    """
    with os_errors(target):
        if os.path.ismount(target):
            raise ArtefactError(str(target), "it is the root of a disk, which cannot be replaced; name a folder in it")
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target) as (created, has_locks):
            new = target.parent / f".{target.name}.{uuid.uuid4().hex}"
            new_lock = None
            try:
                check(target)
                if has_locks:  # so no saver is at work, and what is left was left by killed ones
                    for leftover in _leftovers(target):
                        shutil.rmtree(leftover, ignore_errors=True)
                new.mkdir()
                new_lock = _lock(new)  # the next saver locks this folder, and must wait until the old one is deleted
                shutil.copymode(target, new)
                kept = _keep(target, new, rewritten)
                yield new
                _flush(new)
                _exchange(new, target)
                _salvage(new, target, rewritten, kept)
                with suppress(OSError, ValueError):  # the current folder is not in it
                    os.chdir(target / Path.cwd().relative_to(new))
            finally:
                shutil.rmtree(new, ignore_errors=True)
                if created:
                    with suppress(OSError):  # it is not empty, as after a successful save
                        target.rmdir()
                _release(new_lock)


@contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """Yield a new path beside a file, which takes the file's place when the block ends well.

    Raises:
        ArtefactError: the system refuses.
    """
    if not path.name or "\0" in str(path):
        raise ArtefactError(str(path), "it is not the path of a file")
    new = path.with_name(f".{path.name[:100]}.{uuid.uuid4().hex}")
    try:
        yield new
        with open(new, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(new, path)
    except OSError as error:
        raise ArtefactError(str(path), f"it cannot be written: {one_line(error.strerror or error)}") from error
    finally:
        with suppress(OSError):
            new.unlink(missing_ok=True)


@contextmanager
def filling(folder: str | Path) -> Iterator[Path]:
    """Yield a new folder as `replacing` does, for a target that is empty or does not exist.

    Raises:
        ArtefactError: the target is not empty, or cannot be written.
    """
    with replacing(resolved(folder), lambda _: False, refuse_full) as new:
        yield new


def refuse_full(folder: Path) -> None:
    """Raise an `ArtefactError` unless the folder is empty or does not exist, and can be made where it is to be."""
    with os_errors(folder):
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ArtefactError(str(folder), "it is there already; choose a new or an empty folder")
    refuse_unwritable(folder, folder.absolute().parent)


def refuse_unwritable(path: Path, folder: Path) -> None:
    """Raise an `ArtefactError` if this user may not write to a folder; if it does not exist, to the one to make it in.

    Args:
        path: named in the error: what is to be written.
        folder: where it is to be written.
    """
    with os_errors(path):
        there = next(above for above in (folder, *folder.absolute().parents) if above.exists())
        if not there.is_dir():
            raise ArtefactError(str(path), f"it cannot be written: {str(there)!r} is no folder")
        if not os.access(there, os.W_OK | os.X_OK):
            raise ArtefactError(str(path), f"it cannot be written: this user may not write to {str(there)!r}")


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """Yield a new folder, which is removed afterwards.

    Raises:
        ArtefactError: it cannot be made.
    """
    try:
        folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    except OSError as error:
        problem = f"it cannot be made: {one_line(error)}; set TMPDIR to a folder that can be written"
        raise ArtefactError("temporary folder", problem) from error
    with folder as name:
        yield Path(name)


def resolved(folder: str | Path) -> Path:
    """Return the absolute path of a folder with ``~``, links and dots resolved.

    Raises:
        ArtefactError: no folder can have this name.
    """
    try:
        return Path(folder).expanduser().resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise ArtefactError(str(folder), f"it is not the name of a folder: {one_line(error)}") from error


@contextmanager
def os_errors(target: Path) -> Iterator[None]:
    """Turn an OSError into an ArtefactError."""
    try:
        yield
    except FeaturizerError:
        raise
    except (OSError, shutil.Error) as error:
        reason = (isinstance(error, OSError) and error.strerror) or error
        raise ArtefactError(str(target), f"it cannot be written: {one_line(reason)}") from error


@contextmanager
def _locked(target: Path) -> Iterator[tuple[bool, bool]]:
    """Lock the folder against other savers; create it first if it does not exist.

    The lock is on the folder itself, so that no lock file stays behind.

    Yields:
        True if the folder was created here, and True if it is locked (some file systems have no locks).
    """
    for _ in range(TRIES):
        recover(target)
        try:
            target.mkdir()
            created = True
        except FileExistsError:
            created = False
            with suppress(FileNotFoundError):  # moved away at this moment
                if not stat.S_ISDIR(target.lstat().st_mode):
                    raise ArtefactError(str(target), "it is a file; choose a new or an empty folder") from None
        lock = None
        with suppress(FileNotFoundError):  # moved away at this moment
            lock = _lock(target)
            # In this order: a saver that renames twice moves the target away before another folder takes its name.
            if lock is None or (not _moved_away(target) and os.path.samestat(os.fstat(lock), target.stat())):
                break
        _release(lock)
    else:
        raise ArtefactError(str(target), "other programs keep replacing it; try again when they have finished")
    try:
        yield created, lock is not None
    finally:
        _release(lock)


def _lock(folder: Path) -> int | None:
    """Wait for the lock of a folder and return a descriptor that holds it, or None where there are no locks."""
    if fcntl is None:
        return None
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                os.close(descriptor)
                raise ArtefactError(
                    str(folder), f"another program has been saving to it for {PATIENCE:.0f} seconds; end that one first"
                ) from None
            time.sleep(0.01)
        except OSError:
            os.close(descriptor)
            return None
        else:
            return descriptor


def _release(lock: int | None) -> None:
    """Unlock and close. Closing alone is not enough: a child process may have inherited the descriptor."""
    if lock is not None:
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_UN)
        os.close(lock)


def _keep(old: Path, new: Path, rewritten: Rewritten) -> dict[str, FileId | None]:
    """Hard-link the files that the save does not write into the new folder; copy those that cannot be linked.

    Returns:
        The identity of each file at that time, by name.
    """
    kept = {}
    for name in _others(old, rewritten):
        source, copy = old / name, new / name
        if source.is_dir() and not source.is_symlink():
            copy.mkdir()
            with suppress(FileNotFoundError):
                shutil.copystat(source, copy)
            continue
        try:
            os.link(source, copy, follow_symlinks=False)
        except (OSError, NotImplementedError):  # a file system without links, or another user's file
            if not os.path.lexists(source):
                continue  # deleted at this moment
            shutil.copy2(source, copy, follow_symlinks=False)
        kept[name] = _file_id(copy)
    return kept


def _salvage(old: Path, new: Path, rewritten: Rewritten, kept: Mapping[str, FileId | None]) -> None:
    """Move the files that were added or changed in the old folder after `_keep` into the new one.

    A file that was changed in the new folder since the exchange is the latest version, and stays.
    """
    for name in _others(old, rewritten):
        source, destination = old / name, new / name
        if source.is_dir() and not source.is_symlink():
            destination.mkdir(exist_ok=True)
        elif _file_id(source) != _file_id(destination) == kept.get(name):
            with suppress(FileNotFoundError):  # deleted at this moment
                os.replace(source, destination)


def _others(folder: Path, rewritten: Rewritten) -> Iterator[str]:
    """Yield the names of the folders in a folder and of the files that the save does not write, parents first."""
    pending = [folder]
    while pending:
        try:
            entries = sorted(os.scandir(pending.pop()), key=lambda entry: entry.name)
        except FileNotFoundError:
            continue  # deleted at this moment
        for entry in entries:
            name = Path(entry.path).relative_to(folder).as_posix()
            if name.count("/") > MAX_LEVELS:  # deeper folders could be kept but not deleted
                raise ArtefactError(str(folder), f"the folders in it lie more than {MAX_LEVELS} deep; move them away")
            if entry.is_dir(follow_symlinks=False):
                pending.append(Path(entry.path))
                yield name
            elif not rewritten(name):
                yield name


def _file_id(path: Path) -> FileId | None:
    with suppress(FileNotFoundError, NotADirectoryError):
        info = path.lstat()
        return info.st_dev, info.st_ino
    return None


def _flush(folder: Path) -> None:
    """Write the files of a folder to the disk, so that a power cut does not leave empty ones."""
    for parent, _, names in os.walk(folder):
        for path in (os.path.join(parent, name) for name in names):
            if os.path.isfile(path):
                _sync(path)
        _sync(parent)


def _sync(path: str) -> None:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:  # another user's file, which was not written here, or a folder on Windows
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchange(new: Path, target: Path) -> None:
    """Swap the paths of two folders: in one step where the system can, else by two renames."""
    if _swap(new, target):
        _sync(str(target.parent))
        return
    old = target.parent / f"{new.name}.old"
    for _ in range(TRIES):
        target.rename(old)
        try:
            new.rename(target)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST) and not old.exists():
                continue  # another program has moved the old folder back, see `recover`
            if not target.exists():
                old.rename(target)
            raise
        with suppress(FileNotFoundError):  # another program had moved back an empty folder, which was replaced
            old.rename(new)
        return
    raise ArtefactError(str(target), "other programs keep changing it; try again when they have finished")


def _swap(a: Path, b: Path) -> bool:
    """Swap two paths by libc's atomic call; return False if the platform or the file system has none.

    Raises:
        OSError: the call failed.
    """
    try:
        libc: Any = ctypes.CDLL(None, use_errno=True)
        if sys.platform == "darwin":
            failed = libc.renamex_np(os.fsencode(a), os.fsencode(b), 2)  # RENAME_SWAP
        else:
            failed = libc.renameat2(-100, os.fsencode(a), -100, os.fsencode(b), 2)  # AT_FDCWD, RENAME_EXCHANGE
    except (OSError, AttributeError, TypeError):  # Windows, or a C library that lacks the call
        return False
    if not failed:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code), str(b))


def recover(target: Path) -> None:
    """Move the old folder back if a saver was killed between its two renames."""
    with suppress(OSError):  # no parent folder or no permission; the caller will report that the target is missing
        if moved := _moved_away(target):
            max(moved, key=lambda path: path.stat().st_mtime).rename(target)


def _moved_away(target: Path) -> list[Path]:
    """Return the folders that savers have moved away in the first of two renames, if the second has not happened.

    The target is then missing, or is an empty folder that another program made at that moment.
    """
    with suppress(FileNotFoundError):
        if any(target.iterdir()):
            return []
    return [path for path in _leftovers(target) if path.name.endswith(".old")]


def _leftovers(target: Path) -> list[Path]:
    """Return the folders beside the target that savers have made or moved away."""
    start = f".{target.name}."
    with os.scandir(target.parent) as entries:
        names = [(entry.name, entry.path) for entry in entries]
    return [Path(path) for name, path in names if name.startswith(start) and LEFTOVER.fullmatch(name, len(start))]
