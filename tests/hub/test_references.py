"""Artefacts that refer to a featurizer of the Hub at one commit, and add labels and edits of their own."""

from __future__ import annotations

import json
from typing import Any

import featurizers
import pytest
import torch
from featurizers import Label, Steer
from featurizers.errors import (
    FeatureIndexError,
    HubNotFoundError,
    HubOfflineError,
    ManifestError,
    UsageError,
    WeightsError,
)

from tests.support.command import run
from tests.support.dictionaries import dictionary
from tests.support.hub import subspace
from tests.support.models import WIDTH, fresh_model, prompts

IDS = {"input_ids": prompts(2, 5)}


def published(**options: Any) -> Any:
    """Push a dictionary, and load it from the Hub."""
    f = dictionary("relu", d_in=WIDTH)
    f.site, f.id = "resid.post:1", "whole"
    f.labels = [Label(1, "of the whole", "alice")]
    f.push_to_hub("alice/sae", **options)
    return featurizers.load("alice/sae", **options)


def steering(f: Any) -> Any:
    f.id, f.labels = "cheerful", [Label(7, "joy", "bob")]
    f.edits = [Steer(f, delta=3.0, indices=[7])]
    f.feature_sets["selected"] = torch.tensor([7])
    f.metadata["license"] = "mit"
    return f


def test_a_reference_holds_all_but_the_weights(hub, tmp_path):
    f, model = steering(published()), fresh_model("llama")
    commit = hub.head("alice/sae")
    with featurizers.intervene(model, f.edits):
        expected = model(**IDS).logits
    folder = featurizers.save_reference(f, tmp_path / "a")
    config = json.loads((folder / "config.json").read_text())
    assert config["kind"] == "reference"
    assert config["config"] == {"repository": "alice/sae", "revision": commit, "subfolder": None}
    assert (folder / "model.safetensors").stat().st_size < 500
    featurizers.push(folder, "alice/steer")
    other = dictionary("relu", d_in=WIDTH, seed=5)
    other.site = "resid.post:2"
    other.push_to_hub("alice/sae")  # the branch goes on
    for source in (folder, "alice/steer"):
        again = featurizers.load(source, verify=True)
        assert torch.equal(again.attach(model)(IDS).logits, expected)
        assert (again.id, str(again.site), again.metadata) == ("cheerful", "resid.post:1", {"license": "mit"})
        assert [label.text for label in again.labels] == ["joy"]
        assert again.feature_sets["selected"].tolist() == [7]
        assert str(again.origin) == f"alice/sae@{commit}"
        for name, tensor in f.state_dict().items():
            assert torch.equal(again.state_dict()[name], tensor)
    assert featurizers.load("alice/steer").revision == hub.head("alice/steer")
    assert featurizers.load("alice/steer", local_files_only=True).id == "cheerful"
    again = featurizers.load("alice/steer", kind="dictionary")
    assert featurizers.save_reference(again, tmp_path / "b").exists()  # once more, to the same commit
    assert (tmp_path / "b" / "config.json").read_text() == (folder / "config.json").read_text()
    with pytest.raises(UsageError, match="of kind 'dictionary', not 'subspace'"):
        featurizers.load("alice/steer", kind="subspace")


def test_commands_know_references(hub, tmp_path):
    featurizers.push(featurizers.save_reference(steering(published()), tmp_path / "a"), "alice/steer")
    code, out, error = run("info", "alice/steer")
    assert code == 0, error
    text = " ".join(out.replace("│", " ").split())
    assert "kind reference" in text
    assert '"repository": "alice/sae"' in text
    assert "steer feature 7 by 3 at resid.post:1" in text
    code, out, _ = run("verify", "alice/steer")
    assert code == 0
    code, _, error = run("pull", "alice/steer", "--out", tmp_path / "pulled")
    assert code == 0, error
    assert featurizers.load(tmp_path / "pulled").id == "cheerful"


def test_a_subfolder_and_a_slice(hub, tmp_path):
    f = steering(published(subfolder="layer-1"))
    f.feature_sets.clear()
    assert str(f.origin).endswith("/layer-1")
    folder = featurizers.save_reference(f, tmp_path / "a")
    part = featurizers.load(folder, indices=[3, 7])
    assert (part.n_features, [label.feature for label in part.labels]) == (2, [7])
    model = fresh_model("llama")
    expected = featurizers.load(folder).attach(model)(IDS).logits
    assert torch.allclose(part.attach(model)(IDS).logits, expected, atol=1e-5)
    with pytest.raises(FeatureIndexError, match="feature 7 is not among"):
        featurizers.load(folder, indices=[3])


def test_what_is_not_at_the_commit_is_not_referred_to(hub, tmp_path):
    f = published()
    with torch.no_grad():
        f.b_dec.add_(1)
    for changed in (f, featurizers.load("alice/sae", indices=[1]), featurizers.load("alice/sae", dtype=torch.float16)):
        with pytest.raises(UsageError, match=r"is not what alice/sae@.* holds: it was changed, converted or loaded in"):
            featurizers.save_reference(changed, tmp_path / "a")
    for alone in (dictionary("relu"), featurizers.load("alice/sae").take([1])):
        with pytest.raises(UsageError, match="was not loaded whole from a repository of the Hub"):
            featurizers.save_reference(alone, tmp_path / "a")
    assert not (tmp_path / "a").exists()


FORGED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "a branch": ({"revision": "main"}, ManifestError, "the reference in its config is malformed: 'revision'"),
    "a folder": ({"repository": "../sae"}, ManifestError, "malformed: 'repository'"),
    "an address": ({"repository": "https://x/y"}, ManifestError, "malformed: 'repository'"),
    "a catalogue": ({"repository": "sae-lens:gpt2"}, ManifestError, "malformed: 'repository'"),
    "a way out": ({"subfolder": "../x"}, ManifestError, "malformed: 'subfolder'"),
    "code": ({"code": "os.system"}, ManifestError, "Extra inputs are not permitted"),
    "no such commit": ({"revision": "0" * 40}, HubNotFoundError, "0000"),
    "no such repository": ({"repository": "alice/none"}, HubNotFoundError, "alice/none"),
}


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_reference_is_refused(hub, tmp_path, name):
    changes, error, words = FORGED[name]
    folder = featurizers.save_reference(steering(published()), tmp_path / "a")
    config = json.loads((folder / "config.json").read_text())
    config["config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(error, match=words):
        featurizers.load(folder)


def test_references_are_followed_once(hub, tmp_path):
    folder = featurizers.save_reference(steering(published()), tmp_path / "a")
    commit = featurizers.push(folder, "alice/steer").oid
    config = json.loads((folder / "config.json").read_text())
    config["config"] |= {"repository": "alice/steer", "revision": commit}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ManifestError, match=r"it refers to alice/steer@.*, which refers to another repository"):
        featurizers.load(folder)


def test_a_reference_that_does_not_fit_is_refused(hub, tmp_path):
    f = steering(published())
    folder = featurizers.save_reference(f, tmp_path / "a")
    small = subspace(d_in=WIDTH, n_features=2)
    small.site = f.site
    commit = small.push_to_hub("alice/small").oid
    config = json.loads((folder / "config.json").read_text())
    config["config"] |= {"repository": "alice/small", "revision": commit}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(Exception, match="a label is of feature 7, and 'cheerful' has 2"):
        featurizers.load(folder)
    (folder / "model.safetensors").write_bytes(b"x" * 40)
    with pytest.raises(WeightsError):
        featurizers.load(folder)


def test_a_reference_is_not_followed_offline(hub, tmp_path):
    folder = featurizers.save_reference(steering(published()), tmp_path / "a")
    with pytest.raises(HubOfflineError):
        featurizers.load(folder, local_files_only=True, cache_dir=tmp_path / "empty")
