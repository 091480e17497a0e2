"""A folder is replaced as a whole: whoever is killed, the old one or the new one stands there, and nothing is lost."""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import re
import shutil
import stat
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from featurizers.errors import ArtefactError, FeaturizerError, one_line
from featurizers.files.regular import MAX_LEVELS

TRIES: Final = 100
"""How often a rename is tried that others hinder, and how often a lock is taken that turns out to be an old one."""
PATIENCE: Final = 600.0
"""Seconds that a saver waits for another one."""

Ours = Callable[[str], bool]
"""Whether a file, named from the folder with ``/``, is written anew; every other one is kept."""
Identity = tuple[int, int]
"""Which file it is, whatever its name: the disk and the inode."""


@contextmanager
def replacing(target: Path, ours: Ours, check: Callable[[Path], None]) -> Iterator[Path]:
    """A new folder that takes the place of ``target`` when the block ends well, and is removed when it does not.

    Files that are not ours are in the new folder too, as the same files. Savers of one folder wait for each other.

    Args:
        target: the folder to write or to replace, without links on its way.
        ours: says of a file whether the block writes it; the old one is then not kept.
        check: raises if the folder that is there may not be replaced; called while no other saver is at work.

    Raises:
        ArtefactError: the folder, or the one above it, cannot be written.
    """
    with os_errors(target):
        if os.path.ismount(target):
            raise ArtefactError(str(target), "it is the root of a disk, which cannot be replaced; name a folder in it")
        target.parent.mkdir(parents=True, exist_ok=True)
    with _locked(target) as (made, alone):
        new = target.parent / f".{target.name}.{uuid.uuid4().hex}"
        held = None
        try:
            with os_errors(target):
                check(target)
                if alone:
                    _clear(target)
                new.mkdir()
                held = _lock(new)  # the next saver finds this folder, and must wait until the old one is dealt with
                shutil.copymode(target, new)
                kept = keep(target, new, ours)
                yield new
                _flush(new)
                _exchange(new, target)
                _salvage(new, target, ours, kept)
                _follow(new, target)
        finally:
            shutil.rmtree(new, ignore_errors=True)
            if made:
                _drop_empty(target)
            _release(held)


@contextmanager
def filling(folder: str | Path) -> Iterator[Path]:
    """As `replacing`, of a folder that must be new or empty.

    Raises:
        ArtefactError: it holds something, or cannot be written.
    """

    with replacing(resolved(folder), lambda _: False, refuse_full) as new:
        yield new


def refuse_full(folder: Path) -> None:
    """Raise `ArtefactError` unless a folder is empty or not there at all."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ArtefactError(str(folder), "it is there already; choose a new or an empty folder")


def resolved(folder: str | Path) -> Path:
    """The folder itself, behind links and dots, because it is replaced as a whole.

    Raises:
        ArtefactError: no folder can have this name.
    """
    try:
        return Path(folder).expanduser().resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise ArtefactError(str(folder), f"it is not the name of a folder: {one_line(error)}") from error


@contextmanager
def os_errors(target: Path) -> Iterator[None]:
    """What the system refuses, as an error of ours."""
    try:
        yield
    except FeaturizerError:
        raise
    except (OSError, shutil.Error) as error:
        reason = (isinstance(error, OSError) and error.strerror) or error
        raise ArtefactError(str(target), f"it cannot be written: {one_line(reason)}") from error


@contextmanager
def _locked(target: Path) -> Iterator[tuple[bool, bool]]:
    """Hold the folder against other savers, which would throw away what this one keeps; it is made if it is not there.

    It is the folder itself that is locked, so that no file of a lock stays behind.

    Yields:
        Whether it was made here, and whether there can be no other saver: some disks know no locks.
    """
    made, descriptor = False, None
    with os_errors(target):
        for _ in range(TRIES):
            recover(target)
            try:
                target.mkdir()
                made = True
            except FileExistsError:
                made = False
                if _is_file(target):
                    raise ArtefactError(str(target), "it is a file; choose a new or an empty folder") from None
            descriptor = _lock(target)
            if descriptor is None:
                break
            if not _between(target) and _stands(descriptor, target):  # in this order
                break
            _release(descriptor)  # another saver has replaced it meanwhile, or is about to
        else:
            raise ArtefactError(str(target), "other programs keep replacing it; try again when they have finished")
    try:
        yield made, descriptor is not None
    finally:
        _release(descriptor)


def _between(target: Path) -> list[Path]:
    """The folder that a saver at work, or killed, has taken away in the first of the two steps of its exchange.

    None, once the second step has put another in its place; a third program may have made an empty one meanwhile.
    """
    with suppress(FileNotFoundError):
        if any(target.iterdir()):
            return []
    return _leftovers(target, r"\.old")


def _lock(folder: Path) -> int | None:
    """A descriptor that holds the lock of a folder, once nobody else does; None where there are no locks."""
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:  # replaced in this moment, or made and taken away
        return os.open(folder.parent, os.O_RDONLY)  # which does not stand for the folder
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


def _release(descriptor: int | None) -> None:
    """Give a lock back, even if a process that was forked meanwhile has the descriptor too."""
    if descriptor is not None:
        import fcntl

        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def _is_file(path: Path) -> bool:
    """Whether there is anything but a folder."""
    try:
        return not stat.S_ISDIR(path.lstat().st_mode)
    except FileNotFoundError:
        return False


def _stands(descriptor: int, folder: Path) -> bool:
    """Whether a path still leads to the folder that was opened."""
    try:
        return os.path.samestat(os.fstat(descriptor), folder.stat())
    except FileNotFoundError:
        return False


def keep(old: Path, new: Path, ours: Ours) -> dict[str, Identity | None]:
    """Put the files of a folder that are not ours into a new one: the same files, copies where that cannot be.

    Returns:
        Which file then has each name.
    """
    kept = {}
    for name in _others(old, ours):
        source, copy = old / name, new / name
        if source.is_dir() and not source.is_symlink():
            copy.mkdir()
            with suppress(FileNotFoundError):
                shutil.copystat(source, copy)
            continue
        try:
            os.link(source, copy, follow_symlinks=False)
        except (OSError, NotImplementedError):  # a disk without links, or someone else's file
            if not os.path.lexists(source):
                continue  # taken away in this moment
            shutil.copy2(source, copy, follow_symlinks=False)
        kept[name] = _identity(copy)
    return kept


def _identity(path: Path) -> Identity | None:
    try:
        found = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found.st_dev, found.st_ino


def _others(folder: Path, ours: Ours) -> Iterator[str]:
    """What is in a folder and not ours, parents first, named from there with ``/``."""
    pending = [folder]
    while pending:
        try:
            entries = sorted(os.scandir(pending.pop()), key=lambda entry: entry.name)
        except FileNotFoundError:
            continue  # taken away in this moment
        for entry in entries:
            name = Path(entry.path).relative_to(folder).as_posix()
            if name.count("/") > MAX_LEVELS:  # more could be kept, and not be removed again
                raise ArtefactError(str(folder), f"the folders in it lie more than {MAX_LEVELS} deep; move them away")
            if entry.is_dir(follow_symlinks=False):
                pending.append(Path(entry.path))
                yield name
            elif not ours(name):
                yield name


def _salvage(old: Path, new: Path, ours: Ours, kept: Mapping[str, Identity | None]) -> None:
    """Move what was put into the old folder, or changed there, after its files were kept.

    What was changed in the new folder since it took its place is later still, and stays.
    """
    for name in _others(old, ours):
        source, place = old / name, new / name
        if source.is_dir() and not source.is_symlink():
            place.mkdir(exist_ok=True)
        elif _identity(source) != _identity(place) == kept.get(name):
            with suppress(FileNotFoundError):  # taken away in this moment
                os.replace(source, place)


def _follow(old: Path, new: Path) -> None:
    """Let this program stay in the folder that it is in, whose files are at home in another one now."""
    with suppress(OSError, ValueError):  # it is somewhere else
        os.chdir(new / Path.cwd().relative_to(old))


def _flush(folder: Path) -> None:
    """Wait until the files of a folder are on the disk, so that a power cut does not leave empty ones."""
    for place, _, names in os.walk(folder):
        for name in (*names, "."):
            path = os.path.join(place, name)
            if os.path.isfile(path) or name == ".":
                _sync(path)


def _sync(path: str) -> None:
    if os.path.isdir(path) and os.name == "nt":
        return
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:  # someone else's, and not written here
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchange(new: Path, target: Path) -> None:
    """Let two folders take each other's names, in one step where the system can, else in two."""
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
                continue  # a loader has brought the old one back, see `recover`
            if not target.exists():
                old.rename(target)
            raise
        with suppress(FileNotFoundError):  # a loader has brought back an empty one, which is gone now
            old.rename(new)
        return
    raise ArtefactError(str(target), "other programs keep changing it; try again when they have finished")


@functools.cache
def _system_call() -> Callable[[bytes, bytes], int] | None:
    """The call of this system's that exchanges two names, None if there is none."""
    try:
        library: Any = ctypes.CDLL(None, use_errno=True)
        if sys.platform == "darwin":
            return lambda a, b: library.renamex_np(a, b, 2)  # RENAME_SWAP
        library.renameat2  # noqa: B018  # an attribute of the C library, absent from old ones
        return lambda a, b: library.renameat2(-100, a, -100, b, 2)  # AT_FDCWD, RENAME_EXCHANGE
    except (OSError, AttributeError, TypeError):
        return None


def _swap(a: Path, b: Path) -> bool:
    """Whether two folders were exchanged in one step; False if this system or this disk does not know how.

    Raises:
        OSError: it knows how, and refuses.
    """
    call = _system_call()
    if call is None:
        return False
    if call(os.fsencode(a), os.fsencode(b)) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code), str(b))


def _clear(target: Path) -> None:
    """Remove what savers of this folder left that were killed; there is no other at work."""
    for leftover in _leftovers(target):
        shutil.rmtree(leftover, ignore_errors=True)


def _leftovers(target: Path, end: str = r"(\.old)?") -> list[Path]:
    pattern = re.compile(re.escape(f".{target.name}.") + "[0-9a-f]{32}" + end)
    with os.scandir(target.parent) as entries:
        return [Path(entry.path) for entry in entries if pattern.fullmatch(entry.name)]


def recover(target: Path) -> None:
    """Bring back the folder of a saver that was killed between the two steps of an exchange."""
    try:
        if old := _between(target):
            max(old, key=lambda path: path.stat().st_mtime).rename(target)
    except OSError:
        return  # there is no such folder above, or it is not ours: whoever asked finds nothing, and says so


def _drop_empty(target: Path) -> None:
    """Take away the folder that was made here, unless the new one or anything else is in its place."""
    try:
        target.rmdir()
    except OSError:
        return
