"""Folders whose format no plugin knows, and indices for files whose number of features is not known yet."""

from __future__ import annotations

import featurizers
import pytest
import torch
from featurizers.errors import ManifestError, UsageError
from featurizers.hub.sources import FolderSource
from featurizers.store import external


def test_what_no_plugin_knows_is_named(tmp_path):
    (tmp_path / "weights.bin").write_bytes(b"x")
    with pytest.raises(ManifestError, match=r"no installed plugin knows the format of 'weights\.bin'; plugins asked: "):
        featurizers.load(tmp_path)


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


def test_files_are_listed_from_the_folder(tmp_path):
    (tmp_path / "b").mkdir()
    for name in ("b/two", "a", "b/one"):
        (tmp_path / name).write_bytes(b"x")
    source = external.of_folder(FolderSource(tmp_path).path, None)
    assert source.names == ("a", "b/one", "b/two")
    with pytest.raises(ManifestError, match="there is no file 'c'"):
        source.path("c")
