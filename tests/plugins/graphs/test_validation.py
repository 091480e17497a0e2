"""Ablations by the packed engine equal plain hooks, and say what they should of a graph."""

from __future__ import annotations

from typing import Any

import featurizers
import pytest
import torch
from featurizers.errors import UsageError
from featurizers_graphs import validate
from featurizers_graphs.validation import pearson, spearman
from featurizers_patching import Addition, logits_with_additions

from tests.support.attribution_graphs import PROMPT, llama, random_cross_layer, random_transcoders

LAYERS, D, N = 3, 32, 64


def ablated(model: Any, maps: Any, graph: Any, numbers: list[int]) -> torch.Tensor:
    """Return the last token's logits with features taken away by plain hooks."""
    change = torch.zeros(LAYERS, len(PROMPT), D)
    for number in numbers:
        layer, position, column = graph.features[number].tolist()
        for to in range(layer, LAYERS):
            row = maps.get_parameter(f"W_dec.layer-{layer}.out-{to}")[column]
            change[to, position] -= graph.values[number] * row
    handles = [
        block.mlp.register_forward_hook(lambda m, a, out, number=number: out + change[number])
        for number, block in enumerate(model.model.layers)
    ]
    try:
        return model(torch.tensor([PROMPT])).logits[0, -1]
    finally:
        for handle in handles:
            handle.remove()


def test_effects_are_those_of_plain_hooks() -> None:
    model, maps = llama(), random_cross_layer(LAYERS, D, N)
    graph = featurizers.graph(model, PROMPT, maps, keep=1.0)
    found = validate(graph, model, maps, nodes=8, curve=[5, graph.n_features])
    clean = model(torch.tensor([PROMPT])).logits[0, -1]
    tokens = [target.token for target in graph.targets]
    for row, number in enumerate(found.nodes):
        logits = ablated(model, maps, graph, [number])
        moved = logits - logits.mean() - clean + clean.mean()
        torch.testing.assert_close(found.change[row], moved[tokens], rtol=1e-3, atol=1e-5)
        kl = torch.nn.functional.kl_div(logits.log_softmax(-1), clean.log_softmax(-1), log_target=True, reduction="sum")
        torch.testing.assert_close(found.kl[row], kl, rtol=1e-2, atol=1e-6)
        edge = graph.edges(into=graph.first_target, out_of=number)
        assert float(found.predicted[row, 0]) == pytest.approx(-edge[0].weight if edge else 0.0)
    assert found.kept == (0, 5, graph.n_features)
    assert found.recovered[0] == 0
    assert found.recovered[-1] == pytest.approx(1, abs=1e-5)
    order = graph.influence[: graph.n_features].argsort(descending=True, stable=True)
    some, none = (ablated(model, maps, graph, order[count:].tolist()) for count in (5, 0))
    kls = [float((clean.softmax(-1) * (clean.log_softmax(-1) - each.log_softmax(-1))).sum()) for each in (some, none)]
    assert found.recovered[1] == pytest.approx(1 - kls[0] / kls[1], abs=1e-3)


def test_a_feature_of_the_last_layer_does_what_its_edge_says_but_for_the_final_norm() -> None:
    model, maps = llama(), random_transcoders(LAYERS, D, N)
    graph = featurizers.graph(model, PROMPT, maps, keep=1.0)
    last = [node.number for node in graph.top(200) if node.layer == LAYERS - 1]
    frozen = validate(graph, model, maps, nodes=last, mode="frozen")
    assert frozen.direct_fit > 0.8
    assert torch.equal(frozen.influence, graph.influence[last])
    every = validate(graph, model, maps, nodes=40)
    assert every.influence_rank > 0.5
    assert "rank of influence" in repr(every)


def test_additions() -> None:
    model = llama()
    vector, site = torch.ones(D), featurizers.Site("mlp.out", 1)
    cells = [[Addition(site, 3, vector), Addition(site, 3, vector)], []]
    logits, clean = logits_with_additions(model, PROMPT, cells)
    expected = model(torch.tensor([PROMPT])).logits[0, -1]
    torch.testing.assert_close(clean, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits[1], expected, rtol=1e-4, atol=1e-5)

    def twice(module: Any, args: Any, out: torch.Tensor) -> torch.Tensor:
        out = out.clone()
        out[:, 3] += 2
        return out

    handle = model.model.layers[1].mlp.register_forward_hook(twice)
    expected = model(torch.tensor([PROMPT])).logits[0, -1]
    handle.remove()
    torch.testing.assert_close(logits[0], expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(UsageError, match="8 tokens"):
        logits_with_additions(model, PROMPT, [[Addition(site, 8, vector)]])


def test_ranks() -> None:
    a, b = torch.tensor([1.0, 2.0, 2.0, 9.0]), torch.tensor([2.0, 5.0, 4.0, 4.5])
    # by hand: ranks 1, 2.5, 2.5, 4 and 1, 4, 2, 3
    assert spearman(a, b) == pytest.approx(3 / (4.5 * 5) ** 0.5)
    assert pearson(a, 3 * a - 1) == pytest.approx(1)
    assert pearson(a, torch.ones(4)) == 0


def test_refusals() -> None:
    model, maps = llama(), random_transcoders(LAYERS, D, N)
    graph = featurizers.graph(model, PROMPT, maps)
    for options in (
        {"nodes": [graph.first_error]},
        {"nodes": 0},
        {"mode": "thawed"},
        {"curve": [10**9]},
        {"curve": ["a"]},
        {"nodes": "all"},
    ):
        with pytest.raises(UsageError):
            validate(graph, model, maps, **options)
    best = graph.top(1)[0]
    traced = featurizers.graph(model, PROMPT, maps, targets=(best.layer, best.position, best.feature))
    with pytest.raises(UsageError, match="measured on logits"):
        validate(traced, model, maps)
