"""Check the types of every Python example in the documentation: mypy and pyright run over the blocks of each page.

The blocks of a page are one module, whose lines are those of the page. Names that the prose explains, such as ``model``
in the README's first example, are declared by a comment before the block, which readers do not see:

    <!-- given: model: torch.nn.Module; prompt: dict[str, torch.Tensor] -->

`<!-- not run: reason -->` and `<!-- not typed: reason -->` leave a block out. The cells of a notebook are blocks too.

Usage: python .ci/type_examples.py [PAGE ...]
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / "README.md", ROOT / "core" / "README.md"),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "plugins").glob("*/README.md")),
    *sorted((ROOT / "docs" / "tutorials").glob("*.ipynb")),
]
PACKAGE = "documented"
"""Name of the package of the modules; pyproject.toml has its options of mypy."""
BLOCK = re.compile(
    r"^(?P<skip><!-- not (?:run|typed): .+? -->\n)?(?:<!-- given: (?P<given>.+?) -->\n)?```python\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)

OTHERS = {
    r'attribute "generate" for class "\w+LMHeadModel"': "transformers asks for attributes that its own models lack",
    r'for class "card_data_class"': "huggingface_hub names the class of a card's data by an attribute",
    r'Method "forward" overrides class "Intervention"': "pyvene's own method has no body that says what it returns",
    r'Import "dictionary_learning\.': "`alias()` stands for that package, which is not installed",
}
"""Errors of pyright, which reads the source of packages without types, that are not this library's, and why."""


def text_of(page: Path) -> str:
    """Return a page, or the cells of a notebook as the blocks of one; lines of IPython are blank in it."""
    text = page.read_text(encoding="utf-8")
    if page.suffix != ".ipynb":
        return text
    cells = ["".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    return "".join(f"```python\n{re.sub('(?m)^%.*$', '', cell)}\n```\n" for cell in cells)


def module(text: str) -> str:
    """Return the examples of a page as one module; each statement stands on its line of the page."""
    lines = [""] * (text.count("\n") + 1)
    for match in BLOCK.finditer(text):
        first = text.count("\n", 0, match.start("code"))
        if match["skip"]:
            continue
        lines[first : first + match["code"].count("\n")] = match["code"].splitlines()
        if match["given"]:  # in place of the line ```python
            lines[first - 1] = f"import torch; {match['given']}"
    return "\n".join(lines) + "\n"


def mypy_command(folder: Path) -> list[str]:
    """Return the command of mypy, with the options of the other run, so that its cache is used."""
    return [sys.executable, "-m", "mypy", "--cache-dir", str(ROOT / ".mypy_cache"), str(folder / PACKAGE)]


def pyright_command(folder: Path) -> list[str]:
    """Write what pyright is to check, as it does for a reader whose editor shows its errors; return its command.

    basedpyright is pyright with its own node, so that pip installs all of it.
    """
    sources = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["mypy"]["mypy_path"]
    options = {
        "include": [PACKAGE],
        "extraPaths": [str(ROOT / source) for source in sources],  # it does not follow editable installations
        "typeCheckingMode": "standard",
        "reportMissingTypeStubs": False,
        "reportPossiblyUnboundVariable": "warning",  # as in pyright
    }
    (folder / "pyrightconfig.json").write_text(json.dumps(options), encoding="utf-8")
    command = [sys.executable, "-m", "basedpyright", "--project", str(folder), "--pythonpath", sys.executable]
    return [*command, "--outputjson"]


def of_mypy(output: str, pages: list[Path]) -> list[str]:
    """Return the lines that mypy prints, with the names of pages in place of modules."""
    lines = []
    for line in output.splitlines():
        match = re.match(r".*?page_(\d+)\.py:(.*)", line)
        lines.append(f"{pages[int(match[1])].relative_to(ROOT)}:{match[2]}" if match else line)
    return lines


def of_pyright(output: str, pages: list[Path]) -> list[str]:
    """Return the errors in pyright's JSON but for `OTHERS`, a line each, which names the page."""
    lines = []
    for found in json.loads(output)["generalDiagnostics"]:
        if found["severity"] == "error" and not any(re.search(pattern, found["message"]) for pattern in OTHERS):
            match = re.search(r"page_(\d+)\.py$", found["file"])
            page = pages[int(match[1])].relative_to(ROOT) if match else found["file"]
            message = " ".join(found["message"].split())
            lines.append(f"{page}:{found['range']['start']['line'] + 1}: error: {message} [{found.get('rule')}]")
    return lines


def main() -> int:
    """Write the modules to a folder, run both checkers over it at once, and name the page of each error."""
    pages = [Path(name).resolve() for name in sys.argv[1:]] or PAGES
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / PACKAGE).mkdir()
        for number, page in enumerate(pages):
            code = module(text_of(page))
            if code.strip():
                (folder / PACKAGE / f"page_{number}.py").write_text(code, encoding="utf-8")
        environment = {**os.environ, "MYPYPATH": name}
        commands = (mypy_command(folder), pyright_command(folder))
        running = [
            subprocess.Popen(each, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) for each in commands
        ]
        mypy, pyright = (process.communicate()[0] for process in running)
    print("mypy:", *of_mypy(mypy, pages), sep="\n")
    errors = of_pyright(pyright, pages)
    print("pyright:", *errors, f"{len(errors)} errors", sep="\n")
    return 1 if running[0].returncode or errors else 0


if __name__ == "__main__":
    sys.exit(main())
