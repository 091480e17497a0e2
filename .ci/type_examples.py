"""Check the types of every Python example in the documentation: one run of mypy over the blocks of each page.

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


def main() -> int:
    """Write the modules to a folder, run mypy over it, and name the page of each error."""
    pages = [Path(name).resolve() for name in sys.argv[1:]] or PAGES
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / PACKAGE
        package.mkdir()
        for number, page in enumerate(pages):
            code = module(text_of(page))
            if code.strip():
                (package / f"page_{number}.py").write_text(code, encoding="utf-8")
        # the same options as of the other run, so that its cache is used
        command = [sys.executable, "-m", "mypy", "--cache-dir", str(ROOT / ".mypy_cache"), str(package)]
        environment = {**os.environ, "MYPYPATH": folder}
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    for line in done.stdout.splitlines():
        match = re.match(r".*?page_(\d+)\.py:(.*)", line)
        print(f"{pages[int(match[1])].relative_to(ROOT)}:{match[2]}" if match else line)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
