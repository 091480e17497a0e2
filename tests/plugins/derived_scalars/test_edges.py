"""Traced nodes and edges: one VJP says what many JVPs say, and all edges into a node add up."""

from __future__ import annotations

import functools

import pytest
import torch
from featurizers.errors import FeatureIndexError, PositionError, SiteError, UsageError
from featurizers_derived_scalars.api import direct_total, plan, scalars
from featurizers_derived_scalars.capturing import capture
from featurizers_derived_scalars.circuit import Circuit, Need
from featurizers_derived_scalars.nodes import Basis, Node
from featurizers_derived_scalars.quantities import (
    MetricGrad,
    NodeGrad,
    NodeMetric,
    activation_from,
    direction,
    edge_from,
    edge_to,
    node_write,
    node_write_to,
    residual_of,
    vocab_read,
    vocab_write,
    write,
    write_to,
)
from featurizers_derived_scalars.results import Scalars

from tests.support.decoders import PARALLEL, shared_decoder, tokens
from tests.support.derived_scalars import METRIC, backward, captured, close, dictionary, forward

HEADS, NEURONS = Basis("attn.probs"), Basis("mlp.neurons")
NODES = [Basis(kind) for kind in ("resid.embed", "attn.probs", "attn.bias", "mlp.neurons", "mlp.bias")]
EDGES = ("gpt2", "llama", "mistral", "qwen3", "gpt_neox", "gemma2", "olmo2", "opt", "gptj", "cohere", "granite")


@functools.cache
def latents(name: str) -> Basis:
    return Basis("mlp.delta", {2: dictionary(Circuit(shared_decoder(name)).d_model, "topk")})


def targets(name: str) -> dict[str, Node]:
    """A node of every sort in the last layer, at the last token, which the metric is at."""
    return {
        "neuron": Node(NEURONS, 2, (6, 7)),
        "neuron before": Node(NEURONS, 2, (6, 7), pre_activation=True),
        "probability": Node(HEADS, 2, (6, 4, 1)),
        "q": Node(Basis("attn.probs", via="q"), 2, (6, 4, 1)),
        "k": Node(Basis("attn.probs", via="k"), 2, (6, 4, 1)),
        "score": Node(HEADS, 2, (6, 4, 1), pre_activation=True),
        "head channel": Node(Basis("attn.z"), 2, (6, 1, 3)),
        "value": Node(Basis("attn.v"), 2, (4, 1, 3)),
        "latent": _firing(name),
        "channel": Node(Basis("resid.pre"), 2, (6, 4)),
    }


def _firing(name: str) -> Node:
    """The latent that is largest at one token."""
    from featurizers_derived_scalars.quantities import value

    row = value(latents(name)).tensor(captured(name), 2)[6]
    return Node(latents(name), 2, (6, int(row.argmax())))


def traced(name: str, node: Node) -> tuple[Circuit, object]:
    circuit = captured(name).circuit
    metric = NodeMetric(node, circuit)
    before = residual_of(node, circuit)
    needs = [
        Need("resid.embed"),
        *(Need(kind) for kind in ("attn.probs", "attn.v", "attn.bias", "mlp.neurons", "mlp.bias")),
    ]
    needs += [Need(before.kind, pass_, frozenset({before.layer})) for pass_ in ("forward", "backward")]
    return circuit, capture(circuit, tokens(), needs, metric=metric)[0]


@pytest.mark.parametrize(
    "name", ["gpt2", "gpt_neox", "gemma2", "llama", "olmo2", "cohere", "phi", "opt", "qwen3", "granite"]
)
def test_a_traced_node_gives_the_same_gradient_backward_and_recomputed(name):
    """Identity 15; and the metric is the node."""
    for kind, node in targets(name).items():
        if kind == "neuron before" and not captured(name).circuit.places("mlp.pre"):
            continue
        circuit, raw = traced(name, node)
        before = residual_of(node, circuit)
        close(direction(MetricGrad(before)).tensor(raw), direction(NodeGrad(node)).tensor(raw))
        if not node.pre_activation and node.basis.featurizer is None:
            whole = captured(name)
            assert raw.metric == pytest.approx(float(whole[node.place, "forward"][node.numbers()]), rel=1e-5), kind
        for basis in (HEADS, NEURONS):
            one, other = write_to(basis, MetricGrad(before)), write_to(basis, node)
            for key, tensor in one.derive(raw).items():
                again = other.derive(raw)[key]
                assert torch.allclose(tensor, again, rtol=1e-5, atol=1e-6 * float(again.abs().max())), kind


def test_a_neuron_is_traced_to_its_weights():
    """Against the closed form: the neuron's weights through the norm's gain and centring, over its scale."""
    raw, model = captured("gpt2"), shared_decoder("gpt2")
    node = Node(NEURONS, 1, (4, 3), pre_activation=True)
    block = model.transformer.h[1]
    seen = block.ln_2.weight.detach() * block.mlp.c_fc.weight.detach()[:, 3]
    expected = torch.zeros(7, 32, dtype=torch.float64)
    expected[4] = (seen - seen.mean()) / raw.scale("mlp", 1)[4]
    close(direction(node).tensor(raw), expected)
    close(vocab_read(node).tensor(raw), model.transformer.wte.weight.detach() @ expected[4])


def test_the_norm_before_a_node_may_be_followed():
    """Against autograd through the model's own modules, norm and all."""
    raw, model = captured("llama"), shared_decoder("llama")
    node = Node(NEURONS, 1, (4, 3))
    block = model.model.layers[1]
    resid = forward(raw, "resid.mid", 1).clone().requires_grad_()
    normed = block.post_attention_layernorm(resid)
    neuron = block.mlp.act_fn(block.mlp.gate_proj(normed)) * block.mlp.up_proj(normed)
    neuron[4, 3].backward()
    close(direction(NodeGrad(node, freeze_norm=False)).tensor(raw), resid.grad)
    held = direction(NodeGrad(node)).tensor(raw)
    assert float((held - resid.grad).norm()) > 1e-2 * float(resid.grad.norm())


@pytest.mark.parametrize("name", EDGES)
def test_edges_by_vjp_are_edges_by_jvp(name):
    """Identity 16, from nodes of every sort to nodes of every sort."""
    raw = captured(name)
    mine = latents(name)
    sources = [
        Node(NEURONS, 0, (4, 3)),
        Node(NEURONS, 1, (6, 3)),
        Node(HEADS, 1, (4, 3, 2)),
        Node(HEADS, 1, (6, 4, 0)),
        Node(Basis("resid.embed", whole=True), None, (6, 0)),
        Node(Basis("resid.pre"), 1, (4, 5)),
        Node(Basis("mlp.delta", {0: dictionary(32, seed=3)}, part="error"), 0, (6, 3)),
        Node(Basis("mlp.delta", {0: dictionary(32, "jumprelu", seed=3)}, part="bias"), 0, (4, 3)),
    ]
    into = {
        "neuron": (NEURONS, (6, 7)),
        "probability": (HEADS, (6, 4, 1)),
        "q": (Basis("attn.probs", via="q"), (6, 4, 1)),
        "k": (Basis("attn.probs", via="k"), (6, 4, 1)),
        "v": (Basis("attn.probs", via="v"), (6, 4, 1)),
        "latent": (mine, _firing(name).numbers()),
    }
    seen = 0
    for kind, (basis, index) in into.items():
        target = Node(basis, 2, index)
        for source in sources:
            forward_edge = edge_from(source, basis).derive(raw, [2])[f"edge_from:{basis}", 2][index]
            out = edge_to(source.basis, target).derive(raw)[f"edge_to:{source.basis}", source.layer]
            backward_edge = out[source.numbers()]
            # softmax is in float32, and its terms cancel: 1.3e-5 in mistral
            assert float(forward_edge) == pytest.approx(float(backward_edge), rel=2e-5, abs=1e-12), (kind, str(source))
            seen += float(backward_edge.abs()) > 1e-9
            if kind in ("k", "neuron"):
                change = activation_from(source, basis).derive(raw, [2])[f"activation_from:{basis}", 2][index]
                by_hand = node_write_to(source, Node(basis, 2, index)).tensor(raw).sum()
                assert float(change) == pytest.approx(float(by_hand), rel=1e-5, abs=1e-12), (kind, str(source))
    assert seen >= 20


@pytest.mark.parametrize("name", EDGES)
def test_all_edges_into_a_node_are_complete(name):
    """Identity 17: with biases they are the residual stream times the gradient of the attribution."""
    raw = captured(name)
    for target in (
        Node(NEURONS, 2, (6, 7)),
        Node(Basis("attn.probs", via="v"), 2, (6, 4, 1)),
        Node(Basis("attn.probs", via="k"), 2, (6, 4, 1)),
        _firing(name),
    ):
        edges = Scalars.union(edge_to(basis, target).derive(raw) for basis in NODES)
        edges.check_complete(direct_total(raw, NodeGrad(target, times_metric=True)), rtol=1e-5)
        assert float(edges.sum().abs()) > 1e-9


def test_edges_of_a_layer_alone_are_those_that_reach():
    raw = captured("gpt2")
    after = edge_from(Node(NEURONS, 1, (4, 3)), NEURONS).derive(raw)
    assert [layer for _, layer in after] == [2]
    from_heads = edge_from(Node(HEADS, 1, (2, 1, 2)), NEURONS).derive(raw)
    assert [layer for _, layer in from_heads] == [1, 2]
    parallel = edge_from(Node(HEADS, 1, (2, 1, 2)), NEURONS).derive(captured(PARALLEL[0]))
    assert [layer for _, layer in parallel] == [2]
    with pytest.raises(SiteError, match="not upstream"):
        edge_from(Node(NEURONS, 1, (4, 3)), NEURONS).derive(raw, [1])


def test_an_edge_is_what_a_small_step_changes():
    """Against a finite difference of transformers' own block, its norm held by hand."""
    raw, model = captured("gpt2"), shared_decoder("gpt2")
    source, layer = Node(HEADS, 0, (6, 1, 2)), 2
    written = node_write(source).tensor(raw)
    block, resid = model.transformer.h[layer], forward(raw, "resid.mid", layer)
    scale = raw.scale("mlp", layer)

    def neurons(x):
        centred = x - x.mean(-1, keepdim=True)
        return block.mlp.act(block.mlp.c_fc(centred / scale * block.ln_2.weight + block.ln_2.bias))

    with torch.no_grad():
        step = 1e-5
        change = (neurons(resid + step * written) - neurons(resid - step * written)) / (2 * step)
    close(activation_from(source, NEURONS).derive(raw)["activation_from:mlp.neurons", layer], change, 1e-6)
    edge = edge_from(source, NEURONS).derive(raw)["edge_from:mlp.neurons", layer]
    close(edge, change * backward(raw, "mlp.neurons", layer), 1e-6)


def test_a_nodes_write_is_its_row_of_all_writes():
    raw = captured("gemma2")
    for node in (
        Node(NEURONS, 1, (4, 3)),
        Node(HEADS, 1, (4, 2, 1)),
        Node(Basis("attn.z", whole=True), 1, (4, 1)),
        Node(Basis("attn.z"), 1, (4, 1, 2)),
        Node(latents("gemma2"), 2, _firing("gemma2").numbers()),
        Node(Basis("mlp.delta", whole=True), 1, (4, 0)),
    ):
        one = node_write(node).tensor(raw)
        rows = write(node.basis).tensor(raw, node.layer)
        index = node.numbers()[: rows.dim() - 1]
        token = index[0]
        close(one[token], rows[index])
        assert not one[[t for t in range(7) if t != token]].any()
        effect = node_write_to(node).tensor(raw)
        assert float(effect.sum()) == pytest.approx(float(write_to(node.basis).tensor(raw, node.layer)[node.numbers()]))
        logits = vocab_write(node).tensor(raw)
        close(logits[token], vocab_write(node.basis).tensor(raw, node.layer)[index])
        assert float(logits.mean(-1).abs().max()) < 1e-9 < float(logits.abs().max())


def test_a_node_as_the_metric_of_one_call():
    """Attributions of a traced node, and what is after it has none."""
    node = Node(NEURONS, 1, (5, 7))
    found = scalars(shared_decoder("gpt2"), tokens(), ["write_to", "act_times_grad:mlp.neurons"], metric=node)
    raw = captured("gpt2")
    for basis in (HEADS, NEURONS, Basis("resid.embed", whole=True)):
        for (name, layer), tensor in write_to(basis, node).derive(raw).items():
            close(found[name, layer], tensor)
    assert ("write_to:mlp.neurons", 1) not in found
    assert ("write_to:attn.probs", 1) in found
    assert float(found["act_times_grad:mlp.neurons", 0].abs().sum()) > 0
    later = [layer for name, layer in found if name.startswith("act") and layer > 1]
    assert all(not found["act_times_grad:mlp.neurons", layer].any() for layer in later)


def test_attributions_to_a_traced_node_are_those_of_hooks_by_hand():
    """Against autograd through transformers' model with the one norm's scale held by a hook."""
    model, raw = shared_decoder("llama"), captured("llama")
    block, scale, kept = model.model.layers[1], raw.scale("mlp", 1), {}

    def keep(layer, args):
        args[0].retain_grad()
        kept[layer] = args[0]

    hooks = [
        model.model.layers[layer].mlp.down_proj.register_forward_pre_hook(lambda _, args, at=layer: keep(at, args))
        for layer in range(2)
    ]
    hooks.append(block.post_attention_layernorm.register_forward_hook(lambda norm, x, _: x[0] / scale * norm.weight))
    try:
        model(tokens()[None])
        kept[1][0, 5, 7].backward()
    finally:
        for hook in hooks:
            hook.remove()
        model.zero_grad()
    expected = (kept[0] * kept[0].grad)[0].detach()
    node = Node(NEURONS, 1, (5, 7))
    found = scalars(model, tokens(), "act_times_grad:mlp.neurons", metric=node)
    close(found["act_times_grad:mlp.neurons", 0], expected)


def test_head_through_v_as_a_metric_with_its_output():
    raw = captured("llama")
    node = Node(Basis("attn.probs", via="v"), 1, (6, 4, 1))
    output = backward(raw, "attn.z", 1)[6, 1]
    circuit = raw.circuit
    metric = NodeMetric(node, circuit, output=output)
    seen = capture(circuit, tokens(), [Need("resid.pre", "backward", frozenset({1}))], metric=metric)[0]
    close(backward(seen, "resid.pre", 1), direction(NodeGrad(node, times_metric=True)).tensor(raw))
    value = float(forward(raw, "attn.probs", 1)[6, 4, 1] * (forward(raw, "attn.v", 1)[4, 1] * output).sum())
    assert seen.metric == pytest.approx(value)


def test_what_is_no_node_is_refused():
    raw = captured("gpt2")
    with pytest.raises(FeatureIndexError, match="neuron 99 is not there; there are 40"):
        direction(Node(NEURONS, 1, (4, 99))).tensor(raw)
    with pytest.raises(PositionError, match="token 9 is not there"):
        node_write(Node(NEURONS, 1, (9, 3))).tensor(raw)
    with pytest.raises(UsageError, match="an index on each of the axes token, neuron"):
        Node(NEURONS, 1, (4,))
    with pytest.raises(UsageError, match="a sum of nodes"):
        node_write(Node(NEURONS, 1, (None, 3)))
    with pytest.raises(UsageError, match="is a vector"):
        direction(Node(Basis("mlp.delta", whole=True), 1, (4, 0)))
    with pytest.raises(UsageError, match="no scalar by itself"):
        direction(Node(Basis("attn.probs", via="v"), 1, (6, 4, 1)))
    with pytest.raises(UsageError, match="no pre-activation"):
        direction(Node(Basis("mlp.delta"), 1, (4, 3), pre_activation=True))
    with pytest.raises(UsageError, match="take the basis attn"):
        activation_from(Node(NEURONS, 0, (4, 3)), Basis("attn.probs", via="v"))
    with pytest.raises(UsageError, match="does not write"):
        edge_to(Basis("attn.q"), Node(NEURONS, 1, (4, 3)))
    with pytest.raises(UsageError, match="not upstream"):
        node_write_to(Node(NEURONS, 1, (4, 3)), Node(NEURONS, 1, (4, 3))).tensor(raw)
    with pytest.raises(SiteError, match="layers"):
        NodeMetric(Node(NEURONS, 8, (4, 3)), raw.circuit)


def test_edges_by_name():
    node = Node(NEURONS, 1, (5, 7))

    found = scalars(
        shared_decoder("gpt2"), tokens(), ["edge_to", "edge_from:attn.probs"], metric=METRIC, node=node, via="k"
    )
    raw = captured("gpt2")
    close(found["edge_to:mlp.neurons", 0], edge_to(NEURONS, node).derive(raw)["edge_to:mlp.neurons", 0])
    assert [layer for name, layer in found if name.startswith("edge_from")] == [2]
    with pytest.raises(UsageError, match="node: Field required"):
        plan(shared_decoder("gpt2"), "edge_to", metric=METRIC)
    with pytest.raises(UsageError, match="takes the option node"):
        plan(shared_decoder("gpt2"), "write_to", metric=METRIC, node=node)
