"""docs/derived-scalars.md: its tables are those of the code. ``python -m tests.plugins.derived_scalars.test_docs``
writes them."""

import re
from pathlib import Path

import pytest
from featurizers_derived_scalars.builtin_quantities import SPECS
from featurizers_derived_scalars.circuit import KINDS
from featurizers_derived_scalars.quantities import reductions

from tests.support.decoders import DECODERS
from tests.support.tables import check_table, table, write_tables

PAGE = Path(__file__).parents[3] / "docs" / "derived-scalars.md"


def _quantities():
    for spec in SPECS:
        bases = ", ".join(f"`{basis}`" for basis in spec.bases) or "–"
        yield f"`{spec.name}`", spec.text, spec.group, bases


TABLES = {
    "quantities": table(["quantity", "what it is", "units", "default bases"], _quantities()),
    "places": table(
        ["kind", "what it holds", "axes"],
        [(f"`{name}`", kind.text, ", ".join(kind.axes)) for name, kind in KINDS.items()],
    ),
    "architectures": ", ".join(f"`{name}`" for name in DECODERS) + ".",
}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_that_of_the_code(name):
    check_table(PAGE, name, TABLES[name])


def test_every_reduction_is_listed():
    text = PAGE.read_text(encoding="utf-8")
    part = re.search(r"^## Reductions\n(.*?)^## ", text, re.MULTILINE | re.DOTALL)
    assert part
    listed = set(re.findall(r"^\| `(\w+)` \|", part[1], re.MULTILINE))
    public = {
        name for name, value in vars(reductions).items() if getattr(value, "__module__", "") == reductions.__name__
    }
    assert listed == {name for name in public if not name.startswith("_")} - {"sum_over"}


if __name__ == "__main__":
    write_tables(PAGE, TABLES)
