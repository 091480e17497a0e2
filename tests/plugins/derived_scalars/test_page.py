"""The tokens of a page: what is read and written against the weights, and that no token is markup."""

import dataclasses
import re
from html.parser import HTMLParser

import pytest
import torch
from featurizers_derived_scalars import Basis, Circuit, Node, Place, capture
from featurizers_derived_scalars.command.observing import Observation, observed, unmasked
from featurizers_derived_scalars.command.page import Page, colour_limit, write_page
from featurizers_derived_scalars.command.tokens import reads_tokens, tokens_read, tokens_written, writes_tokens
from featurizers_derived_scalars.quantities import value
from featurizers_derived_scalars.results import Scalar, Scalars

from tests.support.models import prompts, tiny_model

LAYER, TOKEN, NEURON = 1, 3, 17


@pytest.fixture(scope="module")
def captured():
    circuit = Circuit(tiny_model("gpt2"))
    scalar = value(Basis("mlp.neurons"))
    (raw,) = capture(circuit, prompts(5), scalar.needs(circuit))
    return circuit, raw


def test_tokens_written_are_those_of_the_neurons_row(captured):
    circuit, raw = captured
    model = circuit.model
    node = Node(Basis("mlp.neurons"), LAYER, (TOKEN, NEURON))
    activation = raw[Place("mlp.neurons", LAYER), "forward"][TOKEN, NEURON]
    row = activation * model.transformer.h[LAYER].mlp.c_proj.weight[NEURON]
    logits = ((row - row.mean()) * model.transformer.ln_f.weight) @ model.lm_head.weight.T
    best, least = tokens_written(raw, node, most=5)
    assert best == logits.topk(5).indices.tolist()
    assert least == (-logits).topk(5).indices.tolist()


def test_tokens_read_are_those_of_the_neurons_column(captured):
    circuit, raw = captured
    block = circuit.model.transformer.h[LAYER]
    node = Node(Basis("mlp.neurons"), LAYER, (TOKEN, NEURON), pre_activation=True)
    column = block.ln_2.weight * block.mlp.c_fc.weight[:, NEURON]
    scores = circuit.model.transformer.wte.weight @ (column - column.mean())
    best, least = tokens_read(raw, node, most=5)
    assert best == scores.topk(5).indices.tolist()
    assert least == (-scores).topk(5).indices.tolist()


def test_who_reads_and_who_writes():
    neuron, embedding = Node(Basis("mlp.neurons"), 1, (3, 4)), Node(Basis("resid.embed", whole=True), None, (3, 0))
    bias, summed = Node(Basis("mlp.bias", whole=True), 1, (3, 0)), Node(Basis("attn.probs"), 1, (3, None, 2))
    scale = Node(Basis("norm.mlp.scale"), 1, (3, 0))
    assert [reads_tokens(node) for node in (neuron, embedding, bias, summed, scale)] == [True, *[False] * 4]
    assert [writes_tokens(node) for node in (neuron, embedding, bias, summed, scale)] == [True] * 3 + [False] * 2


def _page(captured, text="", **changed):
    """A page of one quantity on five tokens; every text from outside is the given one."""
    _, raw = captured
    rows = {"value": [{"value": 1.0, "layer": 1, "node": text, "token": text, "key": text}]}
    sums = Observation({("value:mlp.neurons", 1): [1.0, -2.0, 3.0, 0.5, 0.0]})
    about = {"value:mlp.neurons": Scalar(("token", "neuron"), Basis("mlp.neurons"))}
    page = Page(text, [text] * 5, text, rows, about, {"value": sums}, {"value": []}, None, raw, text)
    return dataclasses.replace(page, **changed)


class _Reader(HTMLParser):
    """Elements and attributes of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes = set(), []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs


HOSTILE = [
    "<script>alert('$x$')</script>",
    "\" onerror='alert(1)",
    "</style><img src=//a.b/c>",
    "{{ page.raw }}",
    "a\u202eb",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_from_outside_is_markup(captured, tmp_path, text):
    plain, hostile = tmp_path / "plain.html", tmp_path / "hostile.html"
    write_page(plain, _page(captured, "plain"))
    write_page(hostile, _page(captured, text))
    wanted, found = (_Reader(file.read_text(encoding="utf-8")) for file in (plain, hostile))
    assert found.tags == wanted.tags
    assert [name for name, _ in found.attributes] == [name for name, _ in wanted.attributes]
    assert "<script" not in hostile.read_text(encoding="utf-8")
    assert "{{" in text or "{{" not in hostile.read_text(encoding="utf-8")


def test_a_page_asks_nothing_of_the_network(captured, tmp_path):
    write_page(tmp_path / "page.html", _page(captured, "plain"))
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    page = _Reader(text)
    assert all(value.startswith("data:image/png;base64,") for name, value in page.attributes if name in ("src", "href"))
    assert page.tags.isdisjoint({"script", "link", "iframe", "object", "a"})
    assert ("http-equiv", "Content-Security-Policy") in page.attributes
    assert "default-src 'none'" in text
    assert not re.search(r"//|url\(|@import", re.sub(r"base64,[^\"]+", "", text))


def test_a_page_says_what_was_run_and_what_it_shows(captured, tmp_path):
    write_page(tmp_path / "page.html", _page(captured, command="featurizers scalars --what value", masked=1))
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "featurizers scalars --what value" in text
    assert f"torch {torch.__version__.partition('+')[0]}" in text
    assert "The activations <code>value</code>" in text
    assert "Unit: activation." in text
    assert "Red is positive, blue negative, white zero." in text
    assert "The first token and what attends to" in text


def test_a_few_enormous_cells_do_not_leave_the_others_pale():
    rows = [[500.0, *(float(j % 3 - 1) for j in range(20))] for _ in range(30)]
    assert colour_limit(rows, first_apart=True) == 1.0
    assert colour_limit([[0.0, 0.0], [0.0, 0.0]], first_apart=True) == 1.0
    assert colour_limit([[7.0], [-3.0]], first_apart=True) == 7.0
    heads = [[1.0] * 9 for _ in range(30)]
    heads[3][4] = -500.0
    assert colour_limit(heads, first_apart=False) == 3.0
    heads[3][4] = -2.5
    assert colour_limit(heads, first_apart=False) == 2.5


def test_the_first_tokens_are_left_out_of_sums_and_ranks():
    generator = torch.Generator().manual_seed(0)
    pairs = torch.randn(10, 2, generator=generator)
    heads = torch.full((4, 4, 2), float("-inf"))
    heads[tuple(torch.tril_indices(4, 4))] = pairs
    about = {"pairs": Scalar(("pair", "head"), Basis("attn.probs")), "heads": Scalar(("token", "key", "head"), None)}
    scalars = Scalars.of_tensors({("pairs", 0): pairs, ("heads", 0): heads}, about)
    seen, kept = Observation(), heads[1:, 1:].masked_fill(heads[1:, 1:].isinf(), 0.0)
    masked = observed(scalars, seen, lambda: None, 1)
    entries = [unmasked(entry, about[entry.name], 1) for entry in masked.topk(100)]
    for key in scalars:
        torch.testing.assert_close(torch.tensor(seen.by_head[key]), kept.sum((0, 1)))
    torch.testing.assert_close(torch.tensor(seen.by_token["heads", 0]), kept.sum((1, 2)))
    found = {entry.node.index: entry.value for entry in entries if entry.name == "pairs"}
    assert found == {(t, k, h): heads[t, k, h].item() for t in range(1, 4) for k in range(1, t + 1) for h in range(2)}
    assert all(pairs[entry.at] == entry.value for entry in entries if entry.name == "pairs")
    assert all(min(entry.at[:2]) >= 1 for entry in entries if entry.name == "heads")
