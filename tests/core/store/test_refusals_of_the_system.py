"""A disk that is full, broken, read-only or forbidden costs one line, and what was there before stays."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import featurizers
import pytest
from featurizers.errors import ArtefactError, HubError, UsageError
from featurizers.hub.transport import within

from tests.support.hub import subspace

CODES = (errno.EACCES, errno.EPERM, errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("code", CODES, ids=errno.errorcode.get)
@pytest.mark.parametrize("function", ["mkdir", "link", "rename", "replace", "fsync", "open"])
def test_a_save_that_the_system_refuses_leaves_the_old_artefact(tmp_path, monkeypatch, function, code):
    f, folder = subspace(), tmp_path / "a"
    f.save_pretrained(folder)
    (folder / "notes.txt").write_text("mine")
    before = content(folder)
    real = getattr(os, function)

    def refused(path, *rest, **options):
        if str(tmp_path) in str(path) or function == "fsync":
            raise OSError(code, os.strerror(code), str(path))
        return real(path, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, function, refused)
        try:
            f.save_pretrained(folder)
        except ArtefactError as error:
            message = str(error)
        else:
            message = ""  # it does without this function
    assert message.isprintable()
    assert set(content(folder)) == set(before)
    assert (folder / "notes.txt").read_text() == "mine"
    assert featurizers.load(folder).n_features == f.n_features
    f.save_pretrained(folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


@pytest.mark.parametrize("code", CODES, ids=errno.errorcode.get)
def test_a_cache_of_the_hub_that_cannot_be_written_is_one_line(code):
    def download():
        raise OSError(code, os.strerror(code), "/cache/\x1b[31m")

    with pytest.raises(HubError, match="the Hub could not be used") as caught:
        within(10, "owner/name", download)
    assert os.strerror(code) in str(caught.value)
    assert str(caught.value).isprintable()


def test_subfolders_that_differ_by_case_are_refused(tmp_path):
    with pytest.raises(UsageError, match="'layer-3' but for their case"):
        featurizers.save_collection({"Layer-3": subspace(), "layer-3": subspace()}, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_names_of_two_unicode_forms_are_refused(tmp_path):
    with pytest.raises(ArtefactError, match="artefacts") as caught:
        featurizers.save_collection({"é": subspace(), "e\u0301": subspace()}, tmp_path / "a")
    assert str(caught.value).isprintable()
