"""Tables that notebooks show of sites and featurizers: escaped, and without what is not known."""

from __future__ import annotations

from html.parser import HTMLParser

import featurizers
import torch
from featurizers import Site
from featurizers.format import Label
from featurizers.format.html import MOST, html_table


class Cells(HTMLParser):
    """Texts of the cells by row, and every tag, as a browser would see them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


HOSTILE = "<script>alert(1)</script>\x1b[31m\u202e&amp;"


def test_names_and_values_are_escaped_and_none_is_left_out() -> None:
    text = html_table(HOSTILE, {HOSTILE: HOSTILE, "number": 3, "nothing": None, "long": "x" * 5000})
    cells = Cells(text)
    assert set(cells.tags) == {"table", "caption", "tbody", "tr", "th", "td"}
    assert text.isprintable()
    assert cells.texts[0].startswith("<script>alert(1)</script>\\x1b[31m")
    assert "number" in cells.texts
    assert "nothing" not in cells.texts
    assert len(cells.texts[-1]) <= MOST + 10


def test_a_site_is_a_table() -> None:
    site = Site("resid.post", 3).at(model="owner/<b>", position=(-1, 0))
    assert Cells(site._repr_html_()).texts == [
        "Site resid.post:3",
        "what it is",
        "residual stream leaving a block",
        "tokens",
        "-1, 0",
        "model",
        "owner/<b>",
    ]
    assert Cells(Site("module", module="a.<i>", side="output")._repr_html_()).tags == ["table", "caption", "tbody"]


def test_a_featurizer_is_a_table() -> None:
    f = featurizers.create("subspace", d_in=8, n_features=2, seed=0)
    f.id = HOSTILE
    f.site = Site("mlp.out", 1).at(model="owner/model")
    f.feature_sets = {"<b>": torch.tensor([1])}
    f.labels = [Label(0, "rivers", author="x")]
    cells = Cells(f._repr_html_())
    assert set(cells.tags) == {"table", "caption", "tbody", "tr", "th", "td"}
    rows = dict(zip(cells.texts[1::2], cells.texts[2::2], strict=True))
    assert cells.texts[0] == "SubspaceFeaturizer (subspace)"
    assert rows["config"] == '{"d_in": 8, "n_features": 2, "seed": 0}'
    assert (rows["features"], rows["site"], rows["model"]) == ("2", "mlp.out:1", "owner/model")
    assert (rows["feature sets"], rows["labels"]) == ("<b>", "1")
    bare = Cells(featurizers.create("identity", d_in=4)._repr_html_()).texts
    assert bare == ["IdentityFeaturizer (identity)", "config", '{"d_in": 4}', "features", "4"]
