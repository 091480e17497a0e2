"""The tokens of a page: what is read and written against the weights, and that no token is markup."""

import pytest
from featurizers_derived_scalars import Basis, Circuit, Node, Place, capture
from featurizers_derived_scalars.command.observing import Observation
from featurizers_derived_scalars.command.page import Page, write_page
from featurizers_derived_scalars.command.tokens import reads_tokens, tokens_read, tokens_written, writes_tokens
from featurizers_derived_scalars.quantities import value

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


def test_no_token_is_markup(captured, tmp_path):
    _, raw = captured
    hostile = "<script>alert('$x$')</script>"
    rows = {"value": [{"value": 1.0, "layer": 1, "node": hostile, "token": hostile, "key": None}]}
    seen = Observation({("value", 1): [1.0, -2.0]})
    page = Page(hostile, [hostile, "b"], hostile, rows, {"value": seen}, {"value": []}, None, raw)
    write_page(tmp_path / "page.html", page)
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<script" not in text
    assert text.count("&lt;script&gt;") >= 5
