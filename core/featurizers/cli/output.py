"""Output of commands: JSON and tables."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from featurizers.errors import MOST, printable

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo


def print_json(data: Any) -> None:
    """Print data as JSON with ASCII characters alone, as ``--json`` asks."""
    print(json.dumps(data, indent=2, ensure_ascii=True))


def escaped(text: str) -> str:
    """Return text of a plugin or of an artefact, line by line, with unprintable characters escaped."""
    return "\n".join(printable(line, MOST) for line in text[: 10 * MOST].split("\n"))


def in_short(names: Sequence[str], most: int = 3) -> str:
    """Return the first of several names, and how many more there are."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def commit_link(commit: CommitInfo) -> str:
    """Return the address of a commit, or of its pull request, fit to print: the Hub may send any text."""
    return printable(str(commit.pr_url or commit.commit_url), 500)


def print_rows(rows: Sequence[Mapping[str, Any]], columns: Sequence[str], *, as_json: bool) -> None:
    """Print rows as JSON, or some of their columns as a table, in which the column ``error`` may be left out.

    Args:
        rows: values by column.
        columns: columns of the table, in order; ``error`` appears only if a row has an error.
        as_json: whether to print all columns as JSON instead.
    """
    if as_json:
        print_json(rows)
        return
    columns = [column for column in columns if column != "error" or any(row["error"] for row in rows)]
    _print_table(columns, (["" if row[column] is None else str(row[column]) for column in columns] for row in rows))


def print_fields(fields: Mapping[str, Any]) -> None:
    """Print names and values as a table without a header; values that are not strings as JSON."""
    texts = (value if isinstance(value, str) else json.dumps(value, ensure_ascii=True) for value in fields.values())
    _print_table(["", ""], zip(fields, texts, strict=True), show_header=False)


def _print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, show_header: bool = True) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Column, Table

    table = Table(*(Column(column, overflow="fold") for column in columns), show_header=show_header)
    for row in rows:
        table.add_row(*(escape(escaped(text)) for text in row))
    Console(emoji=False).print(table)
