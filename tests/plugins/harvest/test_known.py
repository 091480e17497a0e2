"""A harvest that goes on reads documents and hashes parameters anew only where a file may have changed."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any

import featurizers
import featurizers_harvest
import pytest
import torch
from featurizers.errors import ArtefactError
from featurizers_harvest import known

from tests.plugins.harvest.test_harvest import IDS, files
from tests.support.models import fresh_model, save_language_model

ROWS: dict[str, Any] = {"key": "ids", "shard_tokens": 60, "progress": False, "device": "cpu"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with a model and documents, which count as settled at once."""
    monkeypatch.setattr(known, "SETTLED", -(10**18))
    save_language_model(fresh_model("llama"), tmp_path / "model")
    (tmp_path / "ids.jsonl").write_text("".join(json.dumps({"ids": ids}) + "\n" for ids in IDS))
    return tmp_path


def run(root: Path, **options: Any) -> featurizers_harvest.Harvest:
    wanted = {"x": "resid.post:1"}
    return featurizers.harvest(str(root / "model"), wanted, root / "ids.jsonl", root / "out", **{**ROWS, **options})


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list to which what is computed is added."""
    found: list[str] = []
    for name in ("shards_of", "checksum_of_model"):
        original = getattr(known, name)

        def call(*arguments: Any, name: str = name, original: Any = original) -> Any:
            found.append(name)
            return original(*arguments)

        monkeypatch.setattr(known, name, call)
    return found


def test_a_harvest_that_goes_on_reads_and_hashes_nothing_again(folder: Path, computed: list[str]) -> None:
    run(folder)
    assert computed == ["shards_of", "checksum_of_model"]
    whole = files(folder / "out")
    (folder / "out" / "site=x" / "part-000001.parquet").unlink()
    assert run(folder).is_complete
    assert computed == ["shards_of", "checksum_of_model"]
    assert files(folder / "out") == whole
    raw = (folder / "out" / "known.json").read_text()
    assert str(folder) not in raw, "paths are not in it"
    assert featurizers_harvest.open(folder / "out").is_complete


@pytest.mark.parametrize("what", ["documents", "model"])
def test_a_file_that_may_have_changed_is_read_again(folder: Path, computed: list[str], what: str) -> None:
    run(folder)
    computed.clear()
    path = folder / ("ids.jsonl" if what == "documents" else "model/model.safetensors")
    times = path.stat()
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns + 1))
    run(folder)
    assert computed == [{"documents": "shards_of", "model": "checksum_of_model"}[what]]
    run(folder)
    assert len(computed) == 1, "the new time is known"
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns + 1))  # as before, and so is the size
    with pytest.raises(ArtefactError, match="data.sha256 was" if what == "documents" else "model.checksum was"):
        run(folder)


@pytest.mark.parametrize("harm", ["cut", "another checksum", "another shard"])
def test_what_is_known_is_not_believed_if_it_is_not_that_of_the_plan(
    folder: Path, computed: list[str], harm: str
) -> None:
    run(folder)
    path = folder / "out" / "known.json"
    data = json.loads(path.read_text())
    expected = ["shards_of", "checksum_of_model"]
    if harm == "another checksum":
        data["model_checksum"] = "0" * 64
        expected = ["checksum_of_model"]
    elif harm == "another shard":
        data["shards"][2][3] = "0" * 64
        expected = ["shards_of"]
    path.write_text(json.dumps(data)[: 50 if harm == "cut" else None])
    computed.clear()
    run(folder)
    assert computed == expected


def test_options_and_versions_are_part_of_it(
    folder: Path, computed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(folder)
    computed.clear()
    with pytest.raises(ArtefactError, match="shard_tokens was 60 and is 61"):
        run(folder, shard_tokens=61)
    assert computed == ["shards_of"]
    with pytest.raises(ArtefactError, match="dtype"):
        run(folder, dtype=torch.bfloat16)
    assert computed == ["shards_of", "checksum_of_model"]
    monkeypatch.setattr(known, "version_of", lambda name: f"another {name}")
    run(folder)
    assert computed == ["shards_of", "checksum_of_model"] * 2


def test_files_that_have_just_changed_and_what_is_in_memory_are_not_known(
    folder: Path, computed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(known, "SETTLED", 10**18)
    run(folder)
    assert not (folder / "out" / "known.json").exists()
    monkeypatch.setattr(known, "SETTLED", -(10**18))
    for _ in range(2):
        featurizers.harvest(fresh_model("llama"), {"x": "resid.post:1"}, IDS, folder / "other", progress=False)
    assert computed == ["shards_of", "checksum_of_model"] * 3


def test_a_check_trusts_nothing(folder: Path, computed: list[str]) -> None:
    run(folder)
    options = {name: value for name, value in ROWS.items() if name != "progress"}
    wanted = {"x": "resid.post:1"}
    model, out = str(folder / "model"), folder / "out"
    assert featurizers_harvest.check(model, wanted, folder / "ids.jsonl", out, **options) == []
    assert computed == ["shards_of", "checksum_of_model"] * 2


def test_files_of_a_model_of_the_hub_are_those_of_its_commit_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "c" * 40
    snapshot = tmp_path / "models--owner--name" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (snapshot / "model.safetensors").write_text("")
    monkeypatch.setattr(
        known, "try_to_load_from_cache", functools.partial(known.try_to_load_from_cache, cache_dir=tmp_path)
    )
    assert [path.name for path in known._files("owner/name", commit)] == ["config.json", "model.safetensors"]
    for revision in (None, "d" * 40):  # a path that does not exist, which is not known
        assert not any(path.exists() for path in known._files("owner/name", revision))
