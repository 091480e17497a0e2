"""Saved pyvene models over the Hub: one commit there, one commit read."""

from __future__ import annotations

import json

import featurizers
import pytest
import torch
from featurizers.cli import app as cli
from featurizers.errors import HubNotFoundError, HubOfflineError, ManifestError, WeightsError
from typer.testing import CliRunner

from tests.support.hub import subspace
from tests.support.intervenables import logits_of_several, several
from tests.support.models import tiny_model


def load(source, **options):
    return featurizers.load_intervenable(source, tiny_model("gpt2"), **options)


def test_there_and_back_in_one_commit(hub):
    saved = several()
    commit = featurizers.push_intervenable(saved, "alice/it", private=True)
    assert hub.titles("alice/it") == ["Upload intervenable with featurizers"]
    assert commit.oid == hub.head("alice/it")
    expected = logits_of_several(saved)
    for source, options in (
        ("alice/it", {}),
        (f"alice/it@{commit.oid}", {}),
        ("hub:alice/it", {"revision": commit.oid}),
        ("alice/it", {"local_files_only": True}),
    ):
        assert torch.equal(logits_of_several(load(source, **options)), expected)
    assert list(featurizers.list_artefacts("alice/it")) == ["featurizer-0", "featurizer-1", "featurizer-2"]
    f = featurizers.load("alice/it", subfolder="featurizer-2", verify=True)
    assert torch.equal(f.basis, list(saved.interventions.values())[3].featurizer.basis)
    assert b'load_intervenable("alice/it", model)' in hub.files("alice/it")["README.md"]


def test_all_is_read_at_one_commit(hub, monkeypatch):
    """Another push arrives after the first file was read."""
    from featurizers_pyvene import loading

    old, new = several(), several()
    for intervention in list(new.interventions.values())[:2]:
        intervention.featurizer.load_state_dict(subspace(9, 32, 6).state_dict())
    list(new.interventions.values())[3].mask.data.neg_()
    first = featurizers.push_intervenable(old, "alice/it")
    read_record, met = loading.read_record, []

    def meeting(*arguments):
        if not met:
            met.append(featurizers.push_intervenable(new, "alice/it").oid)
        return read_record(*arguments)

    monkeypatch.setattr(loading, "read_record", meeting)
    assert torch.equal(logits_of_several(load("alice/it")), logits_of_several(old))
    assert met != [first.oid]
    assert torch.equal(logits_of_several(load("alice/it")), logits_of_several(new))
    assert torch.equal(logits_of_several(load(f"alice/it@{first.oid}")), logits_of_several(old))


def test_each_file_is_asked_for_once_and_then_not_at_all(hub):
    commit = featurizers.push_intervenable(several(), "alice/it")
    hub.log.clear()
    load(f"alice/it@{commit.oid}")
    asked = [request for request in hub.requests() if request.startswith("HEAD")]
    # 8 files, two of each featurizer and two more: each has a HEAD by this library and another by the client
    assert len(asked) <= 2 * 8, asked
    hub.log.clear()
    load(f"alice/it@{commit.oid}")
    assert hub.requests() == []


def test_the_command_pushes_and_pulls_it(hub, tmp_path):
    saved = several()
    folder = featurizers.save_intervenable(saved, tmp_path / "it")
    runner = CliRunner()
    pushed = runner.invoke(cli.app, ["push", str(folder), "alice/it", "--json"])
    assert json.loads(pushed.stdout)["revision"] == hub.head("alice/it")
    pulled = runner.invoke(cli.app, ["pull", "alice/it", "--out", str(tmp_path / "copy"), "--json"])
    assert pulled.exit_code == 0, pulled.output
    assert torch.equal(logits_of_several(load(tmp_path / "copy")), logits_of_several(saved))
    hub.put("alice/it", intervenable_safetensors=(folder / "intervenable.safetensors").read_bytes()[:-1] + b"\1")
    flipped = runner.invoke(cli.app, ["pull", "alice/it", "--out", str(tmp_path / "flipped")])
    assert flipped.exit_code == 1
    assert "intervenable.safetensors has sha256" in str(flipped.exception)
    assert not (tmp_path / "flipped").exists()
    verified = runner.invoke(cli.app, ["verify", str(tmp_path / "copy"), "--json"])
    assert [row["result"] for row in json.loads(verified.stdout)] == ["ok"] * 3


def test_what_does_not_belong_together_is_not_pushed(hub, tmp_path):
    folder = featurizers.save_intervenable(several(), tmp_path / "it")
    subspace(5, 32, 6).save_pretrained(folder / "featurizer-0")
    with pytest.raises(
        WeightsError, match=r"not the featurizer that was saved with intervenable\.json; nothing was pushed"
    ):
        featurizers.push(folder, "alice/it")
    folder = featurizers.save_intervenable(several(), tmp_path / "other")
    tensors = folder / "intervenable.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-1] + b"\1")
    with pytest.raises(WeightsError, match=r"intervenable\.safetensors has sha256 .*nothing was pushed"):
        featurizers.push(folder, "alice/it")
    (tmp_path / "elsewhere").write_bytes((folder / "intervenable.json").read_bytes())
    (folder / "intervenable.json").unlink()
    (folder / "intervenable.json").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(featurizers.errors.ArtefactError, match="is a link out of this folder"):
        featurizers.push(folder, "alice/it")
    assert hub.titles("alice/it") == []


def test_what_is_not_there(hub, tmp_path):
    with pytest.raises(HubNotFoundError):
        load("alice/none")
    subspace().push_to_hub("alice/plain")
    with pytest.raises(HubNotFoundError, match=r"intervenable\.json"):
        load("alice/plain")
    with pytest.raises(HubOfflineError):
        load("alice/other", local_files_only=True)


def test_a_file_larger_than_it_may_be_is_not_fetched(hub, tmp_path):
    featurizers.push_intervenable(several(), "alice/it")
    hub.put("alice/it", **{"intervenable_json": b"{" + b" " * 1_000_001})
    with pytest.raises(ManifestError, match="more than the 1000000 that it may have"):
        load("alice/it")
    featurizers.push_intervenable(several(), "alice/it")
    hub.put("alice/it", **{"intervenable_safetensors": bytes(20_000_000)})
    with pytest.raises(ManifestError, match=r"intervenable\.safetensors has 20000000 bytes, more than the 10000040"):
        load("alice/it")
    hub.put("alice/it", **{"intervenable_safetensors": None})
    with pytest.raises(HubNotFoundError, match=r"intervenable\.safetensors"):
        load("alice/it")
