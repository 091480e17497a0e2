"""``featurizers`` command on local artefacts: output, JSON, exit codes. ``tests/hub`` has the commands with a Hub."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import featurizers
import pytest
import torch
import typer
from featurizers.cli import app as cli
from featurizers.errors import PluginLoadError
from featurizers.registry.plugin_host import host

from tests.support.command import run
from tests.support.damages import CONFIG, OTHERS, SPECIAL, WEIGHTS
from tests.support.hub import subspace

PAGE = Path(__file__).parents[3] / "docs" / "cli.md"
COMMANDS = [
    "plugins",
    "kinds",
    "sites",
    "info",
    "list",
    "search",
    "pull",
    "push",
    "verify",
    "convert",
    "fit causal-basis",
    "scalars",
    "graph",
    "harvest",
    "harvested index",
    "harvested contexts",
    "harvested export",
    "patch",
    "train",
    "evaluate",
    "compare",
    "labels",
    "report",
    "sweep",
    "new-plugin",
    "demo",
]
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")


@pytest.fixture(autouse=True)
def _plain_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    """Save an artefact, a collection, and a collection with one flipped bit."""
    folder = tmp_path_factory.mktemp("examples")
    f = featurizers.create("subspace", d_in=8, n_features=2, seed=0)
    f.id, f.site = "sentiment", featurizers.Site("resid.post", 8).at(position=(-1,), model="owner/model")
    f.feature_sets = {"negative": torch.tensor([1])}
    f.save_pretrained(folder / "one")
    both = {"layer-8": f, "deep/layer-9": featurizers.create("identity", d_in=8)}
    shutil.copytree(featurizers.save_collection(both, folder / "many"), folder / "damaged")
    weights = folder / "damaged/layer-8/model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    return folder


@pytest.fixture
def here(examples, tmp_path, monkeypatch):
    """Make a copy of the examples the current folder."""
    shutil.copytree(examples, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")


def process(*arguments: str) -> tuple[int, str, str]:
    command = [sys.executable, "-m", "featurizers", *arguments]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    return done.returncode, done.stdout, done.stderr


def as_json(*arguments: str) -> object:
    code, out, err = run(*arguments, "--json")
    assert (code, err) == (0, "")
    assert out.isascii()
    return json.loads(out)


# ---------------------------------------------------------------------- what is printed


def test_plugins_and_kinds():
    rows = as_json("plugins")
    assert {row["name"]: row["distribution"] for row in rows}.items() >= {
        "composition": "featurizers",
        "identity": "featurizers-identity",
        "standardize": "featurizers-subspace",
        "subspace": "featurizers-subspace",
    }.items()
    assert set(rows[0]) == {"name", "distribution", "version", "state", "error"}
    assert as_json("kinds") == run("kinds")[1].split() == featurizers.kinds()
    assert {"identity", "sae-lens.matching-pursuit"} < set(featurizers.kinds())
    assert {"pyvene", "sae-lens", "sparsify", "training"}.isdisjoint(featurizers.kinds())
    assert all(row["distribution"] in run("plugins")[1] for row in rows)


def test_the_arguments_of_a_kind_are_those_that_create_takes():
    """Compared with pydantic's own account of the config."""
    from featurizers_subspace import SubspaceFeaturizer

    shown = as_json("kinds", "subspace")
    assert shown["class"] == "featurizers_subspace.SubspaceFeaturizer"
    schema = SubspaceFeaturizer.Config.model_json_schema()
    assert [row["name"] for row in shown["arguments"]] == list(schema["properties"])
    assert [row["name"] for row in shown["arguments"] if row["default"] is None] == schema["required"]
    assert {row["type"] for row in shown["arguments"]} == {"int"}
    assert shown["arguments"][1]["meaning"] == "dimension of the subspace, at most ``d_in``."
    assert set(shown["constructors"]) == {"from_basis", "from_directions", "from_svd", "fit_pca"}
    out = run("kinds", "subspace")[1]
    assert 'featurizers.create("subspace", d_in=…, n_features=…)' in out
    assert "dimension of the subspace, at most d_in." in out


@pytest.mark.parametrize("kind", featurizers.kinds())
def test_every_kind_tells_its_arguments(kind):
    shown = as_json("kinds", kind)
    assert shown["about"]
    assert all(row["type"] for row in shown["arguments"])
    assert run("kinds", kind)[0] == 0


def test_version():
    assert run("--version") == (0, f"featurizers {featurizers.__version__}\n", "")


@pytest.mark.parametrize(("word", "meant"), [("trian", "train"), ("kind", "kinds"), ("evalute", "evaluate")])
def test_a_misspelt_command_is_answered_by_those_like_it(word, meant):
    code, out, err = run(word)
    assert (code, out) == (2, "")
    assert f"There is no command '{word}'. Did you mean '{meant}'" in err


def test_a_shell_completes_commands_and_options(tmp_path):
    """By bash itself, with the script that ``--show-completion`` prints."""
    (tmp_path / "featurizers").write_text(
        f"#!{sys.executable}\nimport sys\nfrom featurizers.cli.app import main\nsys.argv[0] = 'featurizers'\nmain()\n"
    )
    (tmp_path / "featurizers").chmod(0o755)
    script = """
        eval "$(_FEATURIZERS_COMPLETE=source_bash featurizers)"
        complete_line() {
            COMP_WORDS=("$@") COMP_CWORD=$(($# - 1)) COMPREPLY=()
            $(complete -p featurizers | sed 's/.*-F \\([^ ]*\\).*/\\1/') featurizers "${@: -1}"
            echo "${COMPREPLY[@]}"
        }
        complete_line featurizers s
        complete_line featurizers k
        complete_line featurizers info --j
    """
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", script], capture_output=True, encoding="utf-8", check=True, env=environment)
    assert done.stdout.splitlines() == ["sites search scalars sweep", "kinds", "--json"], done.stderr


def test_info_of_an_artefact(here):
    found = as_json("info", "./one")
    config = json.loads(Path("one/config.json").read_text())
    assert found.pop("tensors") == {"basis": "float32 [8, 2]", "features.negative": "int64 [1]"}
    assert found == config
    _, out, _ = run("info", "./one")
    assert all(word in out for word in ("sentiment", "subspace", "resid.post:8", "owner/model", "float32 [8, 2]"))


def test_info_prints_a_summary_and_not_the_history_of_a_search(here):
    f = featurizers.load("./one")
    history = [{"epoch": number, "loss": 0.1} for number in range(500)]
    f.metadata = {"summary": {"accuracy (test)": "97.0%"}, "training": {"history": history}, "license": "mit"}
    f.save_pretrained("searched")
    _, out, _ = run("info", "./searched")
    assert len(out.splitlines()) < 25
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if line.startswith("│")]
    assert ["accuracy (test)", "97.0%"] in rows
    assert ["site", "resid.post:8"] in rows
    assert ["model", "owner/model"] in rows
    assert ["tokens", "-1"] in rows
    assert ["metadata: license", '"mit"'] in rows
    assert ["metadata: training", f"{len(json.dumps(f.metadata['training']))} characters; see --json"] in rows
    assert as_json("info", "./searched")["metadata"]["training"]["history"] == history


def test_info_and_list_of_a_collection(here):
    index = json.loads(Path("many/config.json").read_text())
    assert as_json("info", "./many") == index
    rows = as_json("list", "./many")
    assert {row.pop("subfolder"): row for row in rows} == index["artefacts"]
    assert run("list", "./many")[1] == run("info", "./many")[1]
    assert "resid.post:8" in run("list", "./many")[1]
    assert as_json("info", "./many", "--subfolder", "layer-8")["id"] == "sentiment"
    assert as_json("list", "./one") == [
        {"subfolder": "", "kind": "subspace", "id": "sentiment", "site": "resid.post:8"}
    ]


def test_info_needs_no_plugin(here):
    path = Path("one/config.json")
    path.write_text(path.read_text().replace('"kind": "subspace"', '"kind": "nobodys"'))
    assert as_json("info", "./one")["kind"] == "nobodys"
    assert as_json("list", "./one")[0]["kind"] == "nobodys"
    code, out, _ = run("verify", "./one")
    assert code == 1
    assert "nobodys" in out


def test_verify(here):
    assert as_json("verify", "./one") == [{"subfolder": "", "result": "ok", "error": None}]
    assert [row["result"] for row in as_json("verify", "./many")] == ["ok", "ok"]
    assert as_json("verify", "./many", "--subfolder", "layer-8")[0]["subfolder"] == "layer-8"


def test_verify_names_the_one_that_is_damaged(here):
    code, out, err = run("verify", "./damaged", "--json")
    rows = {row["subfolder"]: row for row in json.loads(out)}
    assert (code, err) == (1, "")
    assert rows["deep/layer-9"] == {"subfolder": "deep/layer-9", "result": "ok", "error": None}
    assert rows["layer-8"]["result"] == "failed"
    assert "sha256" in rows["layer-8"]["error"]
    assert run("verify", "./damaged")[0] == 1


@pytest.mark.parametrize(
    "hostile", ["\x1b[31mred", "\x1b]0;title\x07", "\x9b31m", "a\rb", "a\nb", "\u202eesrever"], ids=ascii
)
def test_control_characters_of_an_artefact_do_not_reach_the_terminal(here, hostile):
    f = featurizers.create("identity", d_in=8)
    with pytest.raises(featurizers.errors.SiteError):
        featurizers.Site("module", module=hostile, side="input")
    f.id = hostile
    with pytest.raises(featurizers.errors.ManifestError):
        f.save_pretrained("hostile")
    f.id, f.metadata = "harmless", {"x": hostile}
    featurizers.save_collection({"a": f}, "hostiles")
    assert not CONTROL.search(run("info", "./hostiles", "--subfolder", "a")[1])
    for path in (Path("hostiles/config.json"), Path("hostiles/a/config.json")):
        path.write_text(path.read_text().replace('"harmless"', json.dumps(hostile)))
    for command in (
        ["info", "./hostiles"],
        ["list", "./hostiles/a"],
        ["verify", "./hostiles"],
        ["info", "./hostiles/a"],
    ):
        code, out, err = run(*command)
        assert code == 1
        assert not CONTROL.search(out + err), command


@pytest.mark.parametrize("markup", ["[bold]x", "[/bold]", "[link=file:///etc]x[/link]"])
def test_what_looks_like_markup_is_shown_as_it_is(here, markup):
    f = featurizers.create("identity", d_in=8)
    f.id = markup
    f.save_pretrained("marked")
    assert markup in run("list", "./marked")[1]


# ---------------------------------------------------------------------- what goes wrong

ERRORS = {
    "no such folder": (["info", "./nowhere"], "nowhere: there is no config.json"),
    "no source": (["info", "nowhere"], "cannot tell what the source 'nowhere' names"),
    "an empty folder": (["list", "./empty"], "there is no config.json"),
    "no such subfolder": (["info", "./many", "--subfolder", "none"], "there is no config.json"),
    "a revision of a folder": (["info", "./one", "--revision", "v1"], "has no revision 'v1'"),
    "no catalogue": (["info", "identity:x"], "'identity:x' is an entry of a catalogue"),
    "not JSON": (["verify", "./broken"], "not valid JSON"),
    "pull of a folder": (["pull", "./many"], "not a repository of the Hub"),
    "push of nothing": (["push", "empty", "owner/name"], "there is no config.json"),
    "push of a collection to a subfolder": (["push", "many", "owner/name", "--subfolder", "x"], "pushed to the root"),
    "layers that are no numbers": (
        ["demo", "--model", "./none", "--layers", "x"],
        "layers are numbers with commas between, and ranges, such as 4,8,12 or 0-11, not 'x'",
    ),
}


@pytest.mark.parametrize(("arguments", "words"), ERRORS.values(), ids=ERRORS)
def test_an_error_is_one_line_and_exit_code_1(here, arguments, words):
    Path("empty").mkdir()
    Path("broken").mkdir()
    Path("broken/config.json").write_text("{")
    code, out, err = run(*arguments)
    assert (code, len(err.splitlines())) == (1, 1)
    assert words in err
    assert "Traceback" not in out + err


@pytest.mark.parametrize("command", ["kinds --json", "plugins", "list ./many"])
def test_a_reader_that_has_enough_is_no_error(here, command):
    script = f'"{sys.executable}" -m featurizers {command} | true'
    done = subprocess.run(["bash", "-c", script], capture_output=True, encoding="utf-8", check=False)
    assert done.stderr == ""


def test_a_terminal_that_knows_few_letters(here):
    f = featurizers.create("identity", d_in=8)
    f.id = "性 é"
    f.save_pretrained("foreign")
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    for command in ("info", "list"):
        script = [sys.executable, "-c", "from featurizers.cli.app import main; main()", command, "./foreign"]
        done = subprocess.run(script, capture_output=True, encoding="ascii", check=False, env=environment)
        assert (done.returncode, done.stderr) == (0, "")
        assert r"\u6027" in done.stdout


def test_a_folder_named_after_no_user(here):
    Path("one").rename("~nobody-of-this-name")
    assert as_json("info", "local:~nobody-of-this-name")["id"] == "sentiment"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return subspace().save_pretrained(tmp_path_factory.mktemp("whole") / "a")


@pytest.mark.parametrize("damage", [*WEIGHTS, *CONFIG, *OTHERS, *SPECIAL])
def test_a_damaged_artefact_is_one_line_and_exit_code_1(whole, damage, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(whole, "a")
    case = {**WEIGHTS, **CONFIG, **OTHERS, **SPECIAL}[damage]
    case.spoil(tmp_path / "a")
    code, out, err = run("convert", "./a", "out")
    assert (code, out, len(err.splitlines())) == (1, "", 1)
    assert re.search(case.words, err)
    assert not CONTROL.search(err)
    assert not Path("out").exists()
    assert run("verify", "./a")[0] == 1


def test_a_flipped_bit_is_found_by_verify(whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(whole, "a")
    data = bytearray(Path("a/model.safetensors").read_bytes())
    data[-1] ^= 1
    Path("a/model.safetensors").write_bytes(data)
    code, out, err = run("verify", "./a", "--json")
    assert (code, err) == (1, "")
    assert "sha256" in json.loads(out)[0]["error"]


def test_plugins_strict(monkeypatch):
    code, out, _ = run("plugins", "--strict", "--json")
    rows = json.loads(out)
    assert (code, {row["state"] for row in rows}) == (0, {"loaded"})
    monkeypatch.setattr(host(), "_failures", {"subspace": PluginLoadError("subspace", "x 1", "no luck")})
    monkeypatch.setattr(host(), "is_loaded", lambda name: name != "subspace")
    code, out, err = run("plugins", "--strict")
    assert (code, err) == (1, "")
    assert "no luck" in out
    assert run("plugins")[0] == 0


def test_what_the_system_refuses_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def refuse(*_, **__):
        raise OSError(28, "No space left on device", "x")

    monkeypatch.setattr("featurizers.store.manifest_of", refuse)
    monkeypatch.setattr(sys, "argv", ["featurizers", "info", "./a"])
    with pytest.raises(SystemExit, match="1"):
        cli.main()
    assert capsys.readouterr().err == "error: [Errno 28] No space left on device: 'x'\n"


@pytest.mark.parametrize("arguments", [["info", "./nowhere"], ["pull", "./many", "--json"]])
def test_a_process_ends_with_that_line_and_code(here, arguments):
    code, out, err = process(*arguments)
    assert (code, out) == (1, "")
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1


USAGE = [["frobnicate"], ["info"], ["info", "./one", "--frob"], ["push", "one"], ["demo", "--features", "0"]]


@pytest.mark.parametrize("arguments", USAGE, ids=" ".join)
def test_a_command_called_wrongly_ends_with_2(here, arguments):
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert "Usage: " in err
    assert "Traceback" not in err


def test_a_process_called_wrongly_ends_with_2():
    code, out, err = process("frobnicate")
    assert (code, out) == (2, "")
    assert "frobnicate" in err


# ---------------------------------------------------------------------- help, and the page that describes it


def test_help_lists_the_commands_of_the_page():
    code, out, _ = run("--help")
    assert code == 0
    listed = re.findall(r"^  ([a-z][a-z-]*)  ", out, re.MULTILINE)
    assert listed == list(dict.fromkeys(command.partition(" ")[0] for command in COMMANDS))
    described = re.findall(r"^## (.+)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(described) == sorted(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_lists_the_options_of_the_page(command):
    words = command.split()
    code, out, _ = run(*words, "--help")
    assert code == 0
    assert run(*words, "-h") == (code, out, "")
    text = PAGE.read_text(encoding="utf-8")
    part = re.search(rf"^## {command}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert part
    described = re.search(r"Options?: (.*?)\n\n", part[1].replace(".\n\n", "\n\n"), re.DOTALL)
    assert described
    options = set(re.findall(r"--[a-z-]+", described[1])) - {"--help"}
    command_: Any = typer.main.get_command(cli.app)
    context = typer.Context(command_)
    for word in words:
        command_ = command_.resolve_command(context, [word])[1]
    known = command_.params
    assert options == {name for p in known for name in (*p.opts, *p.secondary_opts) if name.startswith("--")} - {
        "--help"
    }
    assert all(option in out for option in options)
