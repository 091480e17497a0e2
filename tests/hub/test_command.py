"""``featurizers push``, ``list``, ``info``, ``pull`` and ``verify`` against a Hub."""

import json
import logging
import re
import sys

import featurizers
import pytest
from featurizers.cli import app as cli
from featurizers.cli.app import app
from typer.testing import CliRunner

from tests.hub.test_failures import DOWNLOADS, LOAD, filled  # noqa: F401  # a fixture
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


def main(monkeypatch, capsys, *arguments):
    """Return exit code, stdout and stderr of the command, run as in a process of its own."""
    monkeypatch.setattr(sys, "argv", ["featurizers", *map(str, arguments)])
    # the client read its environment variable at import, and logs to the stderr of then
    monkeypatch.setattr(logging.getLogger("huggingface_hub"), "disabled", True)
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("huggingface_hub"):
            monkeypatch.setattr(logging.getLogger(name), "disabled", True)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return (ended.value.code, *capsys.readouterr())


@pytest.mark.parametrize("case", [name for name, case in DOWNLOADS.items() if case.call is LOAD])
def test_a_download_that_fails_is_one_line_and_leaves_nothing(filled, monkeypatch, capsys, tmp_path, case):  # noqa: F811
    DOWNLOADS[case].cause(filled)
    capsys.readouterr()  # discards the client's output of the push
    code, out, err = main(monkeypatch, capsys, "convert", "alice/x", tmp_path / "out")
    lines = [line for line in err.splitlines() if not line.startswith("warning: ")]
    assert (code, out, len(lines)) == (1, "", 1), err[:3000]
    assert re.search(DOWNLOADS[case].words, lines[0])
    assert err.replace("\n", "").isprintable()
    if case != "weights of another shape":  # which pull does not check
        assert main(monkeypatch, capsys, "pull", "alice/x", "--out", tmp_path / "out")[0] == 1
    assert not (tmp_path / "out").exists()


def test_a_cached_copy_is_said_in_one_line(filled, monkeypatch, capsys):  # noqa: F811
    commit = featurizers.load("alice/x").revision
    filled.stop()
    capsys.readouterr()
    code, out, err = main(monkeypatch, capsys, "info", "alice/x", "--json")
    assert (code, json.loads(out)["kind"]) == (0, "subspace")
    assert err.startswith("warning: alice/x: the Hub cannot be reached")
    assert err.endswith(f"The copy of {commit} in the cache is used\n")
    assert len(err.splitlines()) == 1


def test_a_pull_of_flipped_weights_leaves_nothing(filled, monkeypatch, capsys, tmp_path):  # noqa: F811
    filled.fail("GET /cdn/.*model.safetensors", "flip", offset=-4)
    code, _, err = main(monkeypatch, capsys, "pull", "alice/x", "--out", tmp_path / "out")
    assert code == 1
    assert "error: alice/x: model.safetensors has sha256" in err
    assert list(tmp_path.glob("*out*")) == []
