"""Labels of features on the Hub: pushed, loaded at the commit, and pulled."""

from __future__ import annotations

import featurizers
import pytest
from featurizers import Label, Labels
from featurizers.errors import ArtefactError, ManifestError, WeightsError

from tests.support.command import run
from tests.support.hub import subspace

LABELS = [Label(2, "names of rivers", "gpt-4o-mini", score=0.75), Label(0, "code", "alice")]


def test_labels_are_pushed_loaded_and_pulled(hub, tmp_path):
    f = subspace()
    f.labels = LABELS
    first = f.push_to_hub("alice/x")
    f.labels = [Label(1, "other", "alice")]
    f.push_to_hub("alice/x")
    assert "feature_labels.jsonl" in hub.files("alice/x")
    assert featurizers.load("alice/x").labels == Labels(f.labels)
    again = featurizers.load("alice/x", revision=first.oid, verify=True)
    assert again.labels == Labels(LABELS)
    assert featurizers.load("alice/x", revision=first.oid, local_files_only=True).labels == Labels(LABELS)
    code, out, error = run("pull", "alice/x", "--revision", first.oid, "--out", tmp_path / "pulled")
    assert code == 0, error
    assert featurizers.load(tmp_path / "pulled").labels == Labels(LABELS)
    code, out, _ = run("info", "alice/x", "--revision", first.oid)
    assert code == 0
    assert "2 of 2 features, by alice (1), gpt-4o-mini (1)" in " ".join(out.replace("│", " ").split())


def test_an_artefact_without_labels_costs_no_request_for_them(hub):
    subspace().push_to_hub("alice/x")
    featurizers.load("alice/x")
    assert not [request for request in hub.requests() if "feature_labels" in request]


def test_labels_of_a_subfolder(hub):
    f = subspace()
    f.labels = LABELS
    f.push_to_hub("alice/x", subfolder="layer-1")
    assert featurizers.load("alice/x", subfolder="layer-1").labels == Labels(LABELS)


def test_other_labels_than_the_config_names_are_neither_pushed_nor_loaded(hub, tmp_path):
    f = subspace()
    f.labels = LABELS
    folder = f.save_pretrained(tmp_path / "a")
    featurizers.push(folder, "alice/x")
    (folder / "feature_labels.jsonl").write_bytes(b"{}\n")
    with pytest.raises(WeightsError, match=r"feature_labels\.jsonl has sha256"):
        featurizers.push(folder, "alice/x")
    assert featurizers.load("alice/x").labels == Labels(LABELS)
    hub.put("alice/x", **{"feature_labels.jsonl": b"{}\n"})
    with pytest.raises(ArtefactError, match="was changed by hand"):
        featurizers.load("alice/x")
    code, _, error = run("pull", "alice/x", "--out", tmp_path / "pulled")
    assert code == 1
    assert "was changed by hand" in error


def test_labels_that_are_too_large_are_not_fetched(hub, monkeypatch):
    f = subspace()
    f.labels = LABELS
    f.push_to_hub("alice/x")
    monkeypatch.setattr("featurizers.format.labels.MAX_BYTES", 10)
    with pytest.raises(ManifestError, match="more than the 10 that it may have"):
        featurizers.load("alice/x")
