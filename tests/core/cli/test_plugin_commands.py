"""Commands of plugins: entry points of ``featurizers.commands``, imported when they are called, never in conflict."""

from __future__ import annotations

import importlib.metadata
import inspect
import json
import os
import re
import subprocess
import sys
import textwrap
import tomllib
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from featurizers.cli import app as cli
from featurizers.cli.command_entries import CommandEntry, CommandTable
from featurizers.errors import MissingDependencyError, PluginError
from featurizers.names import COMMANDS, FIRST_PARTY, GROUPS
from featurizers.registry.plugin_host import host
from featurizers_training import Settings
from typer.testing import CliRunner

ROOT = Path(__file__).parents[3]
HEAVY = ("torch", "numpy", "transformers", "huggingface_hub", "safetensors", "matplotlib", "accelerate")
COMMAND = """
    import sys
    sys.featurizers_imported = getattr(sys, "featurizers_imported", 0) + 1

    def fitted(size: int = 1) -> None:
        "Fit it."
        print("fitted", size)

    def done() -> None:
        "Do it."
        print("did", __name__)
"""
Install = Callable[..., str]


@pytest.fixture(autouse=True)
def _plain_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Install a distribution with some commands for one test, beside no others that add commands."""
    installed = importlib.metadata.entry_points
    monkeypatch.setattr(
        importlib.metadata,
        "entry_points",
        lambda group: [e for e in installed(group=group) if e.dist and tmp_path in Path(str(e.dist._path)).parents],  # type: ignore[attr-defined]
    )
    monkeypatch.setattr(sys, "featurizers_imported", 0, raising=False)

    def install(
        distribution: str,
        commands: dict[str, str],
        code: str = COMMAND,
        version: str = "1.0",
        requires: str = "featurizers",
    ) -> str:
        module = f"commands_{uuid.uuid4().hex}"  # Python would find one it has imported before
        folder = tmp_path / distribution
        info = folder / f"{distribution.replace('-', '_')}-1.0.dist-info"
        info.mkdir(parents=True)
        (folder / f"{module}.py").write_text(textwrap.dedent(code))
        text = f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\nRequires-Dist: {requires}\n"
        (info / "METADATA").write_text(text)
        points = "".join(f"{name} = {module}:{function}\n" for name, function in commands.items())
        (info / "entry_points.txt").write_text(f"[featurizers.commands]\n{points}")
        monkeypatch.syspath_prepend(str(folder))
        return module

    return install


def imports() -> int:
    count: int = sys.featurizers_imported  # type: ignore[attr-defined]
    return count


def call(*words: str) -> tuple[int, str]:
    """Return the exit code and the output of the command, or raise its error."""
    result = CliRunner().invoke(cli.app, words)
    if isinstance(result.exception, PluginError | MissingDependencyError):
        raise result.exception
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.exit_code, result.output


# ---------------------------------------------------------------------- looking up


def test_distributions_add_commands_and_members_of_one_group(install: Install) -> None:
    one = install("one", {"fit.one": "fitted", "go": "done"})
    two = install("two", {"fit.two": "fitted", "two": "done"})
    assert call("fit", "one", "--size", "3") == (0, "fitted 3\n")
    assert call("fit", "two") == (0, "fitted 1\n")
    assert call("go") == (0, f"did {one}\n")
    assert call("two") == (0, f"did {two}\n")
    rows = json.loads(call("plugins", "--commands", "--json")[1])
    assert [(row["command"], row["distribution"], row["help"]) for row in rows] == [
        ("fit one", "one 1.0", "Fit it."),
        ("fit two", "two 1.0", "Fit it."),
        ("go", "one 1.0", "Do it."),
        ("two", "two 1.0", "Do it."),
    ]
    assert call("fit", "three")[0] == call("three")[0] == 2
    assert "Did you mean 'two'?" in call("twoo")[1]


def test_help_lists_them_and_imports_none(install: Install) -> None:
    install("one", {"fit.one": "fitted", "group.a": "done", "group.b": "done", "go": "done"})
    code, output = call("--help")
    assert code == 0
    assert re.search(r"^  go +Added by one 1\.0\.$", output, re.MULTILINE)
    assert re.search(rf"^  fit +{re.escape(GROUPS['fit'])}$", output, re.MULTILINE)
    assert re.search(r"^  group +Commands: a, b\.$", output, re.MULTILINE)
    assert re.search(r"^  a +Added by one 1\.0\.$", call("group", "--help")[1], re.MULTILINE)
    assert "  one  Added by one 1.0." in call("fit")[1]
    assert not imports()
    assert "Fit it." in call("fit", "one", "-h")[1]
    assert imports() == 1


def test_a_command_imports_its_own_module_alone(install: Install) -> None:
    install("one", {"fit.one": "fitted"})
    install("two", {"fit.two": "fitted"})
    assert call("fit", "one")[0] == 0
    assert imports() == 1
    assert call("fit", "three")[0] == call("frob")[0] == 2
    assert imports() == 1


# ---------------------------------------------------------------------- refusals


def test_a_command_that_two_distributions_claim_is_neither_ones(install: Install) -> None:
    install("one", {"fit.same": "fitted", "a": "done"})
    install("two", {"fit.same": "fitted", "b": "done"})
    words = "the command 'fit same' is claimed more than once, by one 1.0 and two 1.0; uninstall one"
    with pytest.raises(PluginError, match=re.escape(words)):
        call("fit", "same")
    assert call("a")[0] == call("b")[0] == 0
    code, output = call("plugins", "--commands")
    assert code == 0
    assert "warning: the command 'fit same' is claimed more than once" in output
    assert call("plugins", "--strict")[0] == 1


def test_a_word_is_not_both_a_command_and_a_group(install: Install) -> None:
    install("one", {"word": "done"})
    install("two", {"word.more": "done"})
    with pytest.raises(PluginError, match="the command 'word' is claimed more than once"):
        call("word")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("kinds", "'kinds' is a command of the core; uninstall one"),
        ("kinds.more", "'kinds' is a command of the core; uninstall one"),
        ("fit", "'fit' is a group of commands; uninstall one"),
        ("train", "it belongs to featurizers-training; uninstall one"),
        ("fit.causal-basis", "it belongs to featurizers-causal-basis; uninstall one"),
        ("fit.subspace", "it belongs to featurizers-subspace; uninstall one"),
        ("a.b.c", "a command is lower-case words"),
        ("t\x1b[2J", "a command is lower-case words"),
        ("Word", "a command is lower-case words"),
    ],
)
def test_a_name_that_is_not_free_is_refused(install: Install, name: str, reason: str) -> None:
    install("one", {name: "done"})
    code, output = call("plugins", "--commands")
    assert code == 0
    assert f"of one 1.0 is refused: {reason}" in output
    assert output.replace("\n", "").isprintable()
    assert "did" not in call("kinds")[1]
    assert call("plugins", "--strict")[0] == 1
    assert not imports()


def test_a_refused_claim_says_so_when_the_command_is_called(install: Install) -> None:
    install("one", {"train": "done"})
    with pytest.raises(PluginError, match=r"'train' of one 1\.0 is refused: it belongs to featurizers-training"):
        call("train")


FAULTS = {
    "fails at import": ("raise KeyError('x')", "KeyError: "),
    "exits at import": ("import sys; sys.exit(3)", "SystemExit: '3'"),
    "has no such name": ("x = 1", "AttributeError"),
    "is no function": ("done = 3", "its entry point names no function"),
    "has a signature that typer refuses": ("def done(x: int | str): pass", "cannot be used"),
}


@pytest.mark.parametrize(("code", "reason"), FAULTS.values(), ids=list(FAULTS))
def test_a_command_that_fails_is_named_and_the_others_go_on(install: Install, code: str, reason: str) -> None:
    install("good", {"good": "done"})
    install("bad", {"bad": "done"}, code, version="6.6")
    with pytest.raises(PluginError, match=r"the command 'bad' of bad 6\.6 cannot be used: ") as error:
        call("bad")
    assert reason in str(error.value)
    assert call("good")[0] == 0
    assert "warning: the command 'bad' of bad 6.6" in call("plugins", "--commands")[1]


def test_a_distribution_for_another_version_of_the_core_is_not_imported(install: Install) -> None:
    install("old", {"old": "done"}, requires="featurizers<0.1")
    with pytest.raises(PluginError, match=r"the command 'old' of old 1\.0 cannot be used: it needs featurizers <0\.1"):
        call("old")
    assert not imports()


ODD = """
    import typer
    from typing import Annotated

    def odd(size: Annotated[str, typer.Option(help="Its size\\x1b[2J.", metavar="S\\x1b")] = "") -> None:
        "Do\\x1b[2J it.\\n\\n\\b\\nas\\nit is"
"""


def test_what_a_command_says_of_itself_is_printed_escaped(install: Install) -> None:
    install("odd", {"odd": "odd", "group.one": "odd"}, ODD)
    for words in (("odd", "--help"), ("plugins", "--commands"), ("group", "one", "--help")):
        code, output = call(*words)
        assert code == 0
        assert output.replace("\n", "").isprintable()
    output = call("odd", "--help")[1]
    assert all(text in output for text in (r"Do\x1b[2J it.", r"Its size\x1b[2J.", r"S\x1b", "  as\n  it is"))


# ---------------------------------------------------------------------- this project's


@pytest.mark.parametrize(
    ("words", "distribution", "command"),
    [
        ("demo", "featurizers-training", "pip install 'featurizers[demo]'"),
        ("train", "featurizers-training", "pip install featurizers-training"),
        ("fit causal-basis", "featurizers-causal-basis", "pip install featurizers-causal-basis"),
        ("fit", "featurizers-causal-basis", "pip install featurizers-causal-basis"),
    ],
)
def test_a_command_that_is_not_installed_says_what_to_install(
    install: Install, monkeypatch: pytest.MonkeyPatch, words: str, distribution: str, command: str
) -> None:
    name = words if words != "fit" else "fit causal-basis"
    with pytest.raises(PluginError, match=f"the installed {distribution} has no command '{name}'; upgrade it"):
        call(*words.split(), "--help")
    version = importlib.metadata.version

    def absent(project: str) -> str:
        if project == distribution:
            raise importlib.metadata.PackageNotFoundError(project)
        return version(project)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    with pytest.raises(MissingDependencyError, match=f"the command '{name}' needs {distribution}") as error:
        call(*words.split(), "--help")
    assert str(error.value).endswith(f"Install it with: {command}")
    if words == "fit causal-basis":
        install("one", {"fit.one": "fitted"})
        with pytest.raises(MissingDependencyError, match=f"the command '{name}' needs {distribution}"):
            call(*words.split())


def loaded(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return tomllib.load(file)


def test_the_table_of_this_projects_commands_is_that_of_its_distributions() -> None:
    """Each command with its distribution, the first line of its help and what to install for it."""
    declared = {}
    for folder in sorted((ROOT / "plugins").iterdir()):
        project = loaded(folder / "pyproject.toml")["project"]
        for name in project.get("entry-points", {}).get("featurizers.commands", {}):
            declared[name] = project["name"]
    assert {name: FIRST_PARTY[command.plugin] for name, command in COMMANDS.items()} == declared
    table = CommandTable.of(())
    assert not table.faults
    assert list(map(".".join, table.entries)) == list(COMMANDS)
    for path, entry in table.entries.items():
        assert isinstance(entry, CommandEntry)
        assert entry.load().get_short_help_str(1000) == entry.help == COMMANDS[".".join(path)].help
    for word, command in COMMANDS.items():
        assert command.requirement in (FIRST_PARTY[command.plugin], f"featurizers[{word}]")
    extras = loaded(ROOT / "pyproject.toml")["project"]["optional-dependencies"]
    assert any(requirement.startswith("featurizers-training") for requirement in extras["demo"])


@pytest.mark.parametrize("name", ["train", "sweep"])
def test_defaults_of_a_search_are_those_of_its_settings(name: str) -> None:
    module = __import__(f"featurizers_training.command.{name}", fromlist=["x"])
    parameters = inspect.signature(getattr(module, f"{name}_command")).parameters
    for field in ("epochs", "batch_size", "micro_batch", "seed", "precision"):
        assert parameters[field].default == getattr(Settings(), field)


IMPORTED = """
import sys
from featurizers.cli.app import app

def run(*words):
    sys.argv = ["featurizers", *words]
    try:
        app()
    except SystemExit as end:
        assert end.code in (0, None), (words, end.code)

for command in {commands!r}:
    run(*command.split(), "-h")
    heavy = sorted(set({heavy!r}) & set(sys.modules))
    assert not heavy, (command, heavy)
"""


def test_help_of_every_command_imports_nothing_heavy() -> None:
    own = [command.name for command in typer.main.get_group(cli.app).commands.values()]
    commands = ["", "fit", *(str(name) for name in own), *(name.replace(".", " ") for name in COMMANDS)]
    code = IMPORTED.format(commands=commands, heavy=HEAVY)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Usage: ") == len(commands)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
@pytest.mark.parametrize(
    ("line", "expected"),
    [("featurizers sca", "scalars"), ("featurizers train --ep", "--epochs"), ("featurizers fit c", "causal-basis")],
)
def test_a_shell_completes_commands_and_their_options_without_torch(shell: str, line: str, expected: str) -> None:
    words = {
        "bash": {"COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))},
        "zsh": {"_TYPER_COMPLETE_ARGS": line},
        "fish": {"_TYPER_COMPLETE_ARGS": line, "_TYPER_COMPLETE_FISH_ACTION": "get-args"},
    }[shell]
    code = (
        "import sys, os; sys.argv = ['featurizers']\n"
        "from featurizers.cli.app import app\n"
        "try: app(prog_name='featurizers')\n"
        "except SystemExit: pass\n"
        f"assert not set({HEAVY!r}) & set(sys.modules)"
    )
    environment = {**os.environ, **words, "_FEATURIZERS_COMPLETE": f"complete_{shell}"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert expected in done.stdout


def test_no_summary_of_the_help_is_cut() -> None:
    code, output = call("--help")
    assert code == 0
    assert "..." not in output.partition("Commands:")[2]
    assert all(len(line) <= 80 for line in output.splitlines())
    text = " ".join(output.split())
    assert all(command.help in text for name, command in COMMANDS.items() if "." not in name)


def test_a_host_is_not_needed_to_list_commands() -> None:
    host.cache_clear()
    assert call("--help")[0] == 0
    assert host.cache_info().currsize == 0
