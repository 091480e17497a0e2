"""Layer indexers of transformer-debugger, of which those that are not layer maps of derived-scalars are made here."""

import pytest
import torch
from featurizers.errors import SiteError
from featurizers_derived_scalars import Deriver, Need
from featurizers_derived_scalars.quantities import At, DerivedSource, RawSource
from featurizers_transformer_debugger import OffsetLayerIndexer

from tests.support.derived_scalars import made_by_hand


@pytest.fixture
def hand():
    return made_by_hand()


def double(_, x):
    return 2 * x


@pytest.mark.parametrize(
    ("at", "layer", "source", "results", "needed"),
    [
        (OffsetLayerIndexer(-1), 2, 1, {1, 2, 3}, {1}),
        (OffsetLayerIndexer(2), 0, 2, {0}, {2}),
    ],
)
def test_offsets(at, layer, source, results, needed):
    assert at.source(layer) == source
    assert at.results([0, 1, 2]) == frozenset(results)
    assert at.sources(frozenset({layer})) == frozenset(needed)


def test_impossible_layers():
    with pytest.raises(SiteError, match="no layer -1 from 0"):
        OffsetLayerIndexer(-1).source(0)
    with pytest.raises(SiteError, match="without layer"):
        OffsetLayerIndexer(1).source(None)


def test_sources_of_other_layers(hand):
    def less(_, here, before, first):
        return here - before + 100 * first

    made = Deriver(
        "less",
        (
            RawSource("mlp.neurons"),
            RawSource("mlp.neurons", at=OffsetLayerIndexer(-1)),
            RawSource("mlp.neurons", at=At(0)),
        ),
        ("token", "neuron"),
        less,
    )
    found = made.derive(hand)
    assert [layer for _, layer in found] == [1, 2]
    assert torch.equal(found["less", 2], 6 + 100 * torch.arange(6.0).reshape(2, 3))
    shifted = Deriver("shifted", (DerivedSource(made, OffsetLayerIndexer(1)),), ("token", "neuron"), double)
    assert [layer for _, layer in shifted.derive(hand)] == [0, 1]
    assert torch.equal(shifted.derive(hand)["shifted", 1], 2 * found["less", 2])
    circuit = hand.circuit
    assert made.needs(circuit, [2]) == {Need("mlp.neurons", "forward", frozenset({layer})) for layer in (0, 1, 2)}
    assert shifted.needs(circuit, [0]) == {Need("mlp.neurons", "forward", frozenset({layer})) for layer in (0, 1)}
    assert made.needs(circuit) == {Need("mlp.neurons"), Need("mlp.neurons", "forward", frozenset({0}))}
