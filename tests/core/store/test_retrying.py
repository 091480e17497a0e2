"""Reads of a folder that another program writes to at the same time."""

from __future__ import annotations

import os
from pathlib import Path

import featurizers
import pytest
from featurizers.errors import ArtefactError, UsageError, WeightsError
from featurizers.registry import host
from featurizers.store import read_unchanged, retrying

from tests.support.dictionaries import dictionary
from tests.support.hub import subspace


class Reader:
    """Reads that rewrite the watched file as often as told, and then may raise an error."""

    def __init__(self, folder: Path, changes: int, error: Exception | None = None) -> None:
        self.path, self.changes, self.error, self.calls = folder / "a", changes, error, 0

    def __call__(self) -> int:
        self.calls += 1
        changed = self.calls <= self.changes
        if changed:
            self.path.write_text("x" * self.calls)
        if self.error and (changed or not self.changes):
            raise self.error
        return self.calls


def test_a_read_of_unchanged_files_is_the_only_one(tmp_path):
    read = Reader(tmp_path, 0)
    assert read_unchanged(tmp_path, ("a", "b"), read, "here") == read.calls == 1


@pytest.mark.parametrize("error", [None, WeightsError("here", "of two versions")])
def test_a_read_of_two_versions_is_repeated(tmp_path, error):
    read = Reader(tmp_path, 2, error)
    assert read_unchanged(tmp_path, ("a",), read, "here") == read.calls == 3


@pytest.mark.parametrize("error", [UsageError("wrong"), KeyError("not of this library")])
def test_an_error_of_unchanged_files_is_raised(tmp_path, error):
    read = Reader(tmp_path, 0, error)
    with pytest.raises(type(error)) as caught:
        read_unchanged(tmp_path, ("a",), read, "here")
    assert caught.value is error
    assert read.calls == 1


def test_a_file_that_changes_in_every_read_is_an_error(tmp_path):
    read = Reader(tmp_path, 1000)
    with pytest.raises(ArtefactError, match="here: another program keeps writing to it; load it when that one has"):
        read_unchanged(tmp_path, ("a",), read, "here")
    assert read.calls == retrying.RETRIES


def test_a_load_opens_each_file_once(tmp_path, monkeypatch):
    folder = subspace().save_pretrained(tmp_path / "a")
    real_open, opened = os.open, []

    def counted(path, *arguments, **options):
        opened.append(Path(path).name)
        return real_open(path, *arguments, **options)

    monkeypatch.setattr(os, "open", counted)
    featurizers.load(folder)
    assert sorted(opened) == ["config.json", "model.safetensors"]


def test_files_of_another_library_that_an_artefact_replaces_while_they_are_read(tmp_path, monkeypatch):
    folder, new = tmp_path / "a", subspace()
    featurizers.convert(dictionary("topk"), folder, to="sparsify")
    ask, replaced = host().ask, []

    def replace(hook, *arguments, **options):
        if hook == "featurizers_read" and not replaced:
            replaced.append([path.unlink() for path in folder.iterdir()])
            new.save_pretrained(folder)
        return ask(hook, *arguments, **options)

    monkeypatch.setattr(host(), "ask", replace)
    assert featurizers.load(folder).kind == "subspace"
    assert replaced
