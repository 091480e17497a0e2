"""`scaffold`: writes the files of a new distribution from the templates."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Final

from featurizers.errors import UsageError, printable, shown
from featurizers.files import filling
from featurizers.registry import KIND, PluginInfo, install_command, plugins

MOST: Final = 40
"""Most characters of a name."""
# Files of the new distribution, by template; $module is filled in.
FILES: Final = {
    "pyproject.toml.txt": "pyproject.toml",
    "README.md.txt": "README.md",
    "gitignore.txt": ".gitignore",
    "init.py.txt": "$module/__init__.py",
    "featurizer.py.txt": "$module/featurizer.py",
    "py.typed.txt": "$module/py.typed",
    "test_contract.py.txt": "tests/test_contract.py",
    "test_kind.py.txt": "tests/test_kind.py",
}


def scaffold(name: str, out: Path | None = None, *, author: str | None = None) -> tuple[Path, list[str]]:
    """Write the distribution of a new kind, and return its folder and the names of its files.

    Args:
        name: of the kind and the plugin.
        out: folder that is new or empty; None for ``./featurizers-NAME``.
        author: for the metadata; None to leave it out.

    Raises:
        UsageError: no plugin can have the name, or one has it.
        ArtefactError: the folder is not empty, or cannot be written.
    """
    check_name(name)
    if author is not None and not (author.strip() and author.isprintable() and len(author) <= 200):
        raise UsageError(f"an author is a line of text, not {shown(author)}")
    words = {
        "name": name,
        "distribution": f"featurizers-{name}",
        "module": f"featurizers_{name.replace('-', '_')}",
        "cls": "".join(part.capitalize() for part in name.split("-")),
        "authors": "" if author is None else f"authors = [{{ name = {_toml(author)} }}]\n",
    }
    folder = (out or Path(words["distribution"])).expanduser()
    written: list[str] = []
    with filling(folder) as new:
        for template, target in FILES.items():
            path = Template(target).substitute(words)
            text = files("featurizers_new_plugin").joinpath("template", template).read_text(encoding="utf-8")
            (new / path).parent.mkdir(parents=True, exist_ok=True)
            (new / path).write_text(Template(text).substitute(words), encoding="utf-8")
            written.append(path)
    return folder, written


def check_name(name: str) -> None:
    """Raise UsageError unless a new plugin can have this name."""
    if name.startswith(("featurizers-", "featurizers_")):
        raise UsageError(f"give the name of the kind alone, {shown(name[12:])}; its distribution is featurizers-…")
    if not KIND.fullmatch(name) or "." in name or not re.match("[a-z]", name) or len(name) > MOST:
        raise UsageError(
            f"a name is lower-case words joined by '-' that begin with a letter, at most {MOST} characters, such as "
            f"my-flow, not {shown(name)}"
        )
    if install_command(name) is not None or name in ("composition", "dictionary", "reference"):
        raise UsageError(f"the name {name!r} belongs to this project; choose another")
    taken: list[PluginInfo] = [info for info in plugins() if info.name == name]
    if taken:
        raise UsageError(f"{printable(taken[0].distribution, 100)} has the name {name!r} already; choose another")


def _toml(text: str) -> str:
    """Return a text as a basic string of TOML."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
