"""Folders are replaced atomically: old or new, never a mixture; other files stay; savers wait for each other."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import featurizers
import pytest
from featurizers.errors import ArtefactError
from featurizers.files import replacement
from featurizers.format import weights

from tests.core.store.test_artefact import contents, same
from tests.support import faults
from tests.support.hub import subspace

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs POSIX locks and links")
HEX = "0123456789abcdef" * 2


@pytest.fixture
def folder(tmp_path):
    """Save an artefact of seed 1 in a folder of its own."""
    return subspace(seed=1).save_pretrained(tmp_path / "place" / "a")


@pytest.fixture
def _in_two_steps(monkeypatch):
    monkeypatch.setattr(replacement, "_swap", lambda *_: False)


@pytest.fixture(scope="module")
def nursery():
    with faults.Nursery() as nursery:
        yield nursery


@pytest.fixture
def meanwhile(monkeypatch):
    """Run a function in the middle of each save, after other files were kept."""

    def then(act):
        write = weights.write_tensors

        def acted(*args: object) -> str:
            act()
            return write(*args)

        monkeypatch.setattr(weights, "write_tensors", acted)

    return then


@pytest.fixture
def after_the_exchange(monkeypatch):
    """Run a function after the exchange, before the old folder is searched for changes."""

    def then(act):
        exchange = replacement._exchange

        def acted(*args: object) -> None:
            exchange(*args)
            act()

        monkeypatch.setattr(replacement, "_exchange", acted)

    return then


def alone(folder: Path) -> None:
    """Check that nothing is left beside a folder."""
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def edit(path: Path, text: str) -> None:
    """Write a file as careful editors do: under another name, then renamed."""
    path.with_name("new").write_text(text)
    path.with_name("new").replace(path)


# ---------------------------------------------------------------------- in one step, and in two


def test_the_exchange_is_one_step_here(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "file").touch()
    if not replacement._swap(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this disk cannot exchange two names")
    assert contents(tmp_path).keys() == {"b/file"}


@pytest.mark.usefixtures("_in_two_steps")
def test_in_two_steps(folder):
    (folder / "notes.txt").write_text("mine")
    subspace(seed=2).save_pretrained(folder)
    same(subspace(seed=2), featurizers.load(folder, verify=True))
    assert (folder / "notes.txt").read_text() == "mine"
    alone(folder)


@pytest.mark.parametrize("find", ["load", "save"])
def test_a_saver_that_was_killed_between_the_two_steps(folder, find):
    (folder / "notes.txt").write_text("mine")
    folder.rename(folder.parent / f".a.{HEX}.old")
    subspace(seed=2).save_pretrained(folder.parent / f".a.{HEX}")
    if find == "load":
        same(subspace(seed=1), featurizers.load(folder, verify=True))
        assert (folder / "notes.txt").read_text() == "mine"
    subspace(seed=3).save_pretrained(folder)
    same(subspace(seed=3), featurizers.load(folder, verify=True))
    assert (folder / "notes.txt").read_text() == "mine"
    alone(folder)


@pytest.mark.usefixtures("_in_two_steps")
@pytest.mark.parametrize("old", [True, False], ids=["over an old one", "anew"])
def test_a_loader_that_comes_between_the_two_steps(tmp_path, monkeypatch, old):
    folder = tmp_path / "place" / "a"
    if old:
        subspace(seed=1).save_pretrained(folder)
        (folder / "notes.txt").write_text("mine")
    rename, disturbed = Path.rename, []

    def renamed(self: Path, to: Path) -> Path:
        result = rename(self, to)
        if to.suffix == ".old" and not disturbed:
            disturbed.append(to)
            replacement.recover(folder)  # as `load` does
            assert folder.exists()
        return result

    monkeypatch.setattr(Path, "rename", renamed)
    subspace(seed=2).save_pretrained(folder)
    assert disturbed
    same(subspace(seed=2), featurizers.load(folder, verify=True))
    assert (folder / "notes.txt").exists() is old
    alone(folder)


@pytest.mark.usefixtures("_in_two_steps")
@pytest.mark.parametrize("a_third", [False, True], ids=["alone", "after a third one that made the folder"])
def test_a_saver_that_comes_between_the_two_steps(folder, monkeypatch, a_third):
    """It must not take the place for free, nor remove what the first saver needs."""
    (folder / "notes.txt").write_text("mine")
    rename, recover, threads, errors, came = Path.rename, replacement.recover, [], [], threading.Event()

    def save() -> None:
        try:
            subspace(seed=3).save_pretrained(folder)
        except BaseException as error:
            errors.append(error)
            raise

    def late(target: Path) -> None:
        if threading.current_thread() in threads and not came.is_set():
            came.set()  # it looked for a killed saver's folder just before the first step
        else:
            recover(target)

    def renamed(self: Path, to: Path) -> Path:
        result = rename(self, to)
        if to.suffix == ".old" and not threads:
            threads.append(threading.Thread(target=save))
            if a_third:
                folder.mkdir()
            threads[0].start()
            came.wait(30)
            threads[0].join(0.3)  # it should wait; otherwise it is done by now
        return result

    monkeypatch.setattr(replacement, "recover", late)
    monkeypatch.setattr(Path, "rename", renamed)
    subspace(seed=2).save_pretrained(folder)
    threads[0].join(60)
    assert not errors
    same(subspace(seed=3), featurizers.load(folder, verify=True))
    assert (folder / "notes.txt").read_text() == "mine"
    alone(folder)


def test_a_load_that_begins_between_the_two_steps(folder, monkeypatch):
    """A folder that lacks config.json for a moment is not taken for another library's."""
    iterdir, moved = Path.iterdir, folder.parent / f".a.{HEX}.old"

    def listed(self: Path):
        found = [*iterdir(self)]
        if self == folder and not moved.exists():
            folder.rename(moved)
        return iter(found)

    monkeypatch.setattr(Path, "iterdir", listed)
    same(subspace(seed=1), featurizers.load(folder, verify=True))


# ---------------------------------------------------------------------- other files


def test_files_are_kept_as_the_same_files(folder, monkeypatch):
    monkeypatch.chdir(folder)
    Path("notes.txt").write_text("mine")
    Path("deep/er").mkdir(parents=True)
    Path("deep/er/notes.txt").write_text("mine too")
    Path("deep/config.json").write_text("{}")  # not an artefact's: those are at the root
    Path("empty/in/it").mkdir(parents=True)
    Path("link").symlink_to("deep/er/notes.txt")
    Path("dangling").symlink_to("nowhere")
    Path("folder link").symlink_to("deep")
    os.mkfifo("pipe")
    os.chmod("deep", 0o700)
    os.chmod("notes.txt", 0o640)
    names = {path for path in folder.rglob("*") if path.name not in ("model.safetensors", "README.md")}
    names.remove(folder / "config.json")
    before = {path: path.lstat() for path in names}
    subspace(seed=2).save_pretrained(folder)
    for path, old in before.items():
        new = path.lstat()
        assert new.st_mode == old.st_mode, path
        assert stat.S_ISDIR(old.st_mode) or new.st_ino == old.st_ino, path
    assert {*folder.rglob("*")} == names | {folder / name for name in faults.ARTEFACT_FILES}
    assert os.readlink(folder / "link") == "deep/er/notes.txt"
    alone(folder)


@pytest.mark.parametrize("links", ["none", "after the first"])
def test_files_are_copied_where_links_cannot_be(folder, monkeypatch, links):
    for number in range(3):
        (folder / f"{number}.txt").write_text(f"mine {number}")
        os.utime(folder / f"{number}.txt", (1e9, 1e9))
    (folder / "dangling").symlink_to("nowhere")
    link, left = os.link, [1] * (links != "none")

    def refused(*args: object, **options: object) -> None:
        if not left:
            raise PermissionError
        left.pop()
        link(*args, **options)

    monkeypatch.setattr(os, "link", refused)
    subspace(seed=2).save_pretrained(folder)
    for number in range(3):
        assert (folder / f"{number}.txt").read_text() == f"mine {number}"
        assert (folder / f"{number}.txt").stat().st_mtime == 1e9
    assert os.readlink(folder / "dangling") == "nowhere"
    alone(folder)


def test_the_readme_is_another_file(folder):
    """A hard link to the old one elsewhere does not change."""
    readme = folder / "README.md"
    text = readme.read_text() + "\nmine\n"
    readme.write_text(text)
    os.link(readme, folder.parent.parent / "linked")
    f = subspace(seed=2)
    f.id = "renamed"
    f.save_pretrained(folder)
    assert (folder.parent.parent / "linked").read_text() == text
    assert "# renamed" in readme.read_text()
    assert readme.read_text().endswith("\nmine\n")


def test_the_files_of_a_failing_save_stay_as_they_were(folder, monkeypatch):
    """A save that fails after it wrote the card has not written into the old README."""
    (folder / "notes.txt").write_text("mine")
    before = contents(folder)
    monkeypatch.setattr(replacement, "_flush", lambda _: 1 / 0)
    f = subspace(seed=2)
    f.id = "renamed"
    with pytest.raises(ZeroDivisionError):
        f.save_pretrained(folder)
    assert contents(folder) == before
    alone(folder)


@pytest.mark.parametrize("name", ["notes2.txt", "deep/notes2.txt", "new/deep/notes2.txt"])
def test_a_file_that_is_added_while_a_save_runs(folder, meanwhile, name):
    (folder / "deep").mkdir()

    def act() -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("mine")

    meanwhile(act)
    subspace(seed=2).save_pretrained(folder)
    assert (folder / name).read_text() == "mine"
    same(subspace(seed=2), featurizers.load(folder, verify=True))
    alone(folder)


def test_a_file_that_is_edited_while_a_save_runs(folder, meanwhile):
    (folder / "replaced.txt").write_text("old")
    (folder / "written.txt").write_text("old")

    def act() -> None:
        edit(folder / "replaced.txt", "new")
        (folder / "written.txt").write_text("new")

    meanwhile(act)
    subspace(seed=2).save_pretrained(folder)
    assert (folder / "replaced.txt").read_text() == "new"
    assert (folder / "written.txt").read_text() == "new"


def test_a_file_that_is_changed_in_the_new_folder_at_once(folder, meanwhile, after_the_exchange):
    """A change in the new folder is later than any in the old one, and stays."""
    for name in ("edited", "taken away", "edited twice", "linked"):
        (folder / name).write_text("old")
    meanwhile(lambda: edit(folder / "edited twice", "first"))

    def act() -> None:
        edit(folder / "edited", "new")
        (folder / "taken away").unlink()
        edit(folder / "edited twice", "second")

    after_the_exchange(act)
    subspace(seed=2).save_pretrained(folder)
    assert (folder / "edited").read_text() == "new"
    assert not (folder / "taken away").exists()
    assert (folder / "edited twice").read_text() == "second"
    assert (folder / "linked").read_text() == "old"


@pytest.mark.parametrize("what", ["file", "folder"])
def test_a_file_that_is_taken_away_while_it_is_kept(folder, monkeypatch, what):
    """Programs that write a file under another name and rename it have files that exist for a moment."""
    (folder / "deep").mkdir()
    (folder / "deep" / "new").write_text("for a moment")
    (folder / "notes.txt").write_text("mine")
    others = replacement._others

    def seen(place: Path, rewritten: replacement.Rewritten):
        for name in others(place, rewritten):
            if name == ("deep/new" if what == "file" else "deep") and place == folder:
                (folder / "deep" / "new").unlink(missing_ok=True)
                if what == "folder" and (folder / "deep").exists():
                    (folder / "deep").rmdir()
            yield name

    monkeypatch.setattr(replacement, "_others", seen)
    subspace(seed=2).save_pretrained(folder)
    assert (folder / "notes.txt").read_text() == "mine"
    assert not (folder / "deep" / "new").exists()
    same(subspace(seed=2), featurizers.load(folder, verify=True))
    alone(folder)


def test_what_killed_savers_left_is_removed_and_nothing_else(folder):
    place = folder.parent
    gone = [f".a.{HEX}", f".a.{HEX[::-1]}.old"]
    kept = [f".a.{HEX[1:]}", f".a.{HEX}0", f".b.{HEX}", f"a.{HEX}", f".a.{HEX.upper()}", ".a.old", f".aa.{HEX}", ".a"]
    for name in (*gone, *kept):
        (place / name).mkdir()
        (place / name / "file").touch()
    (place / f".axb.{HEX}").mkdir()
    subspace(seed=2).save_pretrained(place / "a.b")  # the dot is no wildcard
    assert (place / f".axb.{HEX}").exists()
    subspace(seed=2).save_pretrained(folder)
    assert {path.name for path in place.iterdir()} == {"a", "a.b", f".axb.{HEX}", *kept}


@pytest.mark.parametrize("mode", [0o2775, 0o700, 0o1777, 0o711])
def test_the_mode_of_the_folder_is_kept(folder, mode):
    folder.chmod(mode)
    before = os.umask(0o077)
    try:
        subspace(seed=2).save_pretrained(folder)
    finally:
        os.umask(before)
    assert stat.S_IMODE(folder.stat().st_mode) == mode
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}


# ---------------------------------------------------------------------- places where no folder can be


def test_a_disk_is_not_replaced():
    if not os.path.ismount("/proc"):
        pytest.skip("there is none")
    with pytest.raises(ArtefactError, match=r"^/proc: it is the root of a disk"):
        subspace().save_pretrained("/proc")


@pytest.mark.parametrize("below", ["", "b", "b/c"])
def test_a_file_is_in_the_way(tmp_path, below):
    (tmp_path / "a").write_text("mine")
    with pytest.raises(ArtefactError, match=str(tmp_path / "a")):
        subspace().save_pretrained(tmp_path / "a" / below)
    assert (tmp_path / "a").read_text() == "mine"
    alone(tmp_path / "a")


def test_a_pipe_is_in_the_way(tmp_path):
    os.mkfifo(tmp_path / "a")
    with pytest.raises(ArtefactError, match="it is a file"):
        subspace().save_pretrained(tmp_path / "a")
    alone(tmp_path / "a")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
@pytest.mark.parametrize("old", [True, False])
def test_a_place_where_nothing_may_be_written(folder, old):
    before = contents(folder)
    folder.parent.chmod(0o500)
    try:
        with pytest.raises(ArtefactError, match="Permission denied"):
            subspace(seed=2).save_pretrained(folder if old else folder.parent / "b")
    finally:
        folder.parent.chmod(0o700)
    assert contents(folder) == before
    alone(folder)


# ---------------------------------------------------------------------- several savers


@pytest.fixture
def held():
    """Let another process hold the lock of a folder until the test releases it or ends."""
    processes = []
    code = (
        "import fcntl, os, sys; fd = os.open(sys.argv[1], os.O_RDONLY); fcntl.flock(fd, fcntl.LOCK_EX); print(flush=1)"
    )

    def hold(folder: Path) -> subprocess.Popen:
        command = [sys.executable, "-c", f"{code}; sys.stdin.read()", folder]
        processes.append(process := subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
        process.stdout.readline()
        return process

    yield hold
    for process in processes:
        process.communicate()


def test_a_second_saver_waits(folder, held):
    holder = held(folder)
    waiting = threading.Thread(target=lambda: subspace(seed=2).save_pretrained(folder))
    waiting.start()
    waiting.join(0.3)
    assert waiting.is_alive()
    same(subspace(seed=1), featurizers.load(folder, verify=True))  # readers do not wait
    holder.communicate()
    waiting.join(60)
    assert not waiting.is_alive()
    same(subspace(seed=2), featurizers.load(folder, verify=True))
    alone(folder)


def test_a_saver_that_stopped(folder, held, monkeypatch):
    (folder / "notes.txt").write_text("mine")
    (folder.parent / f".a.{HEX}").mkdir()  # its new folder
    before = contents(folder.parent)
    held(folder)
    monkeypatch.setattr(replacement, "PATIENCE", 0.2)
    with pytest.raises(ArtefactError, match=f"{folder}: another program has been saving to it for 0 seconds"):
        subspace(seed=2).save_pretrained(folder)
    assert contents(folder.parent) == before
    assert {path.name for path in folder.parent.iterdir()} == {"a", f".a.{HEX}"}


def test_two_savers_take_turns(folder, meanwhile):
    """A second saver that starts in the middle of the first must wait for its end."""
    (folder / "notes.txt").write_text("mine")
    order, threads = [], []

    def act() -> None:
        order.append(threading.current_thread().name)
        if len(order) == 1:
            threads.append(threading.Thread(target=lambda: subspace(seed=3).save_pretrained(folder), name="second"))
            threads[0].start()
            threads[0].join(0.3)
            assert len(order) == 1
            order.append("first ends")

    meanwhile(act)
    subspace(seed=2).save_pretrained(folder)
    threads[0].join(60)
    assert order[1:] == ["first ends", "second"]
    same(subspace(seed=3), featurizers.load(folder, verify=True))
    assert (folder / "notes.txt").read_text() == "mine"
    alone(folder)


def test_a_saver_that_comes_right_after_the_exchange(folder, meanwhile, after_the_exchange):
    """It finds the new folder, but must wait until the first saver has moved what is still in the old one."""
    threads = []

    def act() -> None:
        if not threads:
            threads.append(threading.Thread(target=lambda: subspace(seed=3).save_pretrained(folder)))
            threads[0].start()
            threads[0].join(0.3)

    meanwhile(lambda: threads or (folder / "notes2.txt").write_text("mine"))
    after_the_exchange(act)
    subspace(seed=2).save_pretrained(folder)
    threads[0].join(60)
    same(subspace(seed=3), featurizers.load(folder, verify=True))
    assert (folder / "notes2.txt").read_text() == "mine"
    alone(folder)


def test_a_process_that_was_forked_meanwhile_holds_no_lock(folder, meanwhile, monkeypatch):
    monkeypatch.setattr(replacement, "PATIENCE", 10.0)  # so that a failure does not take ten minutes
    children, (reading, writing) = [], os.pipe()

    def act() -> None:
        if not children:
            children.append(child := os.fork())
            if not child:
                os.read(reading, 1)
                os._exit(0)

    meanwhile(act)
    try:
        subspace(seed=2).save_pretrained(folder)
        subspace(seed=3).save_pretrained(folder)  # would wait if the child held the lock
    finally:
        os.write(writing, b"!")
        os.waitpid(children[0], 0)
        os.close(reading)
        os.close(writing)
    same(subspace(seed=3), featurizers.load(folder, verify=True))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc to count descriptors")
def test_no_descriptor_stays_open(folder, held, monkeypatch):
    (folder / "notes.txt").write_text("mine")

    def count() -> int:
        return len(os.listdir("/proc/self/fd"))

    subspace().save_pretrained(folder)
    before = count()
    for seed in range(50):
        subspace(seed=seed).save_pretrained(folder)
    assert count() == before
    holder = held(folder)
    before = count()  # with the pipes to the holder
    monkeypatch.setattr(replacement, "PATIENCE", 0.0)
    for _ in range(3):
        with pytest.raises(ArtefactError, match="another program"):
            subspace().save_pretrained(folder)
    assert holder.poll() is None
    assert count() == before


def test_threads_of_one_program(folder):
    (folder / "notes.txt").write_text("mine")
    errors, seeds = [], list(range(10, 30))

    def work(mine: list[int]) -> None:
        try:
            for seed in mine:
                faults.made(seed).save_pretrained(folder)
        except BaseException as error:
            errors.append(error)
            raise

    threads = [threading.Thread(target=work, args=(seeds[number::4],)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not errors
    assert faults.seed_in(folder) in seeds[-4:]
    assert (folder / "notes.txt").read_text() == "mine"
    alone(folder)


@pytest.mark.parametrize("swap", ["in one step", "in two"])
def test_a_program_in_the_folder_stays_in_it(folder, monkeypatch, swap):
    if swap == "in two":
        monkeypatch.setattr(replacement, "_swap", lambda *_: False)
    (folder / "runs").mkdir()
    monkeypatch.chdir(folder / "runs")
    for seed in (2, 3):
        subspace(seed=seed).save_pretrained("..")
        assert Path.cwd() == folder / "runs"
        same(subspace(seed=seed), featurizers.load("local:..", verify=True))
    monkeypatch.chdir(folder)
    subspace(seed=4).save_pretrained(".")
    Path("notes.txt").write_text("mine")
    subspace(seed=5).save_pretrained("")
    assert (folder / "notes.txt").read_text() == "mine"
    same(subspace(seed=5), featurizers.load(folder, verify=True))


def test_loads_while_another_thread_saves(folder):
    """Each load succeeds and returns a single version."""
    faults.made(0).save_pretrained(folder)
    end, saved = threading.Event(), []

    def work() -> None:
        while not end.is_set():
            saved.append(len(saved) + 1)
            faults.made(saved[-1]).save_pretrained(folder)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        deadline, found = time.monotonic() + 2, []
        while time.monotonic() < deadline:
            found.append(faults.seed_of(featurizers.load(folder, verify=True)))
    finally:
        end.set()
        thread.join(60)
    assert found == sorted(found)
    assert len(set(found)) > 1


@pytest.mark.parametrize("shapes", ["the same", "others"])
def test_a_load_of_a_folder_that_is_replaced_in_its_middle(folder, monkeypatch, shapes):
    """Config and weights are of one version, even where those of two versions would fit."""
    new = subspace(seed=2) if shapes == "the same" else subspace(seed=2, n_features=2)
    new.metadata = {"seed": 2}
    read_header, replaced = weights.read_header, []

    def read(*args: object):
        if not replaced:
            replaced.append(new.save_pretrained(folder))
        return read_header(*args)

    monkeypatch.setattr(weights, "read_header", read)
    loaded = featurizers.load(folder)
    assert loaded.metadata == {"seed": 2}
    same(new, loaded)


# ---------------------------------------------------------------------- kills and crowds


@pytest.mark.parametrize("work", ["save", "save_in_two_steps", "save_collection"])
def test_savers_that_are_killed(nursery, tmp_path, work):
    done = faults.kills_over(nursery, tmp_path / "place" / "a", 60 if work == "save" else 20, work)
    assert (done.bad, done.lost) == ([], 0)
    assert done.middle > 0


def test_savers_anew_that_are_killed(nursery, tmp_path):
    assert faults.kills_anew(nursery, tmp_path, 20).bad == []


def test_conversions_that_are_killed(nursery, tmp_path):
    assert faults.kills_of_convert(nursery, tmp_path, 20, "sae-lens").bad == []


@pytest.mark.parametrize("in_two_steps", [False, True], ids=["in one step", "in two"])
def test_a_crowd(nursery, tmp_path, in_two_steps):
    done = faults.crowd(nursery, tmp_path / "place" / "a", 3, 4, in_two_steps)
    assert (done.bad, done.lost) == ([], 0)
    assert done.saves > 0
    assert done.loads > 0
