"""Which files of a folder are opened: regular ones, in the folder, or where the Hub's cache keeps its blobs."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import featurizers
import pytest
from featurizers.errors import ArtefactError, ManifestError, WeightsError, one_line, shown
from featurizers.files import contained, opened, read_bytes
from safetensors.torch import load_file, save_file

from tests.support.dictionaries import dictionary
from tests.support.hub import subspace

SHA = "0123456789abcdef" * 4


@pytest.fixture
def folder(tmp_path):
    return subspace().save_pretrained(tmp_path / "a")


def snapshot(folder: Path, cache: Path, *, shared: bool = False) -> Path:
    """The artefact as the Hub's cache keeps it: links to blobs, which may be links to those of the whole cache."""
    repository = cache / "models--alice--x"
    place = repository / "snapshots" / "c0ffee"
    place.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for i, file in enumerate(sorted(folder.iterdir())):
        blob = repository / "blobs" / f"{i}{SHA[1:]}"
        if shared and file.suffix == ".safetensors":
            store = cache / "blobs" / SHA[:2] / SHA
            store.parent.mkdir(parents=True)
            shutil.copyfile(file, store)
            blob.symlink_to(os.path.relpath(store, blob.parent))
        else:
            shutil.copyfile(file, blob)
        (place / file.name).symlink_to(os.path.relpath(blob, place))
    return place


@pytest.mark.parametrize("shared", [False, True])
def test_the_links_of_the_hubs_cache_are_followed(folder, tmp_path, shared):
    place = snapshot(folder, tmp_path / "cache", shared=shared)
    assert featurizers.load(place, verify=True).basis.equal(subspace().basis)
    moved = (tmp_path / "cache").rename(tmp_path / "disk")
    (tmp_path / "cache").symlink_to(moved)  # a cache on another disk
    assert featurizers.load(place, verify=True).basis.equal(subspace().basis)


def test_other_links_out_of_a_snapshot_are_not(folder, tmp_path):
    place = snapshot(folder, tmp_path / "cache")
    secret = tmp_path / "cache" / "secret"
    shutil.copyfile(folder / "model.safetensors", secret)
    (place / "model.safetensors").unlink()
    (place / "model.safetensors").symlink_to(secret)
    with pytest.raises(ArtefactError, match="a link out of this folder"):
        featurizers.load(place)
    with pytest.raises(ArtefactError, match="a link out of this folder"):
        featurizers.push(place, "alice/x")


def test_links_within_a_folder_and_to_the_folder_are_followed(folder, tmp_path):
    (folder / "weights").mkdir()
    (folder / "model.safetensors").rename(folder / "weights" / "1")
    (folder / "model.safetensors").symlink_to("weights/1")
    (tmp_path / "link").symlink_to(folder)
    assert featurizers.load(tmp_path / "link", verify=True).basis.equal(subspace().basis)


def test_a_part_of_a_collection_may_not_lie_elsewhere(folder, tmp_path):
    featurizers.save_collection({"a": subspace(), "b": subspace()}, tmp_path / "many")
    shutil.rmtree(tmp_path / "many" / "b")
    (tmp_path / "many" / "b").symlink_to(folder)
    assert featurizers.load(tmp_path / "many", subfolder="a")
    with pytest.raises(ArtefactError, match="a link out of this folder"):
        featurizers.load(tmp_path / "many", subfolder="b")


@pytest.mark.parametrize("name", ["cfg.json", "sae_weights.safetensors"])
@pytest.mark.parametrize("how", ["link", "pipe"])
def test_files_of_other_libraries(tmp_path, name, how):
    folder = tmp_path / "sae"
    featurizers.convert(dictionary("relu"), folder, to="sae-lens")
    assert featurizers.load(folder).kind == "dictionary"
    (folder / name).rename(tmp_path / name)
    if how == "link":
        (folder / name).symlink_to(f"../{name}")
    else:
        os.mkfifo(folder / name)
    words = {"link": "a link out of this folder", "pipe": "a named pipe, not a regular file"}[how]
    with pytest.raises((ManifestError, WeightsError), match=f"{name} is {words}"):
        featurizers.load(folder)


@pytest.mark.parametrize("name", ["ae.pt", "params.npz", "sae.safetensors"])
def test_a_pipe_is_not_waited_for_by_any_reader(tmp_path, name):
    os.mkfifo(tmp_path / name)
    for config in ("cfg.json", "config.json"):
        (tmp_path / config).write_text("{}")
    with pytest.raises((ManifestError, WeightsError)):
        featurizers.load(tmp_path)


def test_a_device_is_not_read(tmp_path):
    with pytest.raises(WeightsError, match="here: zero is a device, not a regular file"):
        read_bytes(Path("/dev/zero"), "here", WeightsError, 10)
    with pytest.raises(ManifestError, match="here: x is a folder"), opened(tmp_path, "here", ManifestError, "x"):
        pass


def test_a_file_has_no_more_bytes_than_it_may(tmp_path):
    (tmp_path / "a").write_bytes(b"x" * 11)
    assert read_bytes(tmp_path / "a", "here", ManifestError, 11) == b"x" * 11
    with pytest.raises(ManifestError, match="here: a is larger than 10 bytes"):
        read_bytes(tmp_path / "a", "here", ManifestError, 10)


def test_what_is_contained(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    assert contained(tmp_path / "a", tmp_path / "a" / "b" / ".." / "x", "here", ManifestError)
    for outside in ("../x", "b/../../a2/x", "/etc/passwd"):
        with pytest.raises(ManifestError, match="a link out of this folder"):
            contained(tmp_path / "a", tmp_path / "a" / outside, "here", ManifestError)


def test_python_files_beside_an_artefact_are_never_run(folder, tmp_path, monkeypatch):
    """Nor those of a current folder that is the artefact's, under the names that could be imported."""
    ran = tmp_path / "ran"
    for name in ("__init__", "featurizers_subspace", "subspace", "modeling", "featurizer", "conftest", "sitecustomize"):
        (folder / f"{name}.py").write_text(f"open({str(ran)!r}, 'w')\n")
    before = list(sys.path)
    monkeypatch.chdir(folder)
    assert featurizers.load("./").basis.equal(subspace().basis)
    assert sys.path == before
    assert not ran.exists()


def test_a_folder_does_not_stand_for_a_repository(tmp_path, monkeypatch):
    """A folder of the name ``alice/x`` in the current one is not what ``alice/x`` means, and that is said."""
    monkeypatch.chdir(tmp_path)
    subspace().save_pretrained("alice/x")
    with pytest.raises(featurizers.errors.SourceError, match="alice/x"):
        featurizers.load("alice/x")


def test_what_errors_show():
    assert shown("a\x1b[2J") == r"'a\x1b[2J'"
    assert len(shown("x" * 10**6)) == 80
    assert len(shown(["x" * 10**6])) == 80
    assert shown(10**5000) == "an enormous number"
    assert shown(True) == "True"
    assert one_line("a\n  b\x1b\u202e") == r"a b\x1b\u202e"
    assert len(one_line("x" * 1000)) == 300
    assert len(one_line("\x1b" * 1000)) == 300


def test_a_foreign_folder_with_nan_is_named_and_can_be_had(tmp_path):
    f = dictionary("relu")
    folder = tmp_path / "sae"
    featurizers.convert(f, folder, to="sae-lens")
    tensors = load_file(folder / "sae_weights.safetensors")
    tensors["W_dec"][1, 2] = float("nan")
    save_file(tensors, folder / "sae_weights.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        WeightsError, match=r"'W_dec' holds NaN or infinity: 1 of its \d+ numbers, the first at \[1, 2\]"
    ):
        featurizers.load(folder)
    assert int(featurizers.load(folder, allow_nonfinite=True).W_dec.isnan().sum()) == 1
