"""Tables of documentation pages that are those of the code."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])


def _between(name: str) -> re.Pattern[str]:
    return re.compile(rf"(<!-- table: {name} -->\n).*?(<!-- end of table: {name} -->)", re.DOTALL)


def check_table(page: Path, name: str, expected: str) -> None:
    """Fail unless a page has this text between the marks of a table."""
    found = _between(name).search(page.read_text(encoding="utf-8"))
    assert found
    assert found[0] == f"<!-- table: {name} -->\n\n{expected}\n\n<!-- end of table: {name} -->"


def write_tables(page: Path, tables: Mapping[str, str]) -> None:
    """Put tables between their marks."""
    text = page.read_text(encoding="utf-8")
    for name, content in tables.items():
        text = _between(name).sub(lambda m, content=content: f"{m[1]}\n{content}\n\n{m[2]}", text)
    page.write_text(text, encoding="utf-8")
