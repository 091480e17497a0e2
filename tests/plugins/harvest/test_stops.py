"""A harvest that is killed, or ends in an error, and is run again: the files are those of a run without a stop."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import featurizers
import featurizers_harvest
import pytest
import torch
from featurizers.errors import ArtefactError, UsageError
from featurizers_harvest import parts, shards
from featurizers_harvest.folders import Disk

from tests.plugins.harvest.test_harvest import IDS, files, harvest, topk
from tests.support.models import fresh_model

WANTED = {"f": topk(), "x": "resid.post:0"}

KILL = """
import os, sys, threading
import torch
from featurizers_harvest import parts, folders
from tests.plugins.harvest.test_stops import WANTED
from tests.plugins.harvest.test_harvest import IDS, harvest
from pathlib import Path

where, number, out = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
left = number

def dying(original, after):
    def call(*arguments, **options):
        global left
        left -= 1
        if left < 0 and not after:
            os._exit(9)
        result = original(*arguments, **options)
        if left < 0:
            os._exit(9)
        return result
    return call

if where == "before the temporary":
    parts.Parts.__enter__ = dying(parts.Parts.__enter__, False)
elif where == "after the temporary":
    parts.Parts.finish = dying(parts.Parts.finish, True)
elif where == "between two renames":
    folders.Disk.put = dying(folders.Disk.put, True)
else:
    parts.Parts.put = dying(parts.Parts.put, True)
torch.set_num_threads(1)
harvest(WANTED, IDS, out)
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: Any) -> dict[str, bytes]:
    """Return the files of a run that was not stopped."""
    out = Path(tmp_path_factory.mktemp("whole")) / "out"
    harvest(WANTED, IDS, out)
    return files(out)


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("where", "number"),
    [
        ("before the temporary", 0),
        ("before the temporary", 3),
        ("after the temporary", 2),
        ("between two renames", 6),
        ("after the rename", 0),
        ("after the rename", 4),
    ],
)
def test_a_run_that_is_killed_goes_on_to_the_same_bytes(
    tmp_path: Path, whole: dict[str, bytes], where: str, number: int
) -> None:
    out = tmp_path / "out"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    done = subprocess.run([sys.executable, "-c", KILL, where, str(number), str(out)], env=environment, check=False)
    assert done.returncode == 9
    with pytest.raises(ArtefactError, match="shards are missing"):
        featurizers_harvest.open(out)
    committed = set(featurizers_harvest.open(out, partial=True).entries)
    computed = []
    original = shards.Worker.__call__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards.Worker, "__call__", lambda self, n: computed.append(n) or original(self, n))
        harvest(WANTED, IDS, out)
    assert sorted(computed) == sorted(set(range(5)) - committed)
    assert files(out) == whole


def test_a_finished_harvest_computes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    harvest(WANTED, IDS, tmp_path / "out")
    monkeypatch.setattr(shards.Worker, "compute", lambda *_: pytest.fail("a shard was computed"))
    assert harvest(WANTED, IDS, tmp_path / "out").is_complete


@pytest.mark.parametrize("harm", ["lost", "cut"])
def test_a_file_that_was_lost_or_cut_is_made_again(tmp_path: Path, whole: dict[str, bytes], harm: str) -> None:
    out = tmp_path / "out"
    harvest(WANTED, IDS, out)
    victim = out / "site=f" / "part-000002.parquet"
    victim.unlink() if harm == "lost" else victim.write_bytes(victim.read_bytes()[:-1])
    with pytest.raises(ArtefactError, match="1 of 5 shards are missing"):
        featurizers_harvest.open(out)
    harvest(WANTED, IDS, out)
    assert files(out) == whole


def test_a_full_disk_leaves_the_shards_before_and_nothing_else(tmp_path: Path, whole: dict[str, bytes]) -> None:
    out = tmp_path / "out"
    calls = 0

    def full(self: Any, table: Any) -> None:
        nonlocal calls
        calls += 1
        if calls > 4:
            raise OSError(28, "No space left on device")
        original(self, table)

    original = parts.pq.ParquetWriter.write_table
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts.pq.ParquetWriter, "write_table", lambda self, table, **_: full(self, table), raising=True)
        with pytest.raises(ArtefactError, match="No space left on device"):
            harvest(WANTED, IDS, out)
    found = files(out)
    assert set(found) < set(whole)
    assert len(featurizers_harvest.open(out, partial=True).entries) == 1
    harvest(WANTED, IDS, out)
    assert files(out) == whole


def test_documents_that_change_under_the_harvest_are_refused(tmp_path: Path) -> None:
    class Changing(list[Any]):
        readings = 0

        def __getitem__(self, number: Any) -> Any:
            self.readings += 1
            return [1, 2] if self.readings > len(self) and number == 7 else super().__getitem__(number)

    with pytest.raises(UsageError, match="have changed since the harvest began"):
        harvest(["embed"], Changing(IDS), tmp_path / "out")


def test_a_check_computes_shards_again_and_tells_what_differs(tmp_path: Path) -> None:
    out = tmp_path / "out"
    harvest(WANTED, IDS, out)
    options = {"shard_tokens": 60, "batch_size": 4, "values": "float32"}
    model = fresh_model("llama")
    before = files(out)
    assert featurizers_harvest.check(model, WANTED, IDS, out, share=1.0, **options) == []
    assert featurizers_harvest.check(model, WANTED, IDS, out, **options) == []
    victim = out / "site=x" / "part-000003.parquet"
    harmed = bytearray(victim.read_bytes())
    harmed[60] ^= 1
    victim.write_bytes(harmed)
    assert featurizers_harvest.check(model, WANTED, IDS, out, share=1.0, **options) == [
        "site=x/part-000003.parquet: the file is lost or has changed"
    ]
    victim.write_bytes(before["site=x/part-000003.parquet"])
    entry = out / "done" / "part-000001.json"
    entry.write_text(entry.read_text().replace('"rows_sha256": "', '"rows_sha256": "0', 1))
    (problem,) = featurizers_harvest.check(model, WANTED, IDS, out, share=1.0, **options)
    assert problem == "tokens/part-000001.parquet: other rows are computed now"
    with pytest.raises(ArtefactError, match=r"rows.batch_size"):
        featurizers_harvest.check(model, WANTED, IDS, out)


def test_two_runs_at_once_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with Disk(out).lock(), pytest.raises(ArtefactError, match="another program is writing to it"):
        harvest(WANTED, IDS, out)


def test_a_plan_or_an_entry_that_was_changed_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    harvest(WANTED, IDS, out)
    plan, entry = out / "plan.json", out / "done" / "part-000000.json"
    text = plan.read_text()
    plan.write_text(text.replace('"batch_size": 4', '"batch_size": 5'))
    with pytest.raises(ArtefactError, match=r"plan.json was changed by hand"):
        featurizers_harvest.open(out)
    plan.write_text(text[:-20])
    with pytest.raises(ArtefactError, match=r"plan.json is damaged"):
        featurizers_harvest.open(out)
    plan.write_text(text)
    entry.write_text("{}")
    with pytest.raises(ArtefactError, match="is no entry of a harvest"):
        featurizers_harvest.open(out)


def test_object_storage_holds_the_same_files(tmp_path: Path, whole: dict[str, bytes]) -> None:
    fsspec = pytest.importorskip("fsspec")
    url = f"memory://harvest-{tmp_path.name}"
    found = harvest(WANTED, IDS, url)  # type: ignore[arg-type]
    fs = fsspec.filesystem("memory")
    root = f"/harvest-{tmp_path.name}/"
    assert {name.removeprefix(root): fs.cat_file(name) for name in fs.find(root)} == whole
    assert found.table("f").num_rows == sum(map(len, IDS))
    fs.rm(f"{root}done/part-000001.json")
    with pytest.raises(ArtefactError, match="1 of 5 shards are missing"):
        featurizers_harvest.open(url)
    harvest(WANTED, IDS, url)  # type: ignore[arg-type]
    assert {name.removeprefix(root): fs.cat_file(name) for name in fs.find(root)} == whole


def test_jobs_that_share_the_shards_write_the_same_files(tmp_path: Path, whole: dict[str, bytes]) -> None:
    out = tmp_path / "out"
    first = harvest(WANTED, IDS, out, shard=(1, 2))
    assert (sorted(first.entries), first.is_complete) == ([1, 3], False)
    assert harvest(WANTED, IDS, out, shard=(0, 2)).is_complete
    assert files(out) == whole
    with pytest.raises(UsageError, match=r"shard is \(i, n\) with i from 0 to n - 1"):
        harvest(WANTED, IDS, out, shard=(2, 2))


def test_the_core_forwards_harvest() -> None:
    assert featurizers.harvest is featurizers_harvest.harvest
