"""The gallery of plugins: its rows are what the metadata and the modules of the distributions say."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from featurizers.names import KINDS
from featurizers_new_plugin.scaffold import scaffold

ROOT = Path(__file__).parents[2]
PROJECTS = sorted((ROOT / "plugins").glob("*/pyproject.toml"))
EXAMPLE = ROOT / "examples" / "plugin-flow" / "pyproject.toml"
PAGE = (ROOT / "docs" / "gallery.md").read_text(encoding="utf-8")
WORDS = {
    "featurizers_rules": "rules",
    "featurizers_read": "reader",
    "featurizers_resolve": "catalogue",
    "featurizers_write": "writer",
    "featurizers_backend": "holder",
    "featurizers_interventions": "interventions",
    "featurizers_scalars": "quantities",
}
"""What a plugin adds by a hook, besides kinds; other hooks only help these."""


def metadata(project: Path) -> dict[str, Any]:
    return tomllib.loads(project.read_text(encoding="utf-8"))["project"]


def hooks(folder: Path, module: str) -> set[str]:
    """Return the names of the hooks that the source of a module implements."""
    path = folder.joinpath(*module.split("."))
    source = (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text(encoding="utf-8")
    functions = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
    return {function.name for function in functions if function.name.startswith("featurizers_")}


def row(project: Path, page: str) -> str:
    """Return the row of a distribution, whose description links to a page."""
    record = metadata(project)
    points = record["entry-points"]
    implemented = {name for module in points["featurizers"].values() for name in hooks(project.parent, module)}
    kinds = [f"`{kind}`" for plugin in sorted(points["featurizers"]) for kind in KINDS.get(plugin, (plugin,))]
    commands = [f"`{name.replace('.', ' ')}`" for name in sorted(points.get("featurizers.commands", {}))]
    adds = [f"kind{'s' * (len(kinds) > 1)} {', '.join(kinds)}"] if "featurizers_register" in implemented else []
    adds += [f"command{'s' * (len(commands) > 1)} {', '.join(commands)}"] if commands else []
    adds += [word for hook, word in WORDS.items() if hook in implemented]
    description = record["description"].removesuffix(".")
    return f"| `pip install {record['name']}` | [{description}]({page}) | {'; '.join(adds) or 'functions'} |"


@pytest.mark.parametrize("project", PROJECTS, ids=lambda path: path.parent.name)
def test_a_row_is_what_the_metadata_say(project: Path) -> None:
    name = metadata(project)["name"]
    found = re.search(rf"^\| `pip install {name}` \| \[[^]]+\]\(([^)]+)\) .*$", PAGE, re.MULTILINE)
    assert found, f"docs/gallery.md lacks the row: {row(project, 'PAGE.md')}"
    assert found[0] == row(project, found[1])


def test_every_word_of_the_table_is_explained() -> None:
    explained = set(re.findall(r"^\| (\w+) \| ", PAGE, re.MULTILINE))
    assert {"kind", "command", *WORDS.values(), "functions"} <= explained


def test_the_example_from_outside_adds_what_its_row_says() -> None:
    points = metadata(EXAMPLE)["entry-points"]
    assert points == {"featurizers": {"flow": "featurizers_flow"}}
    assert hooks(EXAMPLE.parent, "featurizers_flow") == {"featurizers_register"}
    section = PAGE.partition("## Plugins of others\n")[2].partition("\n## ")[0]
    assert re.search(r"^\| .*examples/plugin-flow.* \| kind `flow` \|$", section, re.MULTILINE)


def test_a_new_plugin_has_the_keyword_of_the_page(tmp_path: Path) -> None:
    folder, _ = scaffold("my-kind", tmp_path / "new")
    for project in (folder / "pyproject.toml", EXAMPLE):
        keywords = metadata(project)["keywords"]
        assert "featurizers-plugin" in keywords
    assert "the keyword `featurizers-plugin`" in PAGE
