"""``featurizers push``, ``list``, ``info``, ``pull`` and ``verify`` against a Hub."""

import json

import featurizers
import pytest
from featurizers.cli import app
from typer.testing import CliRunner

from tests.support.hub import subspace


def run(*arguments):
    done = CliRunner().invoke(app, [*map(str, arguments), "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_one_artefact_goes_up_and_comes_down(hub, tmp_path):
    folder = subspace().save_pretrained(tmp_path / "a")
    pushed = run("push", folder, "alice/x", "--private", "--message", "The first")
    assert pushed["repo_id"] == "alice/x"
    assert run("info", f"alice/x@{pushed['revision']}")["kind"] == "subspace"
    pulled = run("pull", "alice/x", "--out", tmp_path / "b")
    assert pulled == {"folder": str(tmp_path / "b"), "revision": pushed["revision"], "artefacts": 1}
    assert {path.name for path in (tmp_path / "b").iterdir()} == {"config.json", "model.safetensors", "README.md"}
    assert featurizers.load(tmp_path / "b", verify=True).basis.equal(subspace().basis)


def test_a_collection_goes_up_in_parts_and_comes_down_whole(hub, tmp_path):
    folder = subspace().save_pretrained(tmp_path / "a")
    for name in ("first", "deep/second"):
        run("push", folder, "alice/x", "--subfolder", name)
    assert [row["subfolder"] for row in run("list", "alice/x")] == ["deep/second", "first"]
    assert [row["result"] for row in run("verify", "alice/x")] == ["ok", "ok"]
    run("pull", "alice/x", "--out", tmp_path / "all")
    assert (tmp_path / "all" / "README.md").exists()
    assert list(featurizers.list_artefacts(tmp_path / "all")) == ["deep/second", "first"]
    assert featurizers.load(tmp_path / "all", subfolder="deep/second", verify=True).kind == "subspace"


def test_a_folder_that_is_not_empty_is_not_pulled_into(hub, tmp_path):
    subspace().push_to_hub("alice/x")
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(featurizers.errors.ArtefactError, match="it is there already"):
        run("pull", "alice/x", "--out", tmp_path)
