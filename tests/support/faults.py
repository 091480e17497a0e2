"""Kill programs in the middle of their work, or let many work on one folder, and check what they leave.

A `Nursery` is a process that has imported everything and forks a child for each call, so that hundreds of calls can be
killed in a minute. The nursery itself has one thread and no connections.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import featurizers
import torch
from featurizers.errors import ManifestError
from featurizers.format.card import END, START
from featurizers.format.manifest import CARD_NAME

ROOT = Path(__file__).parents[2]

NURSERY = '''
import json, os, select, signal, sys, time, traceback
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
exec(compile(sys.argv[2], "<worker>", "exec"))


def born(name, arguments):
    """Fork a child that makes a call; return its id and the pipe on which it reports its start and its result."""
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        os.read(reading, 1)
        return child, reading
    try:
        os.close(reading)
        os.write(writing, b"!")
        answer = {"result": globals()[name](*arguments)}
    except BaseException:
        answer = {"error": traceback.format_exc()}
    try:
        sys.stdout.flush()
        view = memoryview(json.dumps(answer).encode())
        while view:
            view = view[os.write(writing, view):]
    finally:
        os._exit(0)


def ended(child, reading, left=None):
    """Return the answer of a child, or None if it was killed when its time was up."""
    pieces, deadline = [], None if left is None else time.monotonic() + left
    while True:
        rest = None if deadline is None else max(0, deadline - time.monotonic())
        if not select.select([reading], [], [], rest)[0]:
            os.kill(child, signal.SIGKILL)
            deadline = None  # read what it sent before
        if not (piece := os.read(reading, 65536)):
            break
        pieces.append(piece)
    os.close(reading)
    status = os.waitpid(child, 0)[1]
    try:
        return json.loads(b"".join(pieces))
    except ValueError:
        return None if os.WIFSIGNALED(status) and left is not None else {"error": f"it ended with status {status}"}


answers = os.fdopen(os.dup(1), "w")
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
print("ready", file=answers, flush=True)
for line in sys.stdin:
    calls, left = json.loads(line)
    children = [born(*call) for call in calls]
    start = time.monotonic()
    found = [ended(*child, left) for child in children]
    print(json.dumps([found, time.monotonic() - start]), file=answers, flush=True)
'''

WORK = '''
import tempfile
from pathlib import Path
import featurizers, huggingface_hub
from huggingface_hub import _commit_api, file_download, hf_api, lfs
from featurizers.cli import app as cli
from featurizers.store import pushing
from featurizers.files import replacement
from featurizers.registry.plugin_host import host
from tests.support import faults
host().load_all()


with tempfile.TemporaryDirectory() as warm:  # do what only first calls do
    featurizers.save_collection(faults.parts(0), f"{warm}/a")
    featurizers.load(Path(f"{warm}/a"), subfolder="one", verify=True)
    for to in ("sae-lens", "dictionary-learning"):
        featurizers.convert(faults.dictionary(0), f"{warm}/{to}", to)


def save(folder, seed):
    faults.made(seed).save_pretrained(folder)

def save_in_two_steps(folder, seed):
    replacement._swap = lambda *_: False
    save(folder, seed)

def save_collection(folder, seed):
    featurizers.save_collection(faults.parts(seed), folder)

def convert(folder, seed, to):
    featurizers.convert(faults.dictionary(seed), folder, to)

def push(folder, repo_id):
    return pushing.push(folder, repo_id).oid

def pull(repo_id, folder, cache):
    from huggingface_hub import constants
    constants.HF_HUB_CACHE = cache
    cli.app(["pull", repo_id, "--out", folder], standalone_mode=False)

def fetch(repo_id, cache):
    """Return the seed, the commit and the card of an artefact in a repository, or None if it is empty or missing."""
    try:
        f = featurizers.load(repo_id, cache_dir=cache, verify=True)
    except featurizers.errors.HubNotFoundError:
        return None
    except featurizers.errors.ManifestError as error:
        if "knows the format of '.gitattributes'" not in str(error):  # the only file of a new repository
            raise
        return None
    card = Path(huggingface_hub.hf_hub_download(repo_id, "README.md", revision=f.revision, cache_dir=cache))
    return faults.seed_of(f), f.revision, card.read_text(encoding="utf-8")

def member(folder, number, seconds, in_two_steps):
    if in_two_steps:
        replacement._swap = lambda *_: False
    return faults.member(Path(folder), number, seconds, always=not in_two_steps)
'''
"""Functions that the children of a nursery can call."""


class BadStateError(AssertionError):
    """A state that no program saved."""


# ---------------------------------------------------------------------- versions that can be told apart


def made(seed: int) -> featurizers.Featurizer[Any]:
    """Return a featurizer whose weights, shape, config, name, metadata and feature sets all depend on the seed."""
    f = featurizers.create("subspace", d_in=64, n_features=2 + seed % 7, seed=seed)
    f.id, f.metadata = f"seed-{seed}", {"seed": seed}
    f.feature_sets = {"seed": torch.tensor([seed]), "long": torch.full((4096,), float(seed))}
    return f


def seed_of(f: featurizers.Featurizer[Any]) -> int:
    """Return the seed of a featurizer that `made` returned.

    Raises:
        BadStateError: its parts have different seeds, or none.
    """
    seed = f.metadata.get("seed")
    if not isinstance(seed, int):
        raise BadStateError(f"no seed in {f.metadata}")
    expected = made(seed)
    agree = {
        "id": f.id == expected.id,
        "config": f.config == expected.config,
        "weights": _equal(f.state_dict(), expected.state_dict()),
        "feature sets": _equal(f.feature_sets, expected.feature_sets),
    }
    if not all(agree.values()):
        raise BadStateError(f"metadata of seed {seed}, but not {[name for name, same in agree.items() if not same]}")
    return seed


def parts(seed: int) -> dict[str, featurizers.Featurizer[Any]]:
    """Return a collection of two featurizers of one seed."""
    return {"one": made(seed), "deep/two": made(seed)}


def dictionary(seed: int) -> featurizers.Featurizer[Any]:
    """Return a dictionary whose weights depend on the seed."""
    f = featurizers.create("dictionary", d_in=16, n_features=64)
    numbers = torch.Generator().manual_seed(seed)
    f.load_state_dict({name: torch.randn(t.shape, generator=numbers) for name, t in f.state_dict().items()})
    f.site = featurizers.Site("resid.post", 3)
    return f


def _equal(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


# ---------------------------------------------------------------------- files of other programs


@dataclass
class OtherFiles:
    """Files in a folder, and prose in its README, that a save must keep."""

    files: dict[str, bytes] = field(default_factory=dict)
    before: str = ""
    after: str = ""

    def put(self, folder: Path, number: int = 0) -> None:
        """Write the files, each beside its place and then renamed, with contents that depend on the number."""
        self.files = {
            "notes.txt": b"my notes, state %d\n" % number,
            "sub/other.bin": random.Random(number).randbytes(2000),
            f"sub/deeper/{number % 5}": b"%d" % number,
        }
        self.before, self.after = f"Before, in state {number}.\n\n", f"\nAfter, in state {number}: é\n"
        for name, data in self.files.items():
            _replace(folder / name, data)
        readme = folder / CARD_NAME
        front, _, rest = readme.read_text(encoding="utf-8").partition(START)
        head = front[: front.index("\n---\n") + 5]
        block = rest.partition(END)[0]
        _replace(readme, f"{head}{self.before}{START}{block}{END}{self.after}".encode())

    def lost(self, folder: Path) -> int:
        """Return the number of bytes that are missing or changed."""
        lost = sum(len(data) for name, data in self.files.items() if _read(folder / name) != data)
        return lost + self.lost_prose((_read(folder / CARD_NAME) or b"").decode())

    def lost_prose(self, card: str) -> int:
        """Return the number of bytes of the prose that a README lacks."""
        return sum(
            len(text.encode())
            for text, part in ((self.before, card.partition(START)[0]), (self.after, card.partition(END)[2]))
            if not (part.endswith(text) if text == self.before else part == text)
        )


def _replace(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_name(f"{path.name}~").write_bytes(data)
    path.with_name(f"{path.name}~").replace(path)


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


def seed_in(folder: Path) -> int | None:
    """Return the seed of the version in a folder, None if the folder is missing or empty.

    Raises:
        BadStateError: the folder holds a part of a version, or a mixture.
    """
    try:
        f = featurizers.load(folder, verify=True)
    except ManifestError:
        if not folder.exists() or not any(folder.iterdir()):
            return None
        raise
    seed = seed_of(f)
    if f"\n# seed-{seed}\n" not in (folder / CARD_NAME).read_text(encoding="utf-8"):
        raise BadStateError(f"weights of seed {seed} beside the card of another one")
    return seed


def seed_in_collection(folder: Path) -> int | None:
    """Return the seed of the collection in a folder, None if the folder is missing or empty.

    Raises:
        BadStateError: the folder holds a part of a collection, or a mixture.
    """
    try:
        featurizers.list_artefacts(folder)
    except ManifestError:
        if not folder.exists() or not any(folder.iterdir()):
            return None
        raise
    seeds = {seed_in(folder / name) for name in parts(0)}
    seeds |= {int(entry.id.removeprefix("seed-")) for entry in featurizers.list_artefacts(folder).values()}
    if len(seeds) > 1:
        raise BadStateError(f"a collection of {seeds}")
    return seeds.pop()


def leftovers(folder: Path) -> list[str]:
    """Return the names of the other files beside a folder."""
    return sorted(path.name for path in folder.parent.iterdir() if path.name != folder.name)


# ---------------------------------------------------------------------- killed children


class Nursery:
    """A process that forks a child for each call of a function of a script, and may kill it.

    Args:
        environment: variables to add to the environment of this process.
        script: source code that defines the functions.
    """

    def __init__(self, environment: Mapping[str, str] | None = None, script: str = WORK) -> None:
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        self.process = subprocess.Popen(
            [sys.executable, "-c", NURSERY, str(ROOT), script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**clean, "OMP_NUM_THREADS": "1", **(environment or {})},
        )
        self._line()

    def __enter__(self) -> Nursery:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate()  # it ends with its input

    def _line(self) -> str:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the nursery ended with {self.process.wait()}")
        return line

    def together(self, *calls: tuple[str, ...], left: float | None = None) -> tuple[list[Any], float]:
        """Make some calls at once, each in a child; return their results and the seconds that they took.

        Args:
            calls: name and arguments of a function, for each call.
            left: seconds after which a child is killed; its result is then None.

        Raises:
            AssertionError: a call raised an exception.
        """
        ask = [[[name, [str(a) if isinstance(a, Path) else a for a in arguments]] for name, *arguments in calls], left]
        print(json.dumps(ask), file=self.process.stdin, flush=True)
        answers, seconds = json.loads(self._line())
        for answer in answers:
            if answer is not None and "error" in answer:
                raise AssertionError(answer["error"])
        return [None if answer is None else answer["result"] for answer in answers], seconds

    def call(self, name: str, *arguments: Any) -> Any:
        """Return the result of a call that is not killed."""
        return self.together((name, *arguments))[0][0]

    def killed(self, left: float, name: str, *arguments: Any) -> bool:
        """Make a call and return True if it was killed, after some seconds, before its end."""
        ask = [[[name, [str(a) if isinstance(a, Path) else a for a in arguments]]], left]
        print(json.dumps(ask), file=self.process.stdin, flush=True)
        (answer,), _ = json.loads(self._line())
        if answer is not None and "error" in answer:
            raise AssertionError(answer["error"])
        return answer is None


@dataclass
class Tally:
    """Results of many kills.

    Attributes:
        kills: number of kills.
        middle: number of kills that came before the end of the work.
        finished: number of kills after which the new version was there.
        bad: descriptions of bad states.
        lost: bytes of other programs' files that were lost.
        seconds: time that an operation takes.
    """

    kills: int = 0
    middle: int = 0
    finished: int = 0
    bad: list[str] = field(default_factory=list)
    lost: int = 0
    seconds: float = 0.0


class Killer:
    """Kills calls of an operation, each at a time that is uniform over its duration.

    Every tenth call runs to its end, because the duration changes with the load of the machine.
    """

    def __init__(self, nursery: Nursery, seed: int = 0) -> None:
        self.nursery, self.chance, self.tally = nursery, random.Random(seed), Tally()
        self._times: list[float] = []

    def measure(self, name: str, *arguments: Any) -> None:
        """Let a call run to its end; the duration is the median of the last five such calls."""
        self._times = [*self._times[-4:], self.nursery.together((name, *arguments))[1]]
        self.tally.seconds = sorted(self._times)[len(self._times) // 2]

    def rounds(self, kills: int) -> Iterator[int]:
        """Yield numbers from 0 until there have been so many kills."""
        for number in itertools.count():
            if self.tally.kills >= kills:
                return
            self.is_spared = number % 10 == 9
            yield number

    def kill(self, name: str, *arguments: Any) -> bool:
        """Make a call and return True if it was killed before its end."""
        if self.is_spared:
            self.measure(name, *arguments)
            return False
        killed = self.nursery.killed(self.chance.uniform(0, self.tally.seconds), name, *arguments)
        self.tally.kills += 1
        self.tally.middle += killed
        return killed

    def ended(self, is_new: bool) -> None:
        """Count a killed call whose work was already done."""
        self.tally.finished += is_new and not self.is_spared

    def check(self, is_good: bool, what: str) -> None:
        """Record a bad state."""
        if not is_good:
            self.tally.bad.append(what)

    def found(self, look: Any, *arguments: Any) -> Any:
        """Return what a function returns; if it fails, record a bad state and return None."""
        try:
            return look(*arguments)
        except Exception as error:  # any exception is a bad state
            self.tally.bad.append(f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}")
            return None


def kills_over(nursery: Nursery, folder: Path, kills: int, work: str = "save", seed: int = 0) -> Tally:
    """Kill programs that save over an artefact (``save``) or a collection (``save_collection``) with other files in it.

    With ``save_in_two_steps`` they save as on a disk that cannot swap two paths at once.

    After each kill the folder must hold the old or the new version, whole, and all other files, which change each time.
    The next saver that succeeds must remove what the killed ones left.
    """
    look = seed_in_collection if work == "save_collection" else seed_in
    killer, numbers, others = Killer(nursery, seed), itertools.count(1), OtherFiles()
    for _ in range(5):
        killer.measure(work, folder, old := next(numbers))
    for _ in killer.rounds(kills):
        new = next(numbers)
        others.put(folder, new)
        killed = killer.kill(work, folder, new)
        found = killer.found(look, folder)
        killer.check(found == new or (killed and found == old), f"{found} after {old} and {new}")
        killer.ended(found == new)
        killer.tally.lost += others.lost(folder)
        old = old if found is None else found
    nursery.call(work, folder, new := next(numbers))
    killer.check(killer.found(look, folder) == new, "the last one was not saved")
    killer.check(not leftovers(folder), f"left: {leftovers(folder)}")
    killer.tally.lost += others.lost(folder)
    return killer.tally


def kills_anew(nursery: Nursery, place: Path, kills: int, seed: int = 0) -> Tally:
    """Kill programs that save a new artefact: it must be absent, empty or whole, and the next save must succeed."""
    killer, numbers = Killer(nursery, seed), itertools.count(1)
    for _ in range(5):
        killer.measure("save", place / "measured" / str(new := next(numbers)), new)
    for _ in killer.rounds(kills):
        new = next(numbers)
        folder = place / str(new) / "a"
        killed = killer.kill("save", folder, new)
        found = killer.found(seed_in, folder)
        killer.check(found == new or (killed and found is None), f"{found} instead of {new}")
        killer.ended(found == new)
        if new % 10 == 0:
            nursery.call("save", folder, new := next(numbers))
            killer.check(killer.found(seed_in, folder) == new and not leftovers(folder), f"{leftovers(folder)} stays")
    return killer.tally


def kills_of_convert(nursery: Nursery, place: Path, kills: int, to: str, seed: int = 0) -> Tally:
    """Kill conversions to a format: the folder must be absent, empty or whole, and the next conversion must succeed."""

    def holds(folder: Path, number: int) -> bool:
        if not folder.exists() or not any(folder.iterdir()):
            return False
        if not _equal(featurizers.load(folder).state_dict(), dictionary(number).state_dict()):
            raise BadStateError("other weights")
        return True

    killer = Killer(nursery, seed)
    for number in range(5):
        killer.measure("convert", place / "measured" / str(number), number, to)
    for number in killer.rounds(kills):
        folder = place / str(number) / "a"
        killed = killer.kill("convert", folder, number, to)
        found = killer.found(holds, folder, number)
        killer.check(found is True or (killed and found is False), f"{found} after conversion {number}")
        killer.ended(found is True)
        if number % 10 == 0 and found is False:
            nursery.call("convert", folder, number, to)
            killer.check(killer.found(holds, folder, number) is True, "no second try")
            killer.check(not leftovers(folder), f"{leftovers(folder)} stays")
    return killer.tally


# ---------------------------------------------------------------------- the Hub


class HubProcess:
    """A loopback Hub in a process of its own, and the environment that points a client to it."""

    def __init__(self, place: Path, xet: bool = False) -> None:
        self.root, self.place = place / "server", place
        command = [sys.executable, ROOT / "tests/support/hubserver.py", "--root", self.root, "--port", "0"]
        place.mkdir(parents=True, exist_ok=True)
        with (place / "server.log").open("w") as log:  # it logs every client that was killed
            self.process = subprocess.Popen([*command, *["--xet"] * xet], stdout=subprocess.PIPE, stderr=log, text=True)
        url = json.loads(self.process.stdout.readline())["HF_ENDPOINT"]
        self.environment = {
            "HF_ENDPOINT": url,
            "HF_HOME": str(place / "home"),
            "HF_TOKEN": "hf_alice_write",
            "HF_HUB_DISABLE_XET": str(int(not xet)),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
        }

    def __enter__(self) -> HubProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.communicate()

    def history(self, repo_id: str) -> dict[str, set[str]]:
        """Return the files of each commit of a repository's main branch, the last commit first."""
        path = self.root / "repos" / f"model--{repo_id.replace('/', '--')}.json"
        record = json.loads(path.read_text(encoding="utf-8"))
        commit, history = record["refs"]["refs/heads/main"], {}
        while commit:
            history[commit] = set(record["commits"][commit]["files"])
            commit = record["commits"][commit]["parent"]
        return history


ARTEFACT_FILES = {"config.json", "model.safetensors", "README.md"}


def kills_of_push(nursery: Nursery, hub: HubProcess, kills: int, seed: int = 0) -> Tally:
    """Kill pushes to a repository that holds an older version and prose; every third to a new repository.

    After each kill the branch must be at the old commit, or at a new one whose parent is the old one. A load with an
    empty cache must find a whole version, and the prose. What was sent to the Hub before a kill may arrive after it, so
    the commit of an earlier push is as good.
    """
    killer, numbers, others = Killer(nursery, seed), itertools.count(1), OtherFiles()
    place = hub.place / "push"
    artefact = place / "artefact"
    repo_id, known, pending = "alice/x", "", set()
    for _ in range(3):
        made(old := next(numbers)).save_pretrained(artefact)
        others.put(artefact, 1)
        killer.measure("push", artefact, repo_id)
        known = next(iter(hub.history(repo_id)))
    for round_ in killer.rounds(kills):
        made(new := next(numbers)).save_pretrained(artefact)
        is_new = round_ % 3 == 2
        target = f"alice/new-{new}" if is_new else repo_id
        killed = killer.kill("push", artefact, target)
        with tempfile.TemporaryDirectory(dir=place) as cache:
            found = killer.found(nursery.call, "fetch", target, cache)
        if found is None:
            killer.check(is_new and killed, f"nothing after the push of {new} to {target}")
            continue
        version, commit, card = found
        killer.tally.lost += others.lost_prose(card)
        killer.check(f"\n# seed-{version}\n" in card, f"the card of another version than {version}")
        killer.ended(version == new)
        if is_new:
            killer.check(version == new, f"{version} in a new repository instead of {new}")
            continue
        history = hub.history(repo_id)
        killer.check(
            history[commit] == ARTEFACT_FILES | {".gitattributes"}, f"the commit holds {sorted(history[commit])}"
        )
        if commit == known:
            killer.check(version == old, f"{version} at the commit of {old}")
            killer.check(killed, f"a push of {new} without a commit")
            pending.add(new)
        else:
            killer.check(version in {new, *pending}, f"{version} after {old} and {new}")
            killer.check(known in history, "a branch without the commit that it stood at")
            known, old, pending = commit, version, pending | {new}
    return killer.tally


def kills_of_pull(nursery: Nursery, hub: HubProcess, kills: int, seed: int = 0) -> Tally:
    """Kill ``pull --out``: the folder must be absent, empty or whole, and its cache must serve the next load."""
    killer = Killer(nursery, seed)
    place = hub.place / "pull"
    repo_id, version = "alice/pulled", 5
    nursery.call("push", made(version).save_pretrained(place / "artefact"), repo_id)
    for number in range(3):
        killer.measure("pull", repo_id, place / f"measured-{number}", place / f"cache-{number}")
    for number in killer.rounds(kills):
        folder, cache = (
            place / f"out-{number}" / "a",
            place / f"killed-cache-{number // 3}",
        )
        killed = killer.kill("pull", repo_id, folder, cache)
        found = killer.found(seed_in, folder)
        killer.check(found == version or (killed and found is None), f"{found} in the folder")
        killer.ended(found == version)
        if number % 3 == 2:
            served = killer.found(nursery.call, "fetch", repo_id, cache)
            killer.check(served is not None and served[0] == version, f"{served} from the cache of a killed pull")
    return killer.tally


# ---------------------------------------------------------------------- many programs at once


@dataclass
class Crowd:
    """Results of many programs at work on one folder."""

    saves: int = 0
    loads: int = 0
    added: int = 0
    bad: list[str] = field(default_factory=list)
    lost: int = 0


def crowd(nursery: Nursery, folder: Path, seconds: float, processes: int, in_two_steps: bool = False) -> Crowd:
    """Let processes save different versions to one folder, load it and add files to it, all at the same time.

    Each load must succeed and return a single version. At the end the folder must hold every file that was added.
    """
    others, result = OtherFiles(), Crowd()
    made(0).save_pretrained(folder)
    others.put(folder)
    calls = [("member", folder, number, seconds, in_two_steps) for number in range(1, processes + 1)]
    members, _ = nursery.together(*calls)
    for member in members:
        result.saves += member["saves"]
        result.loads += member["loads"]
        result.added += len(member["added"])
        result.bad += member["bad"]
        result.lost += sum(len(text) for name, text in member["added"].items() if _read(folder / name) != text.encode())
    result.lost += others.lost(folder)
    if (found := seed_in(folder)) not in {member["last"] for member in members}:
        result.bad.append(f"{found} at the end, which nobody saved last")
    if leftovers(folder):
        result.bad.append(f"left: {leftovers(folder)}")
    return result


def member(folder: Path, number: int, seconds: float, always: bool) -> dict[str, Any]:
    """Save, load and add files as one process of a crowd; return what it did and what went wrong.

    Args:
        folder: the folder of the crowd.
        number: number of this process.
        seconds: duration.
        always: True if the folder exists at every moment, as it does not between two renames.
    """
    chance = random.Random(number)
    end, last, saves, loads, bad = time.monotonic() + seconds, None, 0, 0, []
    added: dict[str, str] = {}
    next_file = time.monotonic() + chance.random()
    while time.monotonic() < end:
        try:
            if chance.random() < 0.3:
                last = 1_000_000 * number + saves
                made(last).save_pretrained(folder)
                saves += 1
            else:
                seed_of(featurizers.load(folder, verify=True))
                if always and not (folder / "notes.txt").exists():
                    raise BadStateError("no notes.txt")
                loads += 1
        except Exception as error:  # any exception is a bad state
            bad.append(f"{type(error).__name__}: {error}")
        if time.monotonic() > next_file:
            name = f"sub/added-{number}-{len(added)}"
            try:
                (folder / name).write_text(name, encoding="utf-8")
            except FileNotFoundError:  # the folder was replaced at this moment
                continue
            added[name] = name
            next_file += 1
    return {"saves": saves, "loads": loads, "last": last, "bad": bad, "added": added}
