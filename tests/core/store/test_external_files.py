"""Folders whose format no plugin knows, and indices for files whose number of features is not known yet."""

from __future__ import annotations

import re

import featurizers
import pytest
import torch
from featurizers.errors import ManifestError, UsageError
from featurizers.hub.sources import FolderSource
from featurizers.store import external

from tests.plugins.sparsify.test_sparsify import write


def test_what_no_plugin_knows_is_named(tmp_path):
    (tmp_path / "weights.bin").write_bytes(b"x")
    asked = r"no installed plugin knows the format of 'weights\.bin'; plugins asked: (.*)\. Name the folder"
    with pytest.raises(ManifestError, match=asked) as caught:
        featurizers.load(tmp_path)
    readers = re.search(asked, str(caught.value))[1].split(", ")
    assert {"sae-lens", "sparsify"} <= set(readers)
    assert not {"training", "identity", "sharded"} & set(readers)  # they read no files


def test_an_enormous_folder_is_not_walked_through(tmp_path, monkeypatch):
    monkeypatch.setattr(external, "MAX_TREE", 10)
    for i in range(12):
        (tmp_path / f"{i}").mkdir()
    with pytest.raises(ManifestError, match=r"more than 10 files and folders, .*; name the folder of one featurizer"):
        featurizers.load(tmp_path)


@pytest.mark.parametrize("indices", [slice(3), [], [[1], [2]], torch.ones(4, dtype=torch.bool)], ids=str)
def test_features_to_load_are_a_list_of_numbers(indices, tmp_path):
    (tmp_path / "weights.bin").write_bytes(b"x")
    with pytest.raises(UsageError, match="give the features to load as a list of numbers"):
        featurizers.load(tmp_path, indices=indices)


def test_features_by_group_are_for_maps_between_sites(tmp_path):
    own = featurizers.create("dictionary", d_in=4, n_features=8, rule="relu").save_pretrained(tmp_path / "own")
    with pytest.raises(UsageError, match="indices by group are for maps between sites; of a featurizer give a list"):
        featurizers.load(own, indices={"out": [0, 1]})


def test_files_are_listed_from_the_folder(tmp_path):
    (tmp_path / "b").mkdir()
    for name in ("b/two", "a", "b/one"):
        (tmp_path / name).write_bytes(b"x")
    source = external.of_folder(FolderSource(tmp_path).path, None)
    assert source.names == ("a", "b/one", "b/two")
    with pytest.raises(ManifestError, match="there is no file 'c'"):
        source.path("c")


def test_files_of_another_library_are_held_to_what_is_asked_for(tmp_path):
    folder = write(tmp_path / "layers.10")
    with pytest.raises(UsageError, match="holds a featurizer of kind 'dictionary', not 'subspace'"):
        featurizers.load(folder, kind="subspace")
    with pytest.raises(UsageError, match="was written by another library, and holds no checksum; leave out verify"):
        featurizers.load(folder, verify=True)
    loaded = featurizers.load(folder, kind="dictionary", dtype=torch.float64)
    assert {tensor.dtype for tensor in loaded.state_dict().values()} == {torch.float64}
