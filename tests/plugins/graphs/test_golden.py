"""Graphs equal those of circuit-tracer, on the same weights."""

from __future__ import annotations

import featurizers
import pytest
import torch
from featurizers_graphs import Graph
from torch import Tensor

from tests.support.attribution_graphs import CASES, golden


def dense(graph: Graph) -> Tensor:
    """Return the matrix of edges ``(target, source)``."""
    matrix = torch.zeros(graph.n_nodes, graph.n_nodes)
    matrix[graph.edge_targets, graph.sources.long()] = graph.weights
    return matrix


@pytest.mark.parametrize("name", CASES)
def test_circuit_tracers_graph(name: str) -> None:
    given = golden(name)
    expected = given.tensors
    graph = featurizers.graph(given.model, expected["tokens"], given.maps, keep=1.0)
    assert torch.equal(graph.features, expected["features"])
    torch.testing.assert_close(graph.values, expected["values"], rtol=1e-5, atol=1e-5)
    assert [target.token for target in graph.targets] == expected["logits"].tolist()
    weights = torch.tensor([target.weight for target in graph.targets])
    torch.testing.assert_close(weights, expected["probabilities"], rtol=1e-4, atol=1e-6)
    # rows of features that nothing depends on are not made here
    matrix, adjacency = dense(graph), expected["adjacency"].clone()
    adjacency[: graph.n_features][~graph.expanded] = 0
    assert (matrix - adjacency).abs().max() <= 2e-6 * adjacency.abs().max()
    torch.testing.assert_close(graph.influence, expected["influence"], rtol=1e-4, atol=1e-7)
    assert torch.equal(graph.influence > 0, expected["influence"] > 0)
    replacement, completeness = graph.scores
    assert replacement.low == replacement.high
    assert completeness.low == completeness.high
    torch.testing.assert_close(
        torch.tensor([replacement.low, completeness.low]), expected["scores"], rtol=1e-5, atol=1e-6
    )
    for number, (nodes, edges) in enumerate(given.thresholds):
        pruned = graph.prune(nodes, edges)
        assert torch.equal(pruned.kept, expected[f"nodes.{number}"])
        assert torch.equal(dense(pruned) != 0, expected[f"edges.{number}"])


@pytest.mark.parametrize("name", CASES)
def test_rows_add_up(name: str) -> None:
    """They do not in circuit-tracer, which leaves the biases out."""
    given = golden(name)
    graph = featurizers.graph(given.model, given.tensors["tokens"], given.maps, keep=0.9)
    assert graph.check_complete(2e-5) > 0
    off = graph.summed + graph.constant - graph.total
    without = (graph.summed - graph.total).abs().max()
    assert off.abs().max() < 1e-4 < without
