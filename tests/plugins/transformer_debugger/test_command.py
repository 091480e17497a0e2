"""``featurizers scalars`` with transformer-debugger's names, and what it says without the package that has them."""

import re
from types import SimpleNamespace

import pytest
from featurizers.cli import app as cli
from featurizers_derived_scalars import registry, scalars
from featurizers_derived_scalars.capturing import logit_difference
from featurizers_derived_scalars.registry import spec
from typer.testing import CliRunner

from tests.support import command
from tests.support.models import fresh_model, save_language_model

IDS = [7, 3, 9, 3, 1]
PROMPT = " ".join(f"w{i}" for i in IDS)
TO = ("--target", "w5", "--distractor", "w7")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("debugger")
    save_language_model(fresh_model("llama"), folder / "lm")
    return folder


@pytest.fixture(autouse=True)
def _here(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "140")


@pytest.mark.parametrize("what", ["mlp_write_norm", "transformer-debugger.mlp_write_norm"])
def test_it_prints_what_the_library_gives(what):
    found = scalars(fresh_model("llama"), IDS, what, metric=logit_difference(5, 7))
    wanted = found.topk(6, absolute=True)
    result = command.as_json("scalars", "--model", "./lm", "--prompt", PROMPT, "--what", what, *TO, "--top", 6)
    rows = result["scalars"][what]
    assert [(row["layer"], row["index"]) for row in rows] == [(entry.layer, list(entry.at)) for entry in wanted]
    assert [row["value"] for row in rows] == pytest.approx([entry.value for entry in wanted], rel=1e-5)


def test_the_list_names_every_scalar():
    result = CliRunner().invoke(cli.app, ["scalars", "--list"])
    assert result.exit_code == 0
    for name in ("Quantities of transformer-debugger", "unflattened_attn_act_times_grad", "write_to"):
        assert name in result.stdout


def test_a_name_that_needs_a_node_costs_one_line():
    code, out, err = command.run(
        "scalars", "--model", "./lm", "--prompt", PROMPT, "--what", "mlp_out_edge_attribution", *TO
    )
    assert (code, out) == (1, "")
    assert err.count("\n") == 1
    assert re.search("is that of one node; give node=", err), err


def test_without_the_package_the_error_says_how_to_install_it(monkeypatch):
    own = registry.OWN
    monkeypatch.setattr(registry, "specs", lambda: own)
    monkeypatch.setattr(registry, "host", lambda: SimpleNamespace(names=lambda: ["derived-scalars"]))
    hint = "Names of transformer-debugger need another package: pip install featurizers-transformer-debugger"
    code, out, err = command.run("scalars", "--model", "./lm", "--prompt", PROMPT, "--what", "mlp_write_norm", *TO)
    assert (code, out) == (1, "")
    assert "there is no scalar 'mlp_write_norm'; like it: write_norm" in err
    assert err.endswith(f"{hint}\n")
    assert spec("write_norm").name == "write_norm"
