"""docs/transformer-debugger.md: its table is that of the code, and every class is listed.
``python -m tests.plugins.transformer_debugger.test_docs`` writes the table."""

from pathlib import Path

import featurizers_transformer_debugger as debugger
from featurizers_transformer_debugger.table import NEED_A_LATENT, NEED_A_NODE, ROWS

from tests.support.tables import check_table, table, write_tables

PAGE = Path(__file__).parents[3] / "docs" / "transformer-debugger.md"


def _names():
    for row in ROWS.values():
        needs = "node" if row.quantity in NEED_A_NODE else "latent" if row.quantity in NEED_A_LATENT else ""
        yield f"`{row.name}`", ", ".join(row.shape), f"`{row.spelled}`", needs


TABLES = {"names": table(["name", "axes", "quantity", "needs"], _names())}


def test_the_table_is_that_of_the_code():
    check_table(PAGE, "names", TABLES["names"])


def test_every_name_of_transformer_debuggers_classes_is_listed():
    _, _, part = PAGE.read_text(encoding="utf-8").partition("## Classes")
    assert [name for name in debugger.__all__ if f"`{name}`" not in part and name != "upstream"] == []


if __name__ == "__main__":
    write_tables(PAGE, TABLES)
