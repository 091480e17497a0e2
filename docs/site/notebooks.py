"""Run the tutorials, or write them as pages.

A tutorial is a notebook in ``docs/tutorials``, which is kept with its outputs. ``python docs/site/notebooks.py`` runs
each anew with the models that it names, which takes some minutes; names of tutorials choose some. The site shows them
as pages.
"""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "docs/tutorials"
INSTALL = re.compile(r"(%pip install .+\n?)((?:.*\n?)*)")
"""The second cell of a tutorial: what to install, and perhaps other lines."""
WIDGET = "application/vnd.jupyter.widget-view+json"


def run(path: Path) -> None:
    """Run a notebook in an empty folder, and keep what it printed and drew.

    Raises:
        CellExecutionError: a cell fails.
    """
    notebook = nbformat.read(path, as_version=4)
    install = notebook.cells[1]
    line, rest = INSTALL.match(install.source).groups()
    install.source = rest  # the packages are here
    with tempfile.TemporaryDirectory() as folder:
        resources = {"metadata": {"path": folder}}
        NotebookClient(notebook, timeout=3600, record_timing=False, resources=resources).execute()
    install.source = line + rest
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if not _of_one_machine(output)]
    notebook.metadata.pop("widgets", None)
    nbformat.write(notebook, path)


def _of_one_machine(output: Any) -> bool:
    """Return whether an output is a progress bar or a warning."""
    return output.get("name") == "stderr" or WIDGET in output.get("data", {})


def page(path: Path, pages: Path, source: str) -> None:
    """Write a notebook as a page of the site, with its pictures, and beside it the notebook to download.

    Args:
        path: of the notebook.
        pages: folder of the site's pages.
        source: address of the repository, from which Colab opens the notebook.
    """
    body, resources = MarkdownExporter().from_filename(str(path))
    folder = pages / "tutorials"
    folder.mkdir(exist_ok=True)
    for name, picture in resources["outputs"].items():
        body = body.replace(f"]({name})", f"]({path.stem}-{name})").replace("![png]", "![Picture that the cell draws]")
        (folder / f"{path.stem}-{name}").write_bytes(picture)
    colab = source.replace("https://github.com/", "https://colab.research.google.com/github/")
    links = f"[Download the notebook]({path.name}) or [run it in Colab]({colab}/blob/main/docs/tutorials/{path.name})."
    title, _, rest = body.lstrip().partition("\n")
    (folder / f"{path.stem}.md").write_text(f"{title}\n\n{links}\n{rest}", encoding="utf-8")
    (folder / path.name).write_bytes(path.read_bytes())


def main() -> None:
    """Run the tutorials that are named, or all of them."""
    for path in sorted(FOLDER.glob("*.ipynb")):
        if len(sys.argv) == 1 or path.stem in sys.argv[1:]:
            print(f"running {path.stem}", flush=True)
            run(path)


if __name__ == "__main__":
    main()
