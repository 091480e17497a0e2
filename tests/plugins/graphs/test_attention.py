"""What heads carry of edges, and what makes a head look: sums, and hooks on a plain model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import featurizers
import pytest
import torch
from featurizers.errors import UsageError
from featurizers_derived_scalars import Need, Place, capture
from featurizers_graphs import Traced

from tests.support.attribution_graphs import MODELS, PROMPT, llama, random_cross_layer, random_transcoders, shaken

LAYERS, D, N = 3, 32, 64


@pytest.mark.parametrize("name", ["llama", "gemma2", "neox-parallel"])
@pytest.mark.parametrize("skip", [False, True])
def test_heads_and_bypass_of_each_layer_add_up_to_the_edge(name: str, skip: bool) -> None:
    torch.manual_seed(0)
    model = shaken(MODELS[name]())
    maps: Any = random_cross_layer(LAYERS, D, N, skip=True) if skip else random_transcoders(LAYERS, D, N)
    graph = featurizers.graph(model, PROMPT, maps, keep=1.0)
    traced = Traced(graph, model, maps)
    edges = [edge for target in (graph.first_target, graph.top(1)[0].number) for edge in graph.edges(into=target)[:8]]
    edges += [edge for edge in graph.edges(into=graph.first_target) if edge.source >= graph.first_error][:4]
    several = 0
    for edge, found in zip(edges, traced.heads(edges), strict=True):
        assert found.edge.source == edge.source
        assert found.edge.weight == pytest.approx(edge.weight, rel=1e-3, abs=1e-4)
        feature = edge.source < graph.n_features
        if not (skip and feature):  # a cross-layer feature writes on while it is carried
            sums = found.heads.sum(1) + found.bypass
            torch.testing.assert_close(sums, torch.full_like(sums, edge.weight), rtol=1e-3, atol=2e-4)
        several += len(found.layers)
    assert several > 0


@pytest.mark.parametrize("skip", [False, True])
def test_heads_of_the_last_layer_carry_what_plain_matrices_say(skip: bool) -> None:
    """By the weights of Llama, the scales of its norms and its patterns: an embedding is carried to the logits."""
    model, maps = llama(), random_cross_layer(LAYERS, D, N, skip=skip)
    graph = featurizers.graph(model, PROMPT, maps, keep=1.0, targets=[5])
    edge = next(edge for edge in graph.edges(into=graph.first_target) if edge.source >= graph.first_token)
    (found,) = Traced(graph, model, maps).heads([edge])
    (raw,) = capture(model, PROMPT, [Need("resid.embed"), Need("attn.probs"), Need("resid.final")])
    last = model.model.layers[-1]
    position = edge.source - graph.first_token
    # in the last layer the stream of the target's token alone is read, after the norms of attention and of the head
    stream = carried(model, raw, maps, position, LAYERS - 1, skip)
    normed = stream / raw.scale("attn", LAYERS - 1) * last.input_layernorm.weight
    values = (normed @ last.self_attn.v_proj.weight.T).view(len(PROMPT), 2, 8).repeat_interleave(2, 1)
    pattern = raw[Place("attn.probs", LAYERS - 1), "forward"]
    z = torch.einsum("qkh,khe->qhe", pattern, values)
    out = last.self_attn.o_proj.weight.T.view(4, 8, D)
    written = torch.einsum("he,hed->hd", z[-1], out)
    if skip:
        written = written + skipped(model, raw, maps, LAYERS - 1, written, -1)
    unembed = model.lm_head.weight[5] - model.lm_head.weight.mean(0)
    loads = (written / raw.scale("final")[-1] * model.model.norm.weight) @ unembed
    torch.testing.assert_close(found.heads[-1], loads, rtol=1e-3, atol=1e-5)


def skipped(model: Any, raw: Any, maps: Any, layer: int, x: torch.Tensor, tokens: Any = slice(None)) -> torch.Tensor:
    """Return what the skip connection of a layer adds for a change of the stream at some tokens."""
    scale = raw.scale("mlp", layer)[tokens]
    normed = x / scale * model.model.layers[layer].post_attention_layernorm.weight
    return normed @ maps.get_parameter(f"W_skip.out-{layer}.in-{layer}")


def carried(model: Any, raw: Any, maps: Any, position: int, layer: int, skip: bool) -> torch.Tensor:
    """Return what the embedding of a token has become before a layer, by frozen attention and skip connections."""
    stream = torch.zeros(len(PROMPT), D)
    stream[position] = model.model.embed_tokens.weight[PROMPT[position]]
    for number in range(layer):
        block = model.model.layers[number]
        normed = stream / raw.scale("attn", number) * block.input_layernorm.weight
        values = (normed @ block.self_attn.v_proj.weight.T).view(len(PROMPT), 2, 8).repeat_interleave(2, 1)
        z = torch.einsum("qkh,khe->qhe", raw[Place("attn.probs", number), "forward"], values)
        stream = stream + z.flatten(1) @ block.self_attn.o_proj.weight.T
        stream = stream + skipped(model, raw, maps, number, stream) if skip else stream
    return stream


@pytest.mark.parametrize("name", ["llama", "neox-parallel"])
def test_what_nodes_add_to_a_score_adds_up(name: str) -> None:
    torch.manual_seed(0)
    model = shaken(MODELS[name]())
    maps = random_cross_layer(LAYERS, D, N, skip=True)
    graph = featurizers.graph(model, PROMPT, maps)
    traced = Traced(graph, model, maps)
    (raw,) = capture(model, PROMPT, [Need("attn.q"), Need("attn.k"), Need("attn.logits")])
    for layer, head, query, key in ((2, 1, 6, 2), (1, 3, 7, 7)):
        found = traced.attention(layer, head, query, key)
        score = float(raw[Place("attn.logits", layer), "forward"][query, key, head])
        assert found.score == pytest.approx(score, rel=1e-4)
        for nodes, constant, offset in (
            (found.query, found.query_constant, found.offset_query),
            (found.key, found.key_constant, found.offset_key),
        ):
            assert float(nodes.sum()) + constant + offset == pytest.approx(score, rel=1e-3, abs=1e-4)
        # nodes at later tokens than the query cannot matter, nor nodes of the layer itself or later ones
        features = graph.features
        assert not found.query[: graph.n_features][(features[:, 1] > query) | (features[:, 0] >= layer)].any()
        assert not found.key[: graph.n_features][features[:, 1] > key].any()
        if name == "llama":  # its projections have no bias
            assert abs(found.offset_query) < 1e-3 * max(1.0, abs(score))


def test_refusals() -> None:
    model, maps = llama(), random_transcoders(LAYERS, D, N)
    graph = featurizers.graph(model, PROMPT, maps)
    traced = Traced(graph, model, maps)
    for wrong in ((9, 0, 1, 0), (0, 9, 1, 0), (0, 0, 1, 2), (0, 0, 99, 0)):
        with pytest.raises(UsageError):
            traced.attention(*wrong)
    with pytest.raises(UsageError, match="other features are active"):
        Traced(graph, model, random_transcoders(LAYERS, D, N, seed=5))
    with pytest.raises(UsageError, match="pairs of a source and a target"):
        traced.heads([3])  # type: ignore[list-item]
    with pytest.raises(UsageError, match="does not say how many"):
        Traced(replace(graph, about={**graph.about, "first": "x"}), model, maps)
    with pytest.raises(UsageError, match="no reader"):
        traced.heads([(0, graph.first_error)])
    with pytest.raises(UsageError, match="not out of targets"):
        traced.heads([(graph.first_target, graph.first_target)])
