"""A disk that is full, broken, read-only or forbidden costs one line, and what was there before stays."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

import featurizers
import pytest
from featurizers.errors import ArtefactError, HubError, UsageError
from featurizers.files import refuse_full
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

    with pytest.raises(HubError, match=r"cannot be written or read on this machine: .*; set HF_HOME") as caught:
        within(10, "owner/name", download)
    assert os.strerror(code) in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("code", CODES, ids=errno.errorcode.get)
def test_a_push_without_a_temporary_folder_is_one_line(monkeypatch, code):
    def refused(*_):
        raise OSError(code, os.strerror(code), "/tmp/\x1b[31m")

    monkeypatch.setattr(tempfile, "mkdtemp", refused)
    with pytest.raises(ArtefactError, match=r"temporary folder: it cannot be made: .*; set TMPDIR") as caught:
        subspace().push_to_hub("owner/name")
    assert os.strerror(code) in str(caught.value)
    assert str(caught.value).isprintable()


def not_writable(monkeypatch, folder):
    """Let the system say what it says of a folder of another user, or on a read-only disk; root may write to any."""
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode, **how: Path(path) != folder and real(path, mode, **how))


def test_a_folder_that_cannot_be_written_is_refused_before_the_work(tmp_path, monkeypatch):
    refuse_full(tmp_path / "new" / "deep")
    not_writable(monkeypatch, tmp_path)
    for out in (tmp_path / "new", tmp_path / "new" / "deep"):
        with pytest.raises(ArtefactError, match=r"it cannot be written: this user may not write to '.*'") as caught:
            refuse_full(out)
        assert str(tmp_path) in str(caught.value)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ArtefactError, match="file' is no folder"):
        refuse_full(tmp_path / "file" / "new")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArtefactError, match="it cannot be written"):
        refuse_full(Path("new"))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write to every folder")
def test_a_folder_without_the_permission_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(ArtefactError, match="this user may not write to"):
            refuse_full(tmp_path / "new")
        with pytest.raises(ArtefactError, match="it cannot be written: Permission denied"):
            subspace().save_pretrained(tmp_path / "new")
    finally:
        tmp_path.chmod(0o700)


def test_subfolders_that_differ_by_case_are_refused(tmp_path):
    with pytest.raises(UsageError, match="'layer-3' but for their case"):
        featurizers.save_collection({"Layer-3": subspace(), "layer-3": subspace()}, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_names_of_two_unicode_forms_are_refused(tmp_path):
    with pytest.raises(ArtefactError, match="artefacts") as caught:
        featurizers.save_collection({"é": subspace(), "e\u0301": subspace()}, tmp_path / "a")
    assert str(caught.value).isprintable()
