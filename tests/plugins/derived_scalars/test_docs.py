"""docs/derived-scalars.md: its tables are those of the code. ``python -m tests.plugins.derived_scalars.test_docs``
writes them."""

import re
from pathlib import Path

import pytest
from featurizers_derived_scalars import compat, reductions
from featurizers_derived_scalars.circuit import KINDS
from featurizers_derived_scalars.debugger_table import NEED_A_LATENT, NEED_A_NODE, ROWS
from featurizers_derived_scalars.plain import plain_specs

from tests.support.decoders import DECODERS

PAGE = Path(__file__).parents[3] / "docs" / "derived-scalars.md"


def _table(head, rows):
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])


def _names():
    for row in ROWS.values():
        needs = "node" if row.quantity in NEED_A_NODE else "latent" if row.quantity in NEED_A_LATENT else ""
        yield f"`{row.name}`", ", ".join(row.shape), f"`{row.spelled}`", needs


def _quantities():
    for spec in plain_specs():
        bases = ", ".join(f"`{basis}`" for basis in spec.bases) or "–"
        yield f"`{spec.name}`", spec.text, spec.group, bases


TABLES = {
    "quantities": _table(["quantity", "what it is", "units", "of, unless told"], _quantities()),
    "places": _table(
        ["kind", "what it holds", "axes"],
        [(f"`{name}`", kind.text, ", ".join(kind.axes)) for name, kind in KINDS.items()],
    ),
    "architectures": ", ".join(f"`{name}`" for name in DECODERS) + ".",
    "names": _table(["name", "axes", "in our terms", "needs"], _names()),
}


def _between(name):
    return re.compile(rf"(<!-- table: {name} -->\n).*?(<!-- end of table: {name} -->)", re.DOTALL)


@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_that_of_the_code(name):
    found = _between(name).search(PAGE.read_text(encoding="utf-8"))
    assert found
    assert found[0] == f"<!-- table: {name} -->\n\n{TABLES[name]}\n\n<!-- end of table: {name} -->"


def test_every_reduction_is_listed():
    text = PAGE.read_text(encoding="utf-8")
    part = re.search(r"^## Reductions\n(.*?)^## ", text, re.MULTILINE | re.DOTALL)
    assert part
    listed = set(re.findall(r"^\| `(\w+)` \|", part[1], re.MULTILINE))
    public = {
        name for name, value in vars(reductions).items() if getattr(value, "__module__", "") == reductions.__name__
    }
    assert listed == {name for name in public if not name.startswith("_")} - {"sum_over"}


def test_every_name_of_transformer_debuggers_classes_is_listed():
    text = PAGE.read_text(encoding="utf-8")
    _, _, part = text.partition("## transformer-debugger's classes")
    assert [name for name in compat.__all__ if f"`{name}`" not in part] == []


if __name__ == "__main__":
    text = PAGE.read_text(encoding="utf-8")
    for name, table in TABLES.items():
        text = _between(name).sub(lambda m, table=table: f"{m[1]}\n{table}\n\n{m[2]}", text)
    PAGE.write_text(text, encoding="utf-8")
