"""Only regular files are opened, in the named folder or among the blobs of the Hub's cache."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import featurizers
import pytest
import torch
import yaml
from featurizers.errors import (
    ArtefactError,
    ConfigError,
    ManifestError,
    UsageError,
    WeightsError,
    one_line,
    shown,
)
from featurizers.files.regular import contained, opened, read_bytes
from safetensors.torch import load_file, save_file

from tests.support.dictionaries import dictionary
from tests.support.hub import subspace

SHA = "0123456789abcdef" * 4


@pytest.fixture
def folder(tmp_path):
    return subspace().save_pretrained(tmp_path / "a")


def snapshot(folder: Path, cache: Path, *, shared: bool = False) -> Path:
    """Copy an artefact into a Hub cache: links to blobs, which may be links to blobs that repositories share."""
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
    (tmp_path / "cache").symlink_to(moved)  # as for a cache on another disk
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
    """Not even when the artefact is the current folder and the files have names that are imported."""
    ran = tmp_path / "ran"
    for name in ("__init__", "featurizers_subspace", "subspace", "modeling", "featurizer", "conftest", "sitecustomize"):
        (folder / f"{name}.py").write_text(f"open({str(ran)!r}, 'w')\n")
    before = list(sys.path)
    monkeypatch.chdir(folder)
    assert featurizers.load("./").basis.equal(subspace().basis)
    assert sys.path == before
    assert not ran.exists()


def test_a_folder_does_not_stand_for_a_repository(tmp_path, monkeypatch):
    """``alice/x`` is an error if there is such a folder."""
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


def test_nan_in_another_librarys_file_is_named_and_can_be_loaded(tmp_path):
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


# ---------------------------------------------------------------------- faults that a review found


def test_a_link_in_the_place_of_the_blobs_is_not_followed(folder, tmp_path):
    place = snapshot(folder, tmp_path / "cache")
    repository = tmp_path / "cache" / "models--alice--x"
    (tmp_path / "secret").write_text("hf_secret")
    shutil.rmtree(repository / "blobs")
    (repository / "blobs").symlink_to("/")
    for name in ("config.json", "model.safetensors", "README.md"):
        (place / name).unlink()
    subspace().save_pretrained(tmp_path / "b")
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(tmp_path / "b" / name, place / name)
    (place / "README.md").symlink_to(f"../../blobs{tmp_path}/secret")
    with pytest.raises(ArtefactError, match=r"README\.md is a link out of this folder"):
        featurizers.load(place)
    with pytest.raises(ArtefactError, match=r"README\.md is a link out of this folder"):
        featurizers.push(place, "alice/x")


def test_a_save_does_not_copy_what_a_card_links_to(folder, tmp_path):
    (tmp_path / "secret").write_text("hf_secret")
    (folder / "README.md").unlink()
    (folder / "README.md").symlink_to("../secret")
    with pytest.raises(ArtefactError, match=r"README\.md is a link out of this folder"):
        subspace().save_pretrained(folder)
    assert (folder / "README.md").is_symlink()


def test_a_part_of_another_library_may_not_lie_elsewhere(tmp_path):
    featurizers.convert(dictionary("relu"), tmp_path / "sae", to="sae-lens")
    (tmp_path / "many").mkdir()
    (tmp_path / "many" / "layer0").symlink_to(tmp_path / "sae")
    for subfolder in ("layer0", "../sae"):
        with pytest.raises(ManifestError, match="is a link out of this folder"):
            featurizers.load(tmp_path / "many", subfolder=subfolder)


def test_folders_that_lie_too_deep(folder):
    here, depth = os.open(folder, os.O_RDONLY), 1200
    for _ in range(depth):
        os.mkdir("a", dir_fd=here)
        there = os.open("a", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = there
    os.close(here)
    try:
        with pytest.raises(ArtefactError, match="lie more than 64 deep"):
            subspace(seed=1).save_pretrained(folder)
        assert [path.name for path in folder.parent.iterdir()] == ["a"]
        (folder / "config.json").unlink()
        with pytest.raises(ManifestError, match="64 levels"):
            featurizers.load(folder)
    finally:
        subprocess.run(["rm", "-rf", str(folder)], check=True)


def test_many_tensors_cost_no_time(tmp_path):
    featurizers.convert(dictionary("relu"), tmp_path / "sae", to="sae-lens")
    path = tmp_path / "sae" / "sae_weights.safetensors"
    save_file({**load_file(path), **{f"{i}": torch.zeros(0) for i in range(100)}}, path, {"format": "pt"})
    with pytest.raises(WeightsError, match=r"sae_weights\.safetensors has 10\d tensors; an autoencoder has at most 32"):
        featurizers.load(tmp_path / "sae")


NAMES = ("float8_e4m3fn", "float8_e8m0fnu", "complex64", "int64")  # the second came with torch 2.7
NOT_NUMBERS = [getattr(torch, name) for name in NAMES if hasattr(torch, name)]


@pytest.mark.parametrize("dtype", NOT_NUMBERS, ids=str)
@pytest.mark.parametrize("options", [{}, {"allow_nonfinite": True}], ids=["", "any"])
def test_weights_that_are_no_floating_point_numbers(tmp_path, dtype, options):
    featurizers.convert(dictionary("relu"), tmp_path / "d", to="dictionary-learning")
    state = torch.load(tmp_path / "d" / "ae.pt", weights_only=True)
    torch.save({name: tensor.to(dtype) for name, tensor in state.items()}, tmp_path / "d" / "ae.pt")
    with pytest.raises((WeightsError, ConfigError), match=f"{str(dtype).removeprefix('torch.')}|floating point"):
        featurizers.load(tmp_path / "d", **options)


def test_a_licence_is_not_taken_for_our_mark(tmp_path):
    f = subspace()
    f.metadata = {"license": "<!-- featurizers: start --> \U0001f600"}
    folder = f.save_pretrained(tmp_path / "a")
    text = (folder / "README.md").read_text(encoding="utf-8").replace("\n---\n", "\n---\nMINE\n", 1)
    (folder / "README.md").write_text(text, encoding="utf-8")
    subspace(seed=1).save_pretrained(folder)
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert text.count("MINE") == text.count("featurizers: end") == 1
    assert yaml.safe_load(text.split("---\n")[1])["license"] == f.metadata["license"]


@pytest.mark.parametrize("indices", ["0", [[0], [1]], [(0,)]], ids=str)
def test_malformed_indices_are_refused_for_another_library(tmp_path, indices):
    featurizers.convert(dictionary("relu"), tmp_path / "sae", to="sae-lens")
    with pytest.raises(UsageError, match="a list of numbers"):
        featurizers.load(tmp_path / "sae", indices=indices)


def test_a_name_with_controls_is_escaped_in_every_error(tmp_path):
    featurizers.convert(dictionary("relu"), tmp_path / "a\n\x1b[2J", to="sae-lens")
    with pytest.raises(UsageError, match="holds no checksum") as caught:
        featurizers.load(tmp_path / "a\n\x1b[2J", verify=True)
    assert str(caught.value).isprintable()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there(tmp_path):
    featurizers.convert(dictionary("relu"), tmp_path / "sae", to="sae-lens")
    featurizers.create("subspace", d_in=8, n_features=2).save_pretrained(tmp_path / "own")
    for source in (tmp_path / "sae", tmp_path / "own"):
        with pytest.raises(UsageError, match="the device 'cuda:0' cannot be used here") as caught:
            featurizers.load(source, device="cuda:0")
        assert "safetensors" not in str(caught.value)


def test_a_device_without_values(tmp_path):
    featurizers.create("subspace", d_in=8, n_features=2).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="'meta' have no values"):
        featurizers.load(tmp_path, device="meta")
