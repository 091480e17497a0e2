"""Closed cases and symmetries of attribution graphs."""

from __future__ import annotations

from typing import Any

import featurizers
import pytest
import torch
from featurizers_derived_scalars import logit_difference
from featurizers_graphs import Graph
from featurizers_graphs.sweep import largest
from featurizers_transcoder import Transcoder

from tests.support.attribution_graphs import (
    PROMPT,
    cross_layer,
    llama,
    own_mlps,
    per_layer,
    random_cross_layer,
    random_transcoders,
    relu_gpt2,
)

LAYERS, D, N = 3, 32, 64


def matrix(graph: Graph) -> torch.Tensor:
    found = torch.zeros(graph.n_nodes, graph.n_nodes)
    found[graph.edge_targets, graph.sources.long()] = graph.weights
    return found


def test_a_model_that_is_its_own_transcoder_leaves_no_error() -> None:
    model = relu_gpt2()
    graph = featurizers.graph(model, PROMPT, own_mlps(model), first=0)
    assert graph.scores.replacement.low > 1 - 1e-5
    assert graph.scores.completeness.low > 1 - 1e-5
    assert graph.check_complete() < 2e-5
    # each feature is a neuron, whose activation transformers computes
    layer, position, neuron = graph.features[graph.n_features // 2].tolist()
    site = f"mlp.act:{layer}"
    acts = featurizers.collect(model, {"input_ids": torch.tensor([PROMPT])}, [site])[site]
    torch.testing.assert_close(graph.values[graph.n_features // 2], acts[0, position, neuron])


def test_a_map_whose_decoders_write_one_layer_each_is_transcoders() -> None:
    model = llama()
    maps = random_transcoders(LAYERS, D, N)
    parts = [[f.get_parameter(name) for f in maps] for name in ("W_enc.features.in", "b_enc.features", "b_dec.out")]
    decoders = []
    for layer, f in enumerate(maps):
        own = torch.zeros(N, LAYERS - layer, D)
        own[:, 0] = f.get_parameter("W_dec.features.out")
        decoders.append(own)
    both = featurizers.graph(model, PROMPT, cross_layer(parts[0], decoders, parts[1], parts[2]), keep=1.0)
    one = featurizers.graph(model, PROMPT, maps, keep=1.0)
    torch.testing.assert_close(matrix(both), matrix(one), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(both.influence, one.influence, rtol=1e-4, atol=1e-7)


def changed(maps: list[Any], order: torch.Tensor, units: torch.Tensor) -> list[Any]:
    """Return transcoders with their features in another order, and in other units."""
    rows = []
    for f in maps:
        W_enc, b_enc, W_dec, b_dec = (
            f.get_parameter(name) for name in ("W_enc.features.in", "b_enc.features", "W_dec.features.out", "b_dec.out")
        )
        rows.append(((W_enc * units[:, None])[order], (W_dec / units[:, None])[order], (b_enc * units)[order], b_dec))
    return per_layer(*(torch.stack(part) for part in zip(*rows, strict=True)))


def test_order_and_units_of_features_do_not_matter() -> None:
    model, maps = llama(), random_transcoders(LAYERS, D, N)
    order, units = torch.randperm(N), torch.rand(N) + 0.5
    before = featurizers.graph(model, PROMPT, maps, keep=1.0)
    after = featurizers.graph(model, PROMPT, changed(maps, order, units), keep=1.0)
    place = {tuple(feature): number for number, feature in enumerate(after.features.tolist())}
    numbers = [place[layer, t, int((order == k).nonzero())] for layer, t, k in before.features.tolist()]
    rest = list(range(before.n_features, before.n_nodes))
    same = torch.tensor(numbers + rest)
    torch.testing.assert_close(after.influence[same], before.influence, rtol=1e-4, atol=1e-7)
    # an edge into a feature has its unit; the feature's own value has it too, so that edges out of it do not change
    scale = torch.cat([units[before.features[:, 2]], torch.ones(len(rest))])
    torch.testing.assert_close(matrix(after)[same][:, same], matrix(before) * scale[:, None], rtol=1e-4, atol=1e-5)


def test_how_rows_are_batched_changes_no_number() -> None:
    model, maps = llama(), random_cross_layer(LAYERS, D, N)
    whole = featurizers.graph(model, PROMPT, maps, keep=1.0)
    # so little memory that rows come one at a time or two, and patterns and written vectors are computed again
    small = featurizers.graph(model, PROMPT, maps, keep=1.0, memory=90_000)
    torch.testing.assert_close(matrix(small), matrix(whole), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(small.influence, whole.influence, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("keep", [0.5, 0.9, 0.99])
def test_leaving_small_edges_out_changes_no_influence(keep: float) -> None:
    model, maps = llama(), random_transcoders(LAYERS, D, N)
    whole, part = (featurizers.graph(model, PROMPT, maps, keep=share) for share in (1.0, keep))
    assert torch.equal(part.influence, whole.influence)
    assert part.scores == whole.scores
    assert part.n_edges < whole.n_edges
    kept = torch.zeros(len(part.total)).index_add_(
        0, torch.repeat_interleave(torch.arange(len(part.total)), part.offsets.diff()), part.weights.abs()
    )
    made = part.absolute > 0
    assert bool((kept[made] >= keep * part.absolute[made] * (1 - 1e-5)).all())
    smaller = matrix(part)[matrix(part) != 0]
    assert torch.equal(smaller, matrix(whole)[matrix(part) != 0])


def test_largest_entries_hold_the_share_and_little_more() -> None:
    torch.manual_seed(0)
    size = torch.rand(1000, 3) ** 6
    for keep in (0.3, 0.9, 0.999):
        chosen = largest(size, keep)
        held = (size * chosen).sum(0) / size.sum(0)
        assert bool((held >= keep - 1e-6).all())
        # without the smallest 4 % of what is kept it would not be enough
        smallest = torch.where(chosen, size, torch.inf).amin(0)
        assert bool(((size * (size > 1.04 * smallest)).sum(0) / size.sum(0) < keep).all())
        assert bool(size[:, 0][chosen[:, 0]].min() >= size[:, 0][~chosen[:, 0]].max())
    assert not largest(torch.zeros(4, 1), 0.9).any()


def test_all_edges_are_kept_but_those_that_are_zero() -> None:
    graph = featurizers.graph(llama(), PROMPT, random_transcoders(LAYERS, D, N), keep=1.0)
    assert bool((graph.weights != 0).all())


def test_the_fewest_logits_that_hold_the_mass_are_targets() -> None:
    model = llama()
    model.lm_head.weight *= 10  # a peaked distribution, so that fewer than ten logits are enough
    probabilities = model(torch.tensor([PROMPT])).logits[0, -1].softmax(-1)
    graph = featurizers.graph(model, PROMPT, random_transcoders(LAYERS, D, N))
    count = len(graph.targets)
    assert 1 < count < 10
    assert [target.token for target in graph.targets] == probabilities.topk(count).indices.tolist()
    assert float(probabilities.topk(count - 1).values.sum()) < 0.95 <= float(probabilities.topk(count).values.sum())


def test_a_budget_gives_bounds_that_hold_the_scores() -> None:
    model, maps = llama(), random_transcoders(LAYERS, D, N)
    whole = featurizers.graph(model, PROMPT, maps)
    for nodes in (0, 10, 60, 200):
        part = featurizers.graph(model, PROMPT, maps, nodes=nodes)
        assert part.expanded.sum() == min(nodes, int((whole.influence[: whole.n_features] > 0).sum()))
        for known, exact in zip(part.scores, whole.scores, strict=True):
            assert known.low - 1e-6 <= exact.low <= known.high + 1e-6
        assert bool((part.influence <= whole.influence + 1e-6).all())
        assert part.check_complete() < 1e-4
    # most of the features that matter most are among those that are chosen
    top = set(whole.influence[: whole.n_features].topk(60).indices.tolist())
    chosen = featurizers.graph(model, PROMPT, maps, nodes=60)
    assert len(top & set(chosen.expanded.nonzero().flatten().tolist())) >= 45


def test_features_that_were_not_expanded_stay_in_a_pruned_graph() -> None:
    model, maps = llama(), random_transcoders(LAYERS, D, N)
    part = featurizers.graph(model, PROMPT, maps, nodes=20)
    pruned = part.prune(0.9, 0.99)
    left = pruned.kept[: part.n_features] & ~part.expanded
    assert left.any()
    leads = torch.zeros(part.n_nodes, dtype=torch.bool)
    leads[pruned.sources.long()] = True
    assert bool(leads[: part.n_features][left].all())


def test_layers_without_a_map_are_errors() -> None:
    model, maps = llama(), random_transcoders(LAYERS, D, N)
    graph = featurizers.graph(model, PROMPT, [maps[2]], keep=1.0)
    assert set(graph.features[:, 0].tolist()) == {2}
    assert graph.check_complete() < 1e-4
    # the error of the last layer at the last token is all that the MLP gives, and goes straight to the logits
    alone = featurizers.graph(model, PROMPT, [maps[0]], targets=[5], keep=1.0)
    number = alone.first_error + 2 * len(PROMPT) + len(PROMPT) - 1
    out = featurizers.collect(model, {"input_ids": torch.tensor([PROMPT])}, ["mlp.out:2"])["mlp.out:2"][0, -1]
    stream = featurizers.collect(model, {"input_ids": torch.tensor([PROMPT])}, ["resid.post:2"])["resid.post:2"][0, -1]
    scale = (stream.square().mean() + model.config.rms_norm_eps).sqrt()
    logits = model.lm_head(out / scale * model.model.norm.weight)
    (edge,) = alone.edges(into=alone.first_target, out_of=number)
    torch.testing.assert_close(torch.tensor(edge.weight), logits[5] - logits.mean(), rtol=1e-4, atol=1e-5)


def test_targets() -> None:
    model, maps = llama(), random_transcoders(LAYERS, D, N)
    logits = model(torch.tensor([PROMPT])).logits[0, -1]
    named = featurizers.graph(model, PROMPT, maps, targets=[5, 7], keep=1.0)
    torch.testing.assert_close(named.total[-2:], logits[[5, 7]] - logits.mean(), rtol=1e-4, atol=1e-5)
    metric = featurizers.graph(model, PROMPT, maps, targets=logit_difference(5, 7), keep=1.0)
    torch.testing.assert_close(metric.total[-1], logits[5] - logits[7], rtol=1e-4, atol=1e-5)
    difference = matrix(named)[-2, : named.first_target] - matrix(named)[-1, : named.first_target]
    torch.testing.assert_close(matrix(metric)[-1, : metric.first_target], difference, rtol=1e-4, atol=1e-5)
    # a function of logits at several tokens
    several = featurizers.graph(model, PROMPT, maps, targets=lambda x: x[-1, 5] + x[-2, 5], keep=1.0)
    assert several.check_complete() < 1e-4
    # a feature as the target has the row that it has as a node
    whole = featurizers.graph(model, PROMPT, maps, keep=1.0)
    best = next(node for node in whole.top(20) if node.layer == 2)
    traced = featurizers.graph(model, PROMPT, maps, targets=(2, best.position, best.feature), keep=1.0)
    row = matrix(whole)[best.number, : whole.first_target]
    torch.testing.assert_close(matrix(traced)[-1, : whole.first_target], row, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(traced.total[-1], whole.total[best.number])


@pytest.mark.parametrize("normalize", ["rms", "standard", "layer-norm", "constant-norm", "scale"])
def test_normalised_reads_add_up(normalize: Any) -> None:
    model = llama()
    generator = torch.Generator().manual_seed(0)
    maps = []
    for layer in range(LAYERS):
        W_enc, W_dec = (torch.randn(N, D, generator=generator) / 6 for _ in range(2))
        centre = torch.randn(D, generator=generator) / 10
        options = {"normalize": normalize, "centre": centre, "input_scale": 2.0 if normalize == "scale" else 1.0}
        f = Transcoder.from_weights(W_enc, W_dec, b_enc=torch.full((N,), -0.2), **options)
        f.reads, f.writes = {"in": f"resid.mid:{layer}"}, {"out": f"mlp.out:{layer}"}
        maps.append(f)
    graph = featurizers.graph(model, PROMPT, maps)
    assert graph.check_complete() < 1e-4
    # the totals are the values of the features, since the rule is a ReLU
    made = graph.expanded
    torch.testing.assert_close(graph.total[: graph.n_features][made], graph.values[made], rtol=1e-4, atol=1e-5)


def test_a_slice_leaves_the_rest_to_the_error() -> None:
    model, maps = llama(), random_transcoders(LAYERS, D, N)
    part = featurizers.graph(model, PROMPT, [f.take(list(range(10, 30))) for f in maps])
    assert set(part.features[:, 2].tolist()) <= set(range(10, 30))
    assert part.check_complete() < 1e-4


def test_half_precision() -> None:
    model, maps = llama(), random_transcoders(LAYERS, D, N)
    single = featurizers.graph(model, PROMPT, maps, targets=[5])
    half = featurizers.graph(model.to(torch.bfloat16), PROMPT, maps, targets=[5])
    # sums are in float32; what is left is what the model itself rounds
    assert half.check_complete() < 5e-2
    assert abs(half.scores.replacement.low - single.scores.replacement.low) < 0.05
