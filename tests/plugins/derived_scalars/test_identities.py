"""Identities that derived scalars must satisfy, on every architecture: decomposition, completeness, direct effects."""

from __future__ import annotations

import pytest
import torch
from featurizers.errors import SiteError, UsageError
from featurizers_derived_scalars.api import direct_total, plan, scalars
from featurizers_derived_scalars.capturing import capture
from featurizers_derived_scalars.circuit import Circuit, Need, Place
from featurizers_derived_scalars.errors import IncompleteError
from featurizers_derived_scalars.nodes import Basis
from featurizers_derived_scalars.quantities import (
    Fixed,
    MetricGrad,
    act_times_grad,
    norm,
    sum_channels,
    sum_heads,
    sum_keys,
    sum_nodes,
    vocab_write,
    weighted_value,
    write,
    write_norm,
    write_to,
)
from featurizers_derived_scalars.results import Scalars

from tests.support.decoders import DECODERS, LAYERS, PARALLEL, POST_NORM, WIDTH, shared_decoder, tokens
from tests.support.derived_scalars import METRIC, backward, captured, close, forward

HEADS, NEURONS, OUTPUT = Basis("attn.probs"), Basis("mlp.neurons"), Basis("attn.z", whole=True)
NODES = [Basis(kind) for kind in ("resid.embed", "attn.probs", "attn.bias", "mlp.neurons", "mlp.bias")]


@pytest.fixture(params=DECODERS, scope="module")
def raw(request):
    return captured(request.param)


def test_what_heads_write_and_their_bias_is_what_attention_adds(raw):
    for layer in range(LAYERS):
        heads = sum_keys(sum_heads(write(HEADS))).tensor(raw, layer)
        close(heads + forward(raw, "attn.bias", layer), forward(raw, "attn.delta", layer))
        close(sum_nodes(write(HEADS)).tensor(raw, layer), heads)
        close(sum_heads(write(OUTPUT)).tensor(raw, layer), heads)


def test_what_neurons_write_and_their_bias_is_what_the_mlp_adds(raw):
    for layer in range(LAYERS):
        neurons = sum_nodes(write(NEURONS)).tensor(raw, layer)
        close(neurons + forward(raw, "mlp.bias", layer), forward(raw, "mlp.delta", layer))


def test_weighted_values_sum_to_what_heads_give(raw):
    close(sum_keys(weighted_value()).tensor(raw, 1), forward(raw, "attn.z", 1))


def test_attribution_of_a_head_is_its_write_times_the_gradient_behind(raw):
    """Identity 5: the chain rule from a probability to what attention adds."""
    for layer in range(LAYERS):
        gradient = backward(raw, "attn.delta", layer)
        expected = torch.einsum("qkhd,qd->qkh", write(HEADS).tensor(raw, layer), gradient)
        close(act_times_grad(HEADS).tensor(raw, layer), expected)
        attributions = sum_keys(act_times_grad(HEADS)).tensor(raw, layer)
        close(attributions, (forward(raw, "attn.z", layer) * backward(raw, "attn.z", layer)).sum(-1))
        close(act_times_grad(OUTPUT).tensor(raw, layer), attributions)


def test_attribution_of_a_neuron_is_its_write_times_the_gradient_behind(raw):
    """Identity 6."""
    for layer in range(LAYERS):
        expected = torch.einsum("tnd,td->tn", write(NEURONS).tensor(raw, layer), backward(raw, "mlp.delta", layer))
        close(act_times_grad(NEURONS).tensor(raw, layer), expected)
    close(write_to(NEURONS).tensor(raw, LAYERS - 1), act_times_grad(NEURONS).tensor(raw, LAYERS - 1))


def test_direct_effects_are_writes_times_the_final_gradient(raw):
    """Identity 7, and what is contracted against what is materialised."""
    final = backward(raw, "resid.final")
    for layer in range(LAYERS):
        for basis in (HEADS, NEURONS, OUTPUT, Basis("attn.z"), Basis("mlp.delta"), Basis("resid.pre")):
            expected = (write(basis).tensor(raw, layer) * _beside(final, write(basis).axes)).sum(-1)
            close(write_to(basis).tensor(raw, layer), expected)
        layer_effect = (forward(raw, "attn.delta", layer) * final).sum(-1, keepdim=True)
        close(write_to(Basis("attn.delta", whole=True)).tensor(raw, layer), layer_effect)
        close(sum_channels(write_to(Basis("attn.delta"))).tensor(raw, layer), layer_effect)
        by_head = sum_keys(write_to(HEADS)).tensor(raw, layer)
        close(write_to(OUTPUT).tensor(raw, layer), by_head)
        bias = sum_nodes(write_to(Basis("attn.bias"))).tensor(raw, layer)
        close(by_head.sum(-1, keepdim=True) + bias, layer_effect)


def _beside(final, axes):
    return final.reshape(final.shape[0], *[1] * (len(axes) - 2), final.shape[1])


def test_lengths_of_writes_are_lengths_of_writes(raw):
    for layer in range(LAYERS):
        for basis in (HEADS, NEURONS, OUTPUT, Basis("attn.z"), Basis("attn.out"), Basis("mlp.out", whole=True)):
            expected = write(basis).tensor(raw, layer).norm(dim=-1)
            close(write_norm(basis).tensor(raw, layer), expected.reshape(write_norm(basis).tensor(raw, layer).shape))
        assert (write_norm(NEURONS).tensor(raw, layer) >= 0).all()
        signed = write_norm(NEURONS, signed=True).tensor(raw, layer)
        assert torch.equal(signed.sign(), forward(raw, "mlp.neurons", layer).sign())
        summed = sum_keys(write(HEADS)).tensor(raw, layer).norm(dim=-1)
        close(write_norm(OUTPUT).tensor(raw, layer), summed)
        close(norm(Basis("mlp.delta")).tensor(raw, layer)[:, 0], forward(raw, "mlp.delta", layer).norm(dim=-1))
    assert norm(Basis("attn.z")).tensor(raw, 0).shape == (7, raw.circuit.n_heads)


def test_direct_effects_of_all_nodes_are_complete(raw):
    """Identity 8: with every bias, they sum to the residual stream times the gradient."""
    effects = Scalars.union(write_to(basis).derive(raw) for basis in NODES)
    total = direct_total(raw)
    effects.check_complete(total, rtol=1e-6)
    for name in effects.about:
        if effects.only([name]).sum().abs() > 1e-3 * abs(total):
            with pytest.raises(IncompleteError) as caught:
                effects.only(set(effects.about) - {name}).check_complete(total, rtol=1e-6)
            assert caught.value.residual == pytest.approx(float(effects.only([name]).sum()), rel=1e-3)
    by_token = effects.sum(keep=["token"])
    close(by_token, (forward(raw, "resid.final") * backward(raw, "resid.final")).sum(-1))
    assert effects.only(["write_to:mlp.neurons"]).sum(keep=["layer", "neuron"]).shape == (LAYERS, 40)


def test_direct_effects_along_any_direction_in_the_middle_are_complete(raw):
    along = Fixed(
        torch.randn(WIDTH, generator=torch.Generator().manual_seed(3), dtype=torch.float64), Place("resid.pre", 2)
    )
    effects = Scalars.union(write_to(basis, along).derive(raw) for basis in NODES)
    effects.check_complete(direct_total(raw, along), rtol=1e-6)
    assert max(layer for _, layer in effects if layer is not None) == 1


@pytest.mark.parametrize("name", [name for name in DECODERS if name not in PARALLEL])
def test_a_direction_between_attention_and_mlp_has_that_attention_upstream(name):
    raw = captured(name)
    along = MetricGrad(Place("resid.mid", 1))
    effects = Scalars.union(write_to(basis, along).derive(raw) for basis in NODES)
    effects.check_complete(direct_total(raw, along), rtol=1e-6)
    assert ("write_to:attn.probs", 1) in effects
    assert ("write_to:mlp.neurons", 1) not in effects


@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt_neox", "olmo2"])
def test_without_the_final_norm_held_direct_effects_cancel(name):
    """A norm does not care how long its input is, but for its epsilon."""
    raw = captured(name, ())
    effects = Scalars.union(write_to(basis).derive(raw) for basis in NODES).computed()
    magnitude = sum(float(tensor.abs().sum()) for tensor in effects.values())
    assert abs(float(effects.sum())) < 1e-4 * magnitude
    assert abs(float(direct_total(captured(name)))) > 1e-2


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen2", "olmo2"])
def test_the_total_is_the_metric_less_its_constant_part(name):
    raw, model = captured(name), shared_decoder(name)
    norm_bias = model.transformer.ln_f.bias.detach() if name == "gpt2" else None
    unembedding = model.get_output_embeddings().weight.detach()
    constant = 0.0
    if norm_bias is not None:
        constant = float((unembedding[[5, 9]].mean(0) - unembedding[11]) @ norm_bias)
    assert float(direct_total(raw)) == pytest.approx(raw.metric - constant, rel=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt_neox", "opt"])
def test_direct_writes_to_the_vocabulary_sum_to_the_logits(name):
    """All vectors together give the centred logits, but for the final norm's bias."""
    raw, model = captured(name), shared_decoder(name)
    kinds = ("resid.embed", "attn.delta", "mlp.delta")
    written = Scalars.union(vocab_write(Basis(kind, whole=True)).derive(raw) for kind in kinds)
    with torch.no_grad():
        path = {"gpt2": "ln_f", "opt": "decoder.final_layer_norm", "llama": "norm", "gpt_neox": "final_layer_norm"}[
            name
        ]
        own = getattr(model.base_model.get_submodule(path), "bias", None)
        bias = 0 if own is None else model.get_output_embeddings()(own)
    logits = forward(raw, "logits") - bias
    close(written.sum(keep=["token", "vocab"]), logits - logits.mean(-1, keepdim=True), 1e-5)


def test_scalars_are_absent_at_and_after_the_direction(raw):
    """Identity 19, and the last layer is not hidden (it is the end of the residual stream)."""
    assert ("write_to:resid.post", LAYERS - 1) in write_to(Basis("resid.post")).derive(raw)
    early = MetricGrad(Place("resid.pre", 1))
    for kind, last in (("attn.probs", 0), ("mlp.neurons", 0), ("resid.pre", 1), ("resid.post", 0)):
        layers = [layer for _, layer in write_to(Basis(kind), early).derive(raw)]
        assert layers == list(range(last + 1)), kind
    same = MetricGrad(Place("resid.post", 0))  # the same tensor as resid.pre of the next
    assert [layer for _, layer in write_to(Basis("resid.pre"), same).derive(raw)] == [0, 1]
    with pytest.raises(SiteError, match="not upstream"):
        write_to(NEURONS, early).derive(raw, [1])


@pytest.mark.parametrize("name", PARALLEL)
def test_a_parallel_block_has_no_stream_between_its_halves(name):
    with pytest.raises(SiteError, match="side by side"):
        write_to(Basis("resid.mid")).needs(Circuit(shared_decoder(name)))
    with pytest.raises(SiteError, match="side by side"):
        plan(shared_decoder(name), "value:resid.mid")


def test_needs_are_what_derive_takes():
    """Capturing exactly the needs is enough, for every quantity."""
    circuit = Circuit(shared_decoder("gemma2"))
    for make in (act_times_grad, write, write_norm, write_to):
        for basis in (HEADS, NEURONS, OUTPUT, Basis("resid.pre"), Basis("mlp.out", whole=True)):
            deriver = make(basis)
            raw = capture(
                circuit,
                tokens(),
                deriver.needs(circuit),
                metric=METRIC,
                freeze_norms=("final", "attn.post", "mlp.post"),
            )[0]
            for (name, layer), tensor in deriver.derive(raw).items():
                close(tensor, deriver.tensor(captured("gemma2"), layer))
                assert name == deriver.name


def test_needs_stop_before_the_direction():
    circuit = Circuit(shared_decoder("gpt2"))
    needs = write_to(NEURONS, MetricGrad(Place("resid.pre", 1))).needs(circuit)
    assert needs == {Need("mlp.neurons", "forward", frozenset({0})), Need("resid.pre", "backward", frozenset({1}))}
    assert write_to(NEURONS, MetricGrad(Place("resid.pre", 0))).needs(circuit) == frozenset()


def test_one_call_is_what_the_parts_are():
    raw = captured("llama")
    found = scalars(shared_decoder("llama"), tokens(), ["write_to", "write_norm:mlp.neurons"], metric=METRIC)
    for kind in ("attn.probs", "mlp.neurons", "resid.embed", "attn.bias", "mlp.bias"):
        basis = Basis(kind, whole=kind in ("resid.embed", "attn.bias", "mlp.bias"))
        for (name, layer), tensor in write_to(basis).derive(raw).items():
            close(found[name, layer], tensor)
    found.only([name for name in found.about if name[:8] == "write_to"]).check_complete(direct_total(raw), rtol=1e-6)
    close(found["write_norm:mlp.neurons", 2], write_norm(NEURONS).tensor(raw, 2))
    some = scalars(shared_decoder("llama"), tokens(), "write_to", metric=METRIC, layers=[1])
    assert {layer for _, layer in some} == {None, 1}
    by_part = scalars(shared_decoder("llama"), tokens(), "write_to:mlp.delta whole", metric=METRIC)
    assert by_part["write_to:mlp.delta whole", 1].shape == (7, 1)
    with pytest.raises(UsageError, match="cannot read the basis"):
        scalars(shared_decoder("llama"), tokens(), "write_to:mlp.delta some", metric=METRIC)


def test_several_prompts_are_each_alone():
    made = plan(shared_decoder("llama"), "act_times_grad:attn.probs", metric=METRIC)
    padded = {
        "input_ids": torch.stack([torch.cat([torch.zeros(2, dtype=torch.long), tokens(5, 1)]), tokens(7)]),
        "attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7]),
    }
    together = [found for _, found in made.run(padded)]
    alone = [made.run(ids)[0][1] for ids in (tokens(5, 1), tokens(7))]
    for both, one in zip(together, alone, strict=True):
        for key in one:
            close(both[key], one[key])
    with pytest.raises(UsageError, match="2 sequences"):
        scalars(shared_decoder("llama"), padded, "act_times_grad:attn.probs", metric=METRIC)


@pytest.mark.parametrize("name", POST_NORM)
def test_writes_of_post_norm_models_go_through_the_norm(name):
    """Against transformers' own norm, run on the halves with its scale held."""
    raw, model = captured(name), shared_decoder(name)
    block = model.model.layers[1]
    post = block.post_attention_layernorm
    out, delta = forward(raw, "attn.out", 1), forward(raw, "attn.delta", 1)
    close(post(out).detach(), delta)
    half = write(Basis("attn.out", whole=True)).tensor(raw, 1)
    close(half + forward(raw, "attn.bias", 1) - _projected_bias(raw, block), delta)


def _projected_bias(raw, block):
    """What the bias of the output projection writes, which attn.out has and the heads have not."""
    bias = block.self_attn.o_proj.bias
    return raw.write(Place("attn.out", 1), bias.detach().expand(7, -1))
