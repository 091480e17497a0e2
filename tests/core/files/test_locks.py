"""The lock on the folder of a long run: one process at a time holds it, and it ends with that process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import filelock
import pytest
from featurizers.errors import ArtefactError
from featurizers.files import LOCK_NAME, locked

BUSY = "another program is writing to it; wait until that one has finished, or name another folder"

HOLDER = """
    import sys
    from pathlib import Path
    from featurizers.files import locked

    with locked(Path(sys.argv[1])):
        print("locked", flush=True)
        sys.stdin.readline()
"""


def holder(folder: Path) -> subprocess.Popen[str]:
    """Return a process that holds the lock until a line is sent to it or it is killed."""
    command = [sys.executable, "-c", textwrap.dedent(HOLDER), str(folder)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "locked\n"
    return process


@pytest.mark.parametrize("killed", [True, False])
def test_another_process_is_refused_until_the_first_one_ends(tmp_path: Path, killed: bool) -> None:
    folder = tmp_path / "run"
    process = holder(folder)
    with pytest.raises(ArtefactError, match=BUSY), locked(folder):
        pass
    with pytest.raises(filelock.Timeout):
        filelock.FileLock(folder / LOCK_NAME, timeout=0).acquire()
    if killed:
        process.kill()
    process.communicate(None if killed else "\n")
    assert process.returncode == (-signal.SIGKILL if killed else 0)
    with locked(folder):
        assert [path.name for path in folder.iterdir()] == [LOCK_NAME]


def test_another_thread_is_refused_and_a_lock_is_released_in_any_thread(tmp_path: Path) -> None:
    context = locked(tmp_path)
    context.__enter__()
    with pytest.raises(ArtefactError, match=BUSY), locked(tmp_path):
        pass
    thread = threading.Thread(target=context.__exit__, args=(None, None, None))
    thread.start()
    thread.join()
    with locked(tmp_path):
        pass


def test_a_disk_without_locks_keeps_nobody_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def acquire(_: filelock.BaseFileLock) -> None:
        raise NotImplementedError

    monkeypatch.setattr(filelock.FileLock, "acquire", acquire)
    with locked(tmp_path), locked(tmp_path):
        pass


def test_a_failing_block_releases_the_lock(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="mine"), locked(tmp_path):
        raise RuntimeError("mine")
    with locked(tmp_path):
        pass


@pytest.mark.parametrize("kind", ["link", "dangling link", "pipe", "folder"])
def test_what_is_no_regular_file_is_neither_locked_nor_changed(tmp_path: Path, kind: str) -> None:
    secret, path = tmp_path / "secret", tmp_path / "run" / LOCK_NAME
    path.parent.mkdir()
    if kind == "link":
        secret.write_text("mine")
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(secret)
    with pytest.raises(ArtefactError, match="no regular file, so it cannot be locked; delete it"), locked(path.parent):
        pass
    assert [each.read_text() for each in tmp_path.glob("secret")] == (["mine"] if kind == "link" else [])


def test_a_folder_that_cannot_be_written_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtefactError, match="cannot be written"), locked(tmp_path / "file" / "run"):
        pass
