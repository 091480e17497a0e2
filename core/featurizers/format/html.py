"""Small tables in HTML, by which notebooks show sites and featurizers."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Final

from featurizers.errors import printable

MOST: Final = 300
"""Characters that are shown of one value."""


def html_table(title: str, rows: Mapping[str, object]) -> str:
    """Return a table of names and values, escaped; values that are None are left out.

    Args:
        title: above the table.
        rows: values by name.
    """
    shown = {name: value for name, value in rows.items() if value is not None}
    cells = "".join(
        f'<tr><th style="text-align:left">{_text(name)}</th><td style="text-align:left">{_text(value)}</td></tr>'
        for name, value in shown.items()
    )
    return f"<table><caption>{_text(title)}</caption><tbody>{cells}</tbody></table>"


def _text(value: object) -> str:
    return escape(printable(str(value), MOST))
