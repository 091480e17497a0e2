"""Labels of features: their file, their checks, and the features that they follow through slices and maps."""

from __future__ import annotations

import copy
import hashlib
import json
import pickle
from pathlib import Path
from typing import Any

import featurizers
import pytest
import torch
from featurizers import Collect, Label, Labels
from featurizers.errors import ArtefactError, FeatureIndexError, ManifestError, UsageError
from featurizers_transcoder import CrossLayerTranscoder

from tests.support.command import run
from tests.support.dictionaries import dictionary
from tests.support.hub import subspace
from tests.support.models import fresh_model
from tests.support.site_maps import linear_map

RIVERS = Label(2, "names of rivers", "gpt-4o-mini", score=0.75)
WATER = Label(2, "water", "alice")
CODE = Label(0, "closing brackets ] in code", "alice", score=-1)
LABELS = [WATER, RIVERS, CODE]


def labelled() -> Any:
    f = subspace()
    f.labels = LABELS
    return f


def cross_layer(groups: int) -> Any:
    return linear_map(CrossLayerTranscoder, {i: ([f"in-{i}"], [f"out-{i}"]) for i in range(groups)})


def test_labels_are_saved_and_loaded(tmp_path):
    folder = labelled().save_pretrained(tmp_path / "a")
    rows = [json.loads(line) for line in (folder / "feature_labels.jsonl").read_text().splitlines()]
    assert rows == [
        {"feature": 0, "text": "closing brackets ] in code", "author": "alice", "score": -1},
        {"feature": 2, "text": "water", "author": "alice"},
        {"feature": 2, "text": "names of rivers", "author": "gpt-4o-mini", "score": 0.75},
    ]
    again = featurizers.load(folder, verify=True)
    assert again.labels == Labels(LABELS)
    assert again.labels.of(2) == (WATER, RIVERS)
    assert again.labels.of(1) == ()
    assert again.metadata == {}
    about = json.loads((folder / "config.json").read_text())["metadata"]["feature_labels"]
    digest = hashlib.sha256((folder / "feature_labels.jsonl").read_bytes()).hexdigest()
    assert about == {"sha256": digest, "labels": 3, "features": 2, "authors": {"alice": 2, "gpt-4o-mini": 1}}
    assert "| labels | 3 of 2 features, by alice (2), gpt-4o-mini (1) |" in (folder / "README.md").read_text()
    again.labels = None
    again.save_pretrained(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert featurizers.load(folder).labels is None


def test_the_command_shows_and_verifies_them(tmp_path):
    folder = labelled().save_pretrained(tmp_path / "a")
    code, out, _ = run("info", folder)
    assert code == 0
    assert "3 of 2 features, by alice (2)" in " ".join(out.replace("│", " ").split())
    with (folder / "feature_labels.jsonl").open("ab") as file:
        file.write(b"\n")
    code, out, _ = run("verify", folder, "--json")
    assert code == 1
    assert "was changed by hand" in out


def test_an_artefact_of_a_collection_and_a_copy_have_them(tmp_path):
    f = labelled()
    for other in (copy.deepcopy(f), pickle.loads(pickle.dumps(f))):
        assert other.labels == f.labels
    featurizers.save_collection({"x": f, "y": subspace()}, tmp_path / "c")
    assert featurizers.load(tmp_path / "c", subfolder="x").labels == f.labels
    assert featurizers.load(tmp_path / "c", subfolder="y").labels is None


def test_search_and_tables():
    labels = Labels(LABELS)
    assert list(labels.search("RIVER")) == [RIVERS]
    assert list(labels.search("]")) == [CODE]
    assert list(labels.search("", author="alice")) == [CODE, WATER]
    assert labels.authors == {"alice": 2, "gpt-4o-mini": 1}
    table = labels.to_pandas()
    assert list(table.columns) == ["feature", "text", "author", "score", "group"]
    assert list(table["feature"]) == [0, 2, 2]
    assert list(Labels([]).to_pandas().columns) == list(table.columns)


def test_columns_of_what_is_collected_have_the_labels_of_their_features():
    model = fresh_model("llama")
    f = featurizers.create("subspace", d_in=32, n_features=3)
    f.labels = LABELS
    collect = Collect(f, indices=[2, 1])
    with featurizers.intervene(model, {"resid.post:0": collect}) as found:
        model(input_ids=torch.tensor([[1, 2]]))
    labels = collect.labels()
    assert len(labels) == found["resid.post:0"].shape[-1]
    assert labels == [(WATER, RIVERS), ()]
    assert Collect(f).labels() == [(CODE,), (), (WATER, RIVERS)]
    assert Collect(f, indices=torch.tensor([True, False, False])).labels() == [(CODE,)]
    with pytest.raises(FeatureIndexError):
        Collect(f, indices=[3]).labels()
    with pytest.raises(UsageError, match="any width"):
        Collect(featurizers.create("identity")).labels()


def test_a_slice_keeps_the_labels_of_its_own_features(tmp_path):
    f = dictionary("relu", d_in=8)
    n = f.n_features
    f.labels = [Label(i, f"feature {i}", "alice") for i in range(0, n, 2)]
    folder = f.save_pretrained(tmp_path / "a")
    chosen = [n - 2, 1, 4]
    for part in (f.take(chosen), featurizers.load(folder, indices=chosen)):
        assert [label.feature for label in part.labels] == [4, n - 2]
        assert Collect(part).labels() == [f.labels.of(i) for i in chosen]
        assert Collect(part, indices=[4]).labels() == [f.labels.of(4)]
        saved = featurizers.load(part.save_pretrained(tmp_path / "part"))
        assert saved.labels == part.labels
        part.labels = f.labels  # those of the whole
        assert [label.feature for label in part.labels] == [4, n - 2]
    assert f.in_units("decoder-norm").labels == f.labels


def test_features_of_a_map_are_labelled_by_group(tmp_path):
    f = cross_layer(2)
    first, second = f.groups
    f.labels = [Label(1, "one", "alice", group=second), Label(0, "zero", "alice", group=first)]
    again = featurizers.load(f.save_pretrained(tmp_path / "a"))
    assert again.labels == f.labels
    assert [label.text for label in again.labels.of(1, second)] == ["one"]
    with pytest.raises(UsageError, match="give group="):
        again.labels.of(1)
    by_group = Collect(again, indices={second: [1, 0]}).labels()
    assert by_group == {second: [f.labels.of(1, second), ()]}
    part = featurizers.load(tmp_path / "a", indices={first: [0]})
    assert [label.text for label in part.labels] == ["zero"]
    with pytest.raises(UsageError, match="of no group"):
        f.labels = [Label(1, "one", "alice")]
    with pytest.raises(UsageError, match=r"of the group 'other'.*whose groups are"):
        f.labels = [Label(1, "one", "alice", group="other")]
    with pytest.raises(FeatureIndexError, match="in the group"):
        f.labels = [Label(10**6, "one", "alice", group=first)]


def test_a_group_that_is_the_only_one_goes_without_saying():
    f = cross_layer(1)
    (only,) = f.groups
    f.labels = [Label(1, "one", "alice")]
    assert [label.group for label in f.labels] == [only]
    assert f.labels.of(1) == f.labels.of(1, only) == (Label(1, "one", "alice", group=only),)


@pytest.mark.parametrize(
    ("labels", "error", "words"),
    [
        ([Label(3, "x", "a")], FeatureIndexError, "of feature 3, and 'subspace' has 3, which are numbered from 0"),
        ([WATER, WATER], UsageError, "'alice' says the same of feature 2 twice: 'water'"),
        ([Label(0, "x", "a", group="g")], UsageError, "of the group 'g', of feature 0 of 'subspace', whose features"),
        ([(0, "x", "a")], UsageError, "not of tuple"),
    ],
)
def test_labels_that_do_not_fit_are_refused(labels, error, words):
    f = labelled()
    with pytest.raises(error, match=words):
        f.labels = labels
    assert f.labels == Labels(LABELS)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((True, "x", "a"), "not of True"),
        ((-1, "x", "a"), "not of -1"),
        ((2**31, "x", "a"), "from 0 on"),
        ((0, "", "a"), "the text of a label of feature 0"),
        ((0, " ", "a"), "the text"),
        ((0, "x\ny", "a"), r"not 'x\\ny'"),
        ((0, "\x1b[2J", "a"), r"not '\\x1b\[2J'"),
        ((0, "a\u202eb", "a"), r"printable characters, not 'a\\u202eb'"),
        ((0, "\ud800", "a"), "printable"),
        ((0, "x" * 5000, "a"), "1 to 4000"),
        ((0, 3, "a"), "not 3"),
        ((0, "x", ""), "the author"),
        ((0, "x", "a" * 300), "1 to 256"),
        ((0, "x", "a", "high"), "the score of a label of feature 0 is a number, not 'high'"),
        ((0, "x", "a", float("nan")), "not nan"),
        ((0, "x", "a", True), "not True"),
        ((0, "x", "a", None, ""), "the group"),
    ],
)
def test_a_label_is_one_line_with_a_number_and_an_author(arguments, words):
    with pytest.raises(UsageError, match=words):
        Label(*arguments)


LINE = b'{"feature": 0, "text": "x", "author": "a"}\n'


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"<html>", "line 1 of feature_labels.jsonl is not valid JSON: it is a web page"),
        (LINE + b"[1]\n", r"line 2 of feature_labels.jsonl is \[1\], not an object"),
        (LINE + b'{"feature": 1, "text": "x"}\n', "line 2 .* not an object with feature, text, author"),
        (LINE.replace(b"}", b', "code": 1}'), "line 1 .* not an object with"),
        (LINE.replace(b"}", b', "text": "y"}'), "the key 'text' is repeated"),
        (LINE.replace(b"}", b', "score": NaN}'), "NaN is not a JSON number"),
        (LINE.replace(b'"x"', b'"\\u001b[2J"'), r"not '\\x1b\[2J'"),
        (LINE.replace(b'"x"', b'"\xff"'), "line 1 .* not valid JSON"),
        (LINE.replace(b"0,", b"7,"), "a label is of feature 7, and 'subspace' has 3"),
        (LINE.replace(b'"x"', b'"%b"' % (b"x" * 70_000)), "is larger than 65536 bytes"),
        (LINE + LINE, "twice"),
        (b"[" * 600 + b"]" * 600, "nested"),
        (b"", "line 1 .* it is empty"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, raw, words):
    folder = labelled().save_pretrained(tmp_path / "a")
    forge(folder, raw)
    with pytest.raises(ArtefactError, match=words):
        featurizers.load(folder)


def forge(folder: Path, raw: bytes, **changes: Any) -> None:
    """Write other labels, with the checksum that fits them."""
    (folder / "feature_labels.jsonl").write_bytes(raw)
    config = json.loads((folder / "config.json").read_text())
    config["metadata"]["feature_labels"] |= {"sha256": hashlib.sha256(raw).hexdigest(), "labels": 1, **changes}
    (folder / "config.json").write_text(json.dumps(config))


def test_a_record_that_does_not_fit_is_refused(tmp_path):
    folder = labelled().save_pretrained(tmp_path / "a")
    forge(folder, LINE, labels=2)
    with pytest.raises(ArtefactError, match=r"has another number of labels \(1\) than its config says \(2\)"):
        featurizers.load(folder)
    forge(folder, LINE, authors={"\x1b": 1})
    with pytest.raises(ManifestError, match=r"metadata\.feature_labels does not describe labels"):
        featurizers.load(folder)
    forge(folder, LINE, authors={"a": 1})
    (folder / "feature_labels.jsonl").unlink()
    with pytest.raises(ArtefactError, match=r"feature_labels\.jsonl cannot be read"):
        featurizers.load(folder)
    (folder / "feature_labels.jsonl").symlink_to("/etc/passwd")
    with pytest.raises(ArtefactError, match="is a link out of this folder"):
        featurizers.load(folder)
    f = subspace()
    f.metadata["feature_labels"] = ["mine"]
    with pytest.raises(ManifestError, match="rename it"):
        f.save_pretrained(tmp_path / "b")


def test_an_author_cannot_break_the_card(tmp_path):
    f = subspace()
    f.labels = [Label(0, "x", "<!-- featurizers: end --> | [a](b)")]
    card = (f.save_pretrained(tmp_path / "a") / "README.md").read_text()
    assert card.count("<!-- featurizers: end -->") == 1
    assert r"\| \[a\](b)" in card


def test_another_format_that_lacks_labels_says_so(tmp_path):
    f = dictionary("relu", d_in=8)
    f.labels = [Label(0, "x", "a")]
    f.site = "resid.post:0"
    assert "The labels of 1 features are not kept." in featurizers.convert(f, tmp_path / "a", "sae-lens")
