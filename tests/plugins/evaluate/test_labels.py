"""Labels from exports of Neuronpedia and runs of delphi, whose rows are written here as those programs write them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import featurizers
import pytest
from featurizers import Label, Labels
from featurizers.errors import ArtefactError, FeatureIndexError, UsageError
from featurizers_evaluate import import_labels
from featurizers_transcoder import CrossLayerTranscoder

from tests.support.command import as_json, run
from tests.support.hub import subspace
from tests.support.site_maps import linear_map


def at(site: str | None = "resid.post:5", n_features: int = 8) -> Any:
    f = subspace(n_features=n_features)
    f.site = site
    return f


def row(index: Any, text: Any, layer: str = "5-res-jb", **fields: Any) -> dict[str, Any]:
    """Return a row of explanations as the public data sets have it."""
    return {
        "id": f"c{index}",
        "modelId": "gpt2-small",
        "layer": layer,
        "index": index,
        "description": text,
        "explanationModelName": "gpt-4o-mini",
        "typeName": "oai_token-act-pair",
        "embedding": [0.1, -0.2],
        **fields,
    }


def neuronpedia(folder: Path, *batches: list[dict[str, Any]]) -> Path:
    (folder / "explanations").mkdir(parents=True)
    for number, rows in enumerate(batches):
        with gzip.open(folder / "explanations" / f"batch-{number}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps(each) + "\n" for each in rows)
    return folder


def delphi(run: Path, explanations: dict[str, Any], **scores: dict[str, Any]) -> Path:
    """Write a run as delphi does: JSON in a text file for each latent, named after module and number."""
    for folder, files in {
        "explanations": explanations,
        **{f"scores/{name}": own for name, own in scores.items()},
    }.items():
        (run / folder).mkdir(parents=True)
        for name, content in files.items():
            (run / folder / f"{name}.txt").write_text(json.dumps(content))
    (run / "run_config.json").write_text(json.dumps({"explainer_model": "meta-llama/70B", "name": "x"}))
    return run


def answer(activating: bool, prediction: Any) -> dict[str, Any]:
    return {"str_tokens": ["a"], "activating": activating, "prediction": prediction, "correct": None, "distance": 1}


# ---------------------------------------------------------------------- Neuronpedia


def test_an_export_of_neuronpedia(tmp_path):
    first = [row("0", "months\nof the year"), row(7, "rivers"), row("3", " ")]
    second = [row("7", "water", explanationModelName=None), row("7", "rivers")]
    folder = neuronpedia(tmp_path / "x", first, second)
    expected = [
        Label(0, "months of the year", "gpt-4o-mini"),
        Label(7, "rivers", "gpt-4o-mini"),
        Label(7, "water", "oai_token-act-pair"),
    ]
    f = at()
    for path in (folder, folder / "explanations"):
        assert list(import_labels(path, f)) == expected
    assert list(import_labels(folder / "explanations" / "batch-1.jsonl.gz", f)) == [expected[2], expected[1]]
    f.labels = import_labels(folder, f)
    assert featurizers.load(f.save_pretrained(tmp_path / "a")).labels == Labels(expected)


def test_batches_are_read_in_the_order_of_their_numbers(tmp_path):
    folder = neuronpedia(tmp_path / "x", *([row(0, f"text {i}")] for i in range(12)))
    assert [label.text for label in import_labels(folder, at())] == [f"text {i}" for i in range(12)]


def test_the_layer_chooses_and_other_layers_are_refused(tmp_path):
    folder = neuronpedia(tmp_path / "x", [row(0, "five"), row(0, "six", "6-res-jb"), row(1, "mlp", "6-mlp")])
    assert [label.text for label in import_labels(folder, at())] == ["five"]
    with pytest.raises(UsageError, match="of '6-res-jb', '6-mlp'; choose one with place="):
        import_labels(folder, at("resid.post:6"))
    assert [label.text for label in import_labels(folder, at("resid.post:6"), place="6-mlp")] == ["mlp"]
    with pytest.raises(UsageError, match=r"of '5-res-jb', .*, and 'subspace' belongs to resid.post:7"):
        import_labels(folder, at("resid.post:7"))
    with pytest.raises(UsageError, match="choose one"):
        import_labels(folder, at(None))
    with pytest.raises(UsageError, match="not of 'other'"):
        import_labels(folder, at(), place="other")


def test_layers_become_groups_of_a_map(tmp_path):
    f = linear_map(CrossLayerTranscoder, {i: ([f"in-{i}"], [f"out-{i}"]) for i in range(2)})
    f.reads = {f"in-{i}": f"mlp.in:{i + 4}" for i in range(2)}
    f.writes = {f"out-{i}": f"mlp.out:{i + 4}" for i in range(2)}
    folder = neuronpedia(tmp_path / "x", [row(3, "four", "4-clt"), row(3, "five", "5-clt"), row(3, "six", "6-clt")])
    first, second = f.groups
    f.labels = import_labels(folder, f)
    assert [label.text for label in f.labels.of(3, first)] == ["four"]
    assert [label.text for label in f.labels.of(3, second)] == ["five"]
    assert len(f.labels) == 2


def test_a_feature_that_is_not_there_is_refused(tmp_path):
    f = at()
    found = import_labels(neuronpedia(tmp_path / "x", [row("8", "eight")]), f)
    with pytest.raises(FeatureIndexError, match="of feature 8, and 'subspace' has 8"):
        f.labels = found


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"{", "line 2 of batch-0.jsonl is not valid JSON"),
        (b'{"index": 1}', "line 2 of batch-0.jsonl is no explanation: it lacks"),
        (json.dumps(row("x", "text")).encode(), "has index 'x'"),
        (json.dumps(row(True, "text")).encode(), "has index True"),
        (json.dumps(row(0, 3)).encode(), "text 3"),
        (json.dumps(row(-1, "a")).encode(), "line 2 of batch-0.jsonl: a label is of a feature"),
        (b'"' + b"x" * 1_000_001, "a line is larger than"),
    ],
)
def test_a_damaged_row_is_named(tmp_path, line, words):
    path = tmp_path / "batch-0.jsonl"
    path.write_bytes(json.dumps(row(0, "a")).encode() + b"\n" + line + b"\n")
    with pytest.raises(ArtefactError, match=words):
        import_labels(path, at())


def test_packed_files_are_read_within_bounds(tmp_path, monkeypatch):
    good = gzip.compress(json.dumps(row(0, "a")).encode() + b"\n")
    for name, raw, words in {
        ("cut", good[:-9], "cannot be unpacked"),
        ("other", b"<html>", "cannot be unpacked"),
        ("flipped", good[:14] + b"\xff\xff" + good[16:], "batch.jsonl.gz"),
        ("bomb", gzip.compress(bytes(30_000_000)), "a line is larger than 1000000 bytes"),
    }:
        (tmp_path / name).mkdir()
        (tmp_path / name / "batch.jsonl.gz").write_bytes(raw)
        with pytest.raises(ArtefactError, match=words):
            import_labels(tmp_path / name, at())
    monkeypatch.setattr("featurizers_evaluate.labels.MAX_UNPACKED", 1000)
    with pytest.raises(ArtefactError, match="the export, unpacked, is larger"):
        import_labels(neuronpedia(tmp_path / "x", *[[row(i, "a")] for i in range(8)]), at())


def test_texts_are_fit_to_print(tmp_path):
    folder = neuronpedia(tmp_path / "x", [row(0, "\x1b[2J\u202eabc", explanationModelName="a\tb\x07")])
    assert list(import_labels(folder, at())) == [Label(0, "\\x1b[2J\\u202eabc", "a b\\x07")]


# ---------------------------------------------------------------------- delphi


def test_a_run_of_delphi(tmp_path):
    explanations = {
        "layers.5_latent0": "months",
        "layers.5_latent10": "rivers",
        "layers.5_latent3": "Explanation could not be parsed.",
        "layers.6_latent1": "other",
    }
    detection = {
        "layers.5_latent0": [answer(True, True), answer(True, 0), answer(False, False), answer(False, None)],
        "layers.5_latent10": [answer(True, True)],
    }
    folder = delphi(
        tmp_path / "x",
        explanations,
        detection=detection,
        fuzz={"layers.5_latent0": [answer(True, 1), answer(False, 0)]},
    )
    f = featurizers.create("subspace", d_in=16, n_features=12)
    f.site = "resid.post:5"
    # half of the examples with the feature and all without it were told right
    assert list(import_labels(folder, f)) == [
        Label(0, "months", "meta-llama/70B", score=0.75),
        Label(10, "rivers", "meta-llama/70B"),
    ]
    assert import_labels(folder, f, scorer="fuzz").of(0)[0].score == 1
    with pytest.raises(UsageError, match="scores of 'detection', 'fuzz', not of 'x'"):
        import_labels(folder, f, scorer="x")
    f.labels = import_labels(folder, f)
    assert len(f.labels) == 2


def test_scores_are_those_of_delphis_own_analysis(tmp_path):
    """Its ``compute_classification_metrics`` averages the rates of true positives and true negatives."""
    answers = [answer(i % 3 == 0, i % 2 == 0) for i in range(20)]
    folder = delphi(tmp_path / "x", {"layers.5_latent0": "a"}, fuzz={"layers.5_latent0": answers})
    positives = [a for a in answers if a["activating"]]
    negatives = [a for a in answers if not a["activating"]]
    sensitivity = sum(a["prediction"] for a in positives) / len(positives)
    specificity = 1 - sum(a["prediction"] for a in negatives) / len(negatives)
    (label,) = import_labels(folder, at())
    assert label.score == pytest.approx((sensitivity + specificity) / 2)


def test_a_damaged_run_is_refused(tmp_path):
    folder = delphi(tmp_path / "x", {"layers.5_latent0": {"text": "a"}})
    with pytest.raises(ArtefactError, match=r"latent0.txt holds \{'text': 'a'\}, not the text"):
        import_labels(folder, at())
    folder = delphi(tmp_path / "y", {"layers.5_latent0": "a"}, fuzz={"layers.5_latent0": [{"score": 1}]})
    with pytest.raises(ArtefactError, match="no list of answers"):
        import_labels(folder, at())
    folder, secret = delphi(tmp_path / "z", {"layers.5_latent0": "a"}), tmp_path / "secret"
    secret.write_text('"a secret"')
    (folder / "explanations" / "layers.5_latent1.txt").symlink_to(secret)
    with pytest.raises(ArtefactError, match="is a link out of this folder"):
        import_labels(folder / "explanations", at())
    with pytest.raises(UsageError, match=r"has neither explanations/batch-N.jsonl.gz"):
        import_labels(tmp_path, at())


# ---------------------------------------------------------------------- the command


def test_the_command_adds_labels_to_an_artefact(tmp_path):
    f = at()
    f.labels = [Label(0, "mine", "alice")]
    folder = f.save_pretrained(tmp_path / "a")
    export = neuronpedia(tmp_path / "x", [row("0", "months"), row("7", "rivers")])
    assert as_json("labels", folder, export)["authors"] == {"gpt-4o-mini": 2, "alice": 1}
    as_json("labels", folder, export)  # once more changes nothing
    assert len(featurizers.load(folder).labels) == 3
    as_json("labels", folder, export, "--replace", "--out", tmp_path / "b")
    assert featurizers.load(tmp_path / "b").labels.authors == {"gpt-4o-mini": 2}
    code, _, error = run("labels", "owner/name", export)
    assert code == 1
    assert "give --out" in error
