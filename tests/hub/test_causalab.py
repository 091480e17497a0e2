"""Submissions to the MIB benchmark on the Hub."""

from __future__ import annotations

from pathlib import Path

import featurizers
import pytest
from featurizers.errors import ManifestError, SourceError
from featurizers_causalab import read_submission

FIXTURES = Path(__file__).parents[1] / "fixtures" / "causalab"
MCQA = "4_answer_MCQA_Gemma2ForCausalLM_answer_pointer"


@pytest.fixture
def repo(hub):
    """Fill ``alice/mine`` with a submission and a folder of format 2.0."""
    record = hub.create("model", "alice/mine")
    files = dict(record["commits"][hub.head("alice/mine")]["files"])
    for path in FIXTURES.rglob("*/*"):
        if path.is_file():
            data = path.read_bytes()
            files[str(path.relative_to(FIXTURES))] = hub.entry(hub.put_bytes(data), len(data), False, data)
    hub.commit(record, "refs/heads/main", files, "files", "", "alice", hub.head("alice/mine"))


def test_a_submission_is_read_at_one_commit(hub, repo):
    found = read_submission("alice/mine", subfolder="submission")
    assert found.keys() == read_submission(FIXTURES / "submission").keys()
    assert {f.revision for f in found.values()} == {hub.head("alice/mine")}
    assert len(read_submission("alice/mine")) == 10


@pytest.mark.parametrize(
    ("unit", "site", "selected"),
    [
        (f"submission/{MCQA}/ResidualStream(Layer-5,Token-last_token)", "resid.post:5", [1, 4]),
        ("bundle/ResidualStream(Layer-3,block_output,Token-last_token)", "resid.post:3", [1]),
    ],
)
def test_one_unit_is_named(hub, repo, unit, site, selected):
    f = featurizers.load(f"causalab:alice/mine/{unit}")
    assert (str(f.site), f.feature_sets["selected"].tolist()) == (site, selected)
    assert f.revision == hub.head("alice/mine")
    assert not [request for request in hub.requests() if "Layer-8" in request]


def test_what_is_not_there(hub, repo):
    with pytest.raises(SourceError, match=r"has no unit 'x'; it has 'submission/4_answer.*\(Layer-3,"):
        featurizers.load("causalab:alice/mine/x")
    with pytest.raises(SourceError, match="write 'causalab:owner/name/FOLDER/UNIT'"):
        featurizers.load("causalab:alice/mine")
    with pytest.raises(ManifestError, match=r"holds 6 units.*or one from the Hub as causalab:"):
        featurizers.load("alice/mine", subfolder="submission")
