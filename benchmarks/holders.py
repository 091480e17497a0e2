"""What each way of holding a model can do, beside plain torch hooks: ``python benchmarks/holders.py``.

Tries every cell of `featurizers.testing.HolderContract` with every holder of ``tests/holders`` and writes the table of
docs/holders.md. Results are stored after each holder; one that is stored already is not tried again.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import math
import sys
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
from featurizers.testing import CELLS, SITES, HolderContract, measure

REPOSITORY = Path(__file__).parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results" / "holders.json"
PAGE = REPOSITORY / "docs" / "holders.md"
START, END = "<!-- results: holders -->", "<!-- end of results: holders -->"
GROUPS = list(dict.fromkeys(cell.group for cell in CELLS))
PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "peft",
    "bitsandbytes",
    "transformer-lens",
    "nnsight",
    "interp-engine",
)

LIBRARIES = ("TransformerLens", "nnsight", "interp-engine")
"""Begins of titles that stand last in the table."""


def main(
    holder: Annotated[list[str] | None, typer.Option(help="Text of titles; these are tried again.")] = None,
    docs: Annotated[bool, typer.Option(help="Write the table into docs/holders.md, and do nothing else.")] = False,
    results: Annotated[Path, typer.Option("--json", help="File for the results.")] = RESULTS,
) -> None:
    """Try every holder, and write the table."""
    store: dict[str, Any] = json.loads(results.read_text()) if results.exists() else {}
    warnings.simplefilter("ignore")
    for kind in () if docs else _holders():
        wanted = kind.title not in store if holder is None else any(text in kind.title for text in holder)
        if not wanted:
            continue
        if (tried := _tried(kind)) is not None:
            store[kind.title] = tried
            results.write_text(json.dumps(store, indent=1, ensure_ascii=False) + "\n")
    before, _, rest = PAGE.read_text().partition(START)
    PAGE.write_text(before + START + "\n" + _table(store) + END + rest.partition(END)[2])


def _holders() -> Iterator[type[HolderContract]]:
    """Return the suites of ``tests/holders`` in the order in which they stand there."""
    sys.path.insert(0, str(REPOSITORY))
    for path in sorted((REPOSITORY / "tests" / "holders").glob("test_*.py")):
        spec = importlib.util.spec_from_file_location(f"holders_{path.stem}", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except pytest.skip.Exception as reason:
            print(f"{path.name}: left out, {reason}")
            continue
        yield from (each for each in vars(module).values() if _is_suite(each))


def _is_suite(each: object) -> bool:
    return inspect.isclass(each) and issubclass(each, HolderContract) and bool(each.title)


def _tried(suite: type[HolderContract]) -> dict[str, Any] | None:
    """Return the outcome of each cell; None if a package is missing."""
    try:
        held = suite.make()
    except pytest.skip.Exception as reason:
        print(f"{suite.title}: left out, {reason}")
        return None
    cells: dict[str, Any] = {}
    for cell in CELLS:
        if reason := suite.reason_left_out(cell):
            cells[cell.name] = {"left out": reason}
            continue
        outcome = measure(held, cell)
        expects_refusal = suite.words_of_refusal(cell, held) is not None
        as_expected = (outcome.refusal is not None) == expects_refusal and not (
            outcome.difference > suite.tolerance * (10 if cell.gradient else 1)
        )
        if not as_expected:
            print(f"  NOT AS EXPECTED {suite.title}, {cell}: {outcome}")
        cells[cell.name] = {"refused": outcome.refusal} if outcome.refusal else {"difference": outcome.difference}
    print(suite.title, "done", flush=True)
    return {"cells": cells, "versions": _versions()}


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _table(store: dict[str, Any]) -> str:
    lines = [f"| holder | {' | '.join(GROUPS)} |", "|---" * (len(GROUPS) + 1) + "|"]
    notes: list[str] = []
    for title in sorted(store, key=lambda title: title.startswith(LIBRARIES)):
        tried = store[title]
        texts = [_of_group(tried["cells"], group, notes) for group in GROUPS]
        lines.append(f"| {title} | {' | '.join(texts)} |")
    versions = {name: number for tried in store.values() for name, number in tried["versions"].items()}
    listed = ", ".join(f"{name} {number}" for name, number in versions.items())
    return "\n".join([*lines, "", *(f"{n}. {note}" for n, note in enumerate(notes, 1)), "", f"Versions: {listed}.", ""])


def _of_group(cells: dict[str, Any], group: str, notes: list[str]) -> str:
    """Return the text of a cell of the table: the largest difference, and notes on what is refused or left out."""
    own = {cell.name: cells[cell.name] for cell in CELLS if cell.group == group and cell.name in cells}
    differences = [each["difference"] for each in own.values() if "difference" in each]
    refused = [name for name, each in own.items() if "refused" in each]
    text = "–" if not differences else _number(max(differences))
    if refused:
        of_all = "all" if not differences else f"{len(refused)} of {len(own)}"
        text += f" ({of_all} refused [{_note(_reason(own, refused), notes)}])"
    if left := next((each["left out"] for each in own.values() if "left out" in each), None):
        text += f" [{_note(left, notes)}]"
    return text


def _reason(own: dict[str, Any], refused: list[str]) -> str:
    """Return the first error, which names the first site that is refused; and the other sites."""
    error = own[refused[0]]["refused"].partition(". ")[0]
    sites = [name.removeprefix("steer ") for name in refused[1:] if name.removeprefix("steer ") in SITES]
    return f"“{error}”" + (f"; so {', '.join(sites)}" if sites else "")


def _note(text: str, notes: list[str]) -> int:
    """Return the number of a note, which is added if it is new."""
    if text not in notes:
        notes.append(text)
    return notes.index(text) + 1


def _number(value: float) -> str:
    return "0" if value == 0 else "NaN" if math.isnan(value) else f"{value:.0e}".replace("e-0", "e-")


if __name__ == "__main__":
    typer.run(main)
