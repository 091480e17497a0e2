"""Zip bombs, links and pipes among the files of a submission: each costs one line, and nothing outside is read."""

from __future__ import annotations

import os
import shutil
import zipfile
from pathlib import Path

import pytest
from featurizers.errors import FeaturizerError
from featurizers_causalab import read_submission

SUBMISSION = Path(__file__).parents[2] / "fixtures" / "causalab" / "submission"


def zipped(*entries: tuple[str, bytes], method: int = zipfile.ZIP_STORED):
    def spoil(path: Path) -> None:
        with zipfile.ZipFile(path, "w", method) as file:
            for name, data in entries:
                file.writestr(name, data)

    return spoil


def with_a_link(path: Path) -> None:
    with zipfile.ZipFile(path, "a") as file:
        entry = zipfile.ZipInfo("archive/data/9")
        entry.external_attr = 0o120777 << 16
        file.writestr(entry, "/etc/passwd")


def replaced(make):
    def spoil(path: Path) -> None:
        path.unlink()
        make(path)

    return spoil


HOSTILE = {
    "a compressed pickle": (
        zipped(("archive/data.pkl", b"\0" * 10**8), method=zipfile.ZIP_DEFLATED),
        "is a compressed zip archive",
    ),
    "compressed tensors": (
        zipped(("archive/data.pkl", b"\x80\x02}."), ("archive/data/0", b"\0" * 10**8), method=zipfile.ZIP_DEFLATED),
        "is a compressed zip archive",
    ),
    "very many entries": (zipped(*((f"archive/data/{i}", b"") for i in range(50_001))), "at most 50000 are read"),
    "a path that leads out": (
        zipped(("../../x", b""), ("archive/data.pkl", b"\x80\x02}.")),
        "torch.save did not write",
    ),
    "a link in the archive": (with_a_link, "that torch.save did not"),
    "a link out of the folder": (
        replaced(lambda path: os.symlink("/etc/passwd", path)),
        "is a link out of this folder",
    ),
    "a pipe": (replaced(os.mkfifo), "is a named pipe"),
    "a folder": (replaced(os.mkdir), "is missing"),
}


@pytest.fixture
def submission(tmp_path):
    return Path(shutil.copytree(SUBMISSION, tmp_path / "s"))


@pytest.mark.parametrize(("spoil", "words"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_file_of_a_unit_costs_one_line(submission, spoil, words):
    spoil(min(submission.rglob("*_featurizer")))
    with pytest.raises(FeaturizerError, match=words) as caught:
        read_submission(submission)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize("target", [".", "..", "/etc"])
def test_links_to_folders_are_not_followed(submission, target):
    before = list(read_submission(submission))
    os.symlink(target, submission / "loop")
    assert list(read_submission(submission)) == before


def test_a_link_to_itself_costs_one_line(submission):
    os.symlink("loop", submission / "loop")
    with pytest.raises(FeaturizerError, match="it cannot be listed: Too many levels"):
        read_submission(submission)
