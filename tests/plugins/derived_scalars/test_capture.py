"""What is captured, against plain torch hooks, autograd, transformers' own eager attention, and identities."""

from __future__ import annotations

import copy
import gc
import threading

import pytest
import torch
from featurizers.errors import ShapeError, SiteError, UsageError
from featurizers.models.anatomy import Anatomy
from featurizers_derived_scalars.capturing import (
    Edit,
    LogitDifference,
    Metric,
    capture,
    log_probability,
    logit_difference,
)
from featurizers_derived_scalars.circuit import KINDS, Circuit, Need, Place
from torch import Tensor, nn

from tests.support.decoders import DECODERS, LAYERS, PARALLEL, POST_NORM, decoder, shared_decoder, tokens
from tests.support.models import hooks_of

METRIC = logit_difference([5, 9], [11])
BOTH = [Need(kind, pass_) for kind in KINDS for pass_ in ("forward", "backward")]


def needs_of(circuit: Circuit) -> list[Need]:
    return [need for need in BOTH if circuit.places(need.kind)]


def everything(name: str, **options):
    circuit = Circuit(shared_decoder(name))
    return circuit, capture(circuit, tokens(), needs_of(circuit), metric=METRIC, **options)[0]


def close(first: Tensor, second: Tensor, tolerance: float = 1e-6) -> None:
    assert first.shape == second.shape
    assert float(second.norm()) > 0
    assert float((first - second).norm()) <= tolerance * float(second.norm())


def forward(raw, kind, layer=None):
    return raw[Place(kind, layer), "forward"]


def backward(raw, kind, layer=None):
    return raw[Place(kind, layer), "backward"]


@pytest.fixture(params=DECODERS, scope="module")
def captured(request):
    return everything(request.param)


# ---- identities of the residual stream


def test_every_kind_is_captured_with_its_axes(captured):
    circuit, raw = captured
    sizes = {"token": 7, "key": 7, "head": circuit.n_heads, "d_model": circuit.d_model, "one": 1}
    sizes |= {"neuron": circuit.n_neurons, "vocab": circuit.d_vocab}
    for place, pass_ in raw:
        width = {**sizes, "d_head": circuit.d_head if place.kind in ("attn.q", "attn.k") else circuit.d_value}
        assert tuple(raw[place, pass_].shape) == tuple(width[axis] for axis in place.axes), place
        assert raw[place, pass_].grad_fn is None
        assert not raw[place, pass_].requires_grad
    assert len(raw) == 2 * sum(len(circuit.places(kind)) for kind in KINDS)


def test_the_residual_stream_is_the_embedding_and_everything_written_to_it(captured):
    circuit, raw = captured
    total = forward(raw, "resid.embed")
    for layer in range(LAYERS):
        close(forward(raw, "resid.pre", layer), total)
        for half, node in (("attn", "attn.z"), ("mlp", "mlp.neurons")):
            place = Place(node, layer)
            written = raw.write(place, raw[place, "forward"]) + forward(raw, f"{half}.bias", layer)
            close(written, forward(raw, f"{half}.delta", layer))
            out = Place(f"{half}.out", layer)
            own = raw.bias_write(out)
            projected = raw.write(out, raw[out, "forward"])
            norm = circuit.norm(Place(f"norm.{half}.post.scale", layer))
            rest = 0 if norm is None or norm.bias is None else norm.bias  # the bias of a norm is in no module's output
            close(projected + rest, written)
            assert own is None or own.shape == projected.shape
            total = total + written
            if half == "attn" and circuit.places("resid.mid"):
                close(forward(raw, "resid.mid", layer), total)
        close(forward(raw, "resid.post", layer), total)
    close(forward(raw, "resid.final"), total)


def test_biases_are_there_where_the_model_has_them(captured):
    circuit, raw = captured
    for layer, block in enumerate(circuit.layout.blocks):
        for half, path in (("attn", block.out_projection), ("mlp", block.down_projection)):
            norm = circuit.norm(Place(f"norm.{half}.post.scale", layer))
            has = getattr(circuit.model.get_submodule(path), "bias", None) is not None
            has = has or (norm is not None and norm.bias is not None)
            assert (raw.bias_write(Place(f"{half}.delta", layer)) is not None) == has
            assert (float(forward(raw, f"{half}.bias", layer).norm()) > 0) == has


def test_heads_are_probabilities_times_values(captured):
    _, raw = captured
    for layer in range(LAYERS):
        probs, values = forward(raw, "attn.probs", layer), forward(raw, "attn.v", layer)
        close(torch.einsum("qkh,khd->qhd", probs, values), forward(raw, "attn.z", layer))
        close(probs.sum(1), torch.ones_like(probs[:, 0]))
        close(forward(raw, "attn.logits", layer).softmax(1), probs)
        future = torch.ones(7, 7, dtype=torch.bool).triu(1)
        assert (forward(raw, "attn.logits", layer)[future] == float("-inf")).all()


# ---- identities of gradients


def test_what_is_written_has_the_gradient_of_the_stream(captured):
    circuit, raw = captured
    for layer in range(LAYERS):
        middle = "resid.mid" if circuit.places("resid.mid") else "resid.post"
        close(backward(raw, "attn.delta", layer), backward(raw, middle, layer))
        for kind in ("mlp.delta", "mlp.bias"):
            close(backward(raw, kind, layer), backward(raw, "resid.post", layer))
        close(backward(raw, "attn.bias", layer), backward(raw, "attn.delta", layer))


def test_activation_times_gradient_is_write_times_gradient(captured):
    circuit, raw = captured
    frozen = not circuit.places("norm.mlp.post.scale")
    for layer in range(LAYERS):
        for node, delta in (("attn.z", "attn.delta"), ("mlp.neurons", "mlp.delta")):
            seen = raw.write_vjp(Place(node, layer), backward(raw, delta, layer))
            if frozen:  # a norm behind the node that is not frozen has a gradient of its own
                close(seen, backward(raw, node, layer))
            else:
                assert not torch.allclose(seen, backward(raw, node, layer))


@pytest.mark.parametrize("name", POST_NORM)
def test_so_it_is_behind_a_norm_that_is_frozen(name):
    _, raw = everything(name, freeze_norms=("final", "attn.post", "mlp.post"))
    for layer in range(LAYERS):
        for node, delta in (("attn.z", "attn.delta"), ("mlp.neurons", "mlp.delta")):
            seen = raw.write_vjp(Place(node, layer), backward(raw, delta, layer))
            close(seen, backward(raw, node, layer))


def test_heads_probabilities_and_scores_have_consistent_gradients(captured):
    _, raw = captured
    for layer in range(LAYERS):
        probs, d_probs = forward(raw, "attn.probs", layer), backward(raw, "attn.probs", layer)
        d_z, values = backward(raw, "attn.z", layer), forward(raw, "attn.v", layer)
        close(torch.einsum("qhd,khd->qkh", d_z, values), d_probs)
        close((probs * d_probs).sum(1), (forward(raw, "attn.z", layer) * d_z).sum(-1))
        close(torch.einsum("qkh,qhd->khd", probs, d_z), backward(raw, "attn.v", layer))
        close(backward(raw, "attn.logits", layer), probs * (d_probs - (probs * d_probs).sum(1, keepdim=True)))


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3", "opt", "granite", "phi"])
def test_the_gradient_of_scores_is_that_of_queries_and_keys(name):
    _, raw = everything(name)
    for layer in range(LAYERS):
        d_logits = backward(raw, "attn.logits", layer)
        through = torch.einsum("qkh,khd->qhd", d_logits, forward(raw, "attn.k", layer))
        d_q = backward(raw, "attn.q", layer)
        scaling = float((through * d_q).sum() / through.square().sum())  # 1/sqrt(d_head) in most, not in all
        close(scaling * through, d_q)
        close(
            scaling * torch.einsum("qkh,qhd->khd", d_logits, forward(raw, "attn.q", layer)),
            backward(raw, "attn.k", layer),
        )


def test_frozen_norm_completeness(captured):
    """The metric is what was written, seen along the gradient, and the final norm's bias."""
    circuit, raw = captured
    gradient, total = backward(raw, "resid.final"), torch.zeros((), dtype=torch.float64)
    for kind in ("resid.embed", "attn.z", "attn.bias", "mlp.neurons", "mlp.bias"):
        for place in circuit.places(kind):
            total = total + (raw.write(place, raw[place, "forward"]) * gradient).sum()
    close(total, (forward(raw, "resid.final") * gradient).sum())
    if circuit.unembedding.softcap is None:
        norm, head = circuit.norm(Place("norm.final.scale")), circuit.unembedding
        bias = torch.zeros(circuit.d_model, dtype=torch.float64) if norm.bias is None else norm.bias
        constant = bias @ head.weight + (0 if head.bias is None else head.bias)
        rest = constant[[5, 9]].mean() - constant[11]
        assert float(total + rest) == pytest.approx(raw.metric, rel=1e-6, abs=1e-6)
        written = circuit.unembed(gradient[-1:] * 0 + forward(raw, "resid.final")[-1:]) / raw.scale("final")[-1]
        assert float(written[0, [5, 9]].mean() - written[0, 11]) == pytest.approx(float(total), rel=1e-6, abs=1e-6)


def test_without_freezing_the_scale_takes_the_total_away():
    _, raw = everything("gpt2", freeze_norms=())
    total = (forward(raw, "resid.final") * backward(raw, "resid.final")).sum(-1)
    _, frozen = everything("gpt2")
    assert abs(float(total[-1])) < 1e-3 * abs(
        float((forward(frozen, "resid.final") * backward(frozen, "resid.final")).sum())
    )


# ---- oracles


def plain_gradients(model, ids, paths):
    """Activations and their gradients by torch's hooks alone, with transformers' own eager attention."""
    before, seen, handles = model.config._attn_implementation, {}, []
    model.set_attn_implementation("eager")

    def keep(key, tensor):
        tensor.retain_grad()
        seen[key] = tensor

    for path, side in paths:
        module = model.get_submodule(path)
        if side == "output":
            handles.append(
                module.register_forward_hook(
                    lambda _, __, out, key=(path, side): keep(key, out[0] if isinstance(out, tuple) else out)
                )
            )
        else:
            handles.append(
                module.register_forward_pre_hook(
                    lambda _, args, kwargs, key=(path, side): keep(key, args[0] if args else kwargs["hidden_states"]),
                    with_kwargs=True,
                )
            )
    try:
        logits = model(input_ids=ids[None]).logits[0]
        loss = logits[-1, [5, 9]].mean() - logits[-1, 11]
        loss.backward()
    finally:
        for handle in handles:
            handle.remove()
        model.set_attn_implementation(before)
    return float(loss.detach()), logits.detach(), {key: (t.detach(), t.grad) for key, t in seen.items()}


@pytest.mark.parametrize("name", DECODERS)
def test_gradients_are_those_of_plain_hooks(name):
    model = decoder(name, torch.float64)
    circuit = Circuit(model)
    [raw] = capture(circuit, tokens(), needs_of(circuit), metric=METRIC, freeze_norms=())
    points = {place: circuit.tap_point(place) for place, pass_ in raw if pass_ == "backward"}
    points = {place: point for place, point in points.items() if point is not None}
    loss, logits, oracle = plain_gradients(model, tokens(), set(points.values()))
    assert raw.metric == pytest.approx(loss, rel=1e-9)
    assert torch.equal(forward(raw, "logits"), logits)
    for place, point in points.items():
        value, gradient = (t if t.dim() == 2 else t[0] for t in oracle[point])
        factor = circuit.factor(place) if place.kind.endswith(".delta") else 1.0
        assert torch.equal(raw[place, "forward"], value * factor), place
        close(raw[place, "backward"], gradient / factor, 1e-9)


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "llama", "qwen2", "gemma", "olmo2", "phi3", "opt", "cohere"])
def test_probabilities_are_transformers_own(name):
    model = decoder(name)
    [raw] = capture(model, tokens(), [Need("attn.probs")])
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model(input_ids=tokens()[None], output_attentions=True).attentions
    for layer, probs in enumerate(attentions):
        assert torch.equal(forward(raw, "attn.probs", layer), probs[0].permute(1, 2, 0))


def test_what_is_kept_of_heads_is_not_copied(captured):
    """Probabilities and their gradients are the largest tensors of a capture."""
    _, raw = captured
    for layer in range(LAYERS):
        for kept in (forward(raw, "attn.probs", layer), backward(raw, "attn.probs", layer)):
            assert kept.permute(2, 0, 1).is_contiguous()  # the model's own order of axes


def test_the_gradient_of_a_scale_is_its_derivative():
    """Against a difference: a norm's output is edited to what another scale would give."""
    circuit, raw = everything("gpt2", freeze_norms=())
    place, step = Place("norm.mlp.scale", 1), 5e-3  # transformers takes norms and softmax in float32
    norm, path = circuit.norm(place), circuit.norm_path(place)
    x, scale = forward(raw, "resid.mid", 1), raw.scale("mlp", 1)

    def metric(token: int, by: float) -> float:
        moved = scale.clone()
        moved[token] += by
        handle = circuit.model.get_submodule(path).register_forward_hook(lambda *_: norm.frozen(x, moved)[None])
        try:
            return capture(circuit, tokens(), [], metric=METRIC)[0].metric
        finally:
            handle.remove()

    for token in (0, 6):
        slope = (metric(token, step) - metric(token, -step)) / (2 * step)
        assert float(raw[place, "backward"][token]) == pytest.approx(slope, rel=2e-3)


# ---- the model is left alone


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "phi", "opt"])
def test_capturing_leaves_the_model_as_it_was(name):
    model = decoder(name)
    model.train()
    frozen, learning, *_ = model.parameters()
    frozen.requires_grad_(False)
    learning.grad = torch.ones_like(learning)
    Anatomy(model).layers[0].eval()
    modes = {key: module.training for key, module in model.named_modules()}
    asks = {key: parameter.requires_grad for key, parameter in model.named_parameters()}
    groups = {key: vars(module).get("num_key_value_groups") for key, module in model.named_modules()}
    hooks, implementation, random = hooks_of(model), model.config._attn_implementation, torch.get_rng_state()
    with torch.no_grad():
        model.eval()
        before = model(input_ids=tokens()[None]).logits
        for key, module in model.named_modules():
            module.training = modes[key]

    def unchanged():
        assert {key: module.training for key, module in model.named_modules()} == modes
        assert {key: parameter.requires_grad for key, parameter in model.named_parameters()} == asks
        assert {key: vars(module).get("num_key_value_groups") for key, module in model.named_modules()} == groups
        assert hooks_of(model) == hooks
        assert model.config._attn_implementation == implementation
        assert torch.equal(torch.get_rng_state(), random)
        assert torch.equal(learning.grad, torch.ones_like(learning))
        assert [p.grad for p in model.parameters() if p is not learning] == [None] * (len(list(model.parameters())) - 1)

    capture(model, tokens(), [Need("attn.probs", "backward"), Need("mlp.neurons")], metric=METRIC)
    unchanged()

    def fail(_: Tensor) -> Tensor:
        raise RuntimeError("halfway")

    for place in (Place("attn.probs", 1), Place("mlp.neurons", 1)):
        with pytest.raises(RuntimeError, match="halfway"):
            capture(model, tokens(), [], metric=METRIC, edits=[Edit(place, fail)])
        unchanged()
    with pytest.raises(ZeroDivisionError):
        capture(model, tokens(), [], metric=lambda logits: logits[0, 0] * (1 / 0))
    unchanged()
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(input_ids=tokens()[None]).logits, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "opt"])
def test_logits_are_those_of_the_model_whatever_is_captured(name, dtype):
    model = decoder(name, dtype)
    circuit = Circuit(model)
    [raw] = capture(circuit, tokens(), needs_of(circuit), metric=METRIC, freeze_norms=("final", "attn", "mlp"))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        assert torch.equal(model(input_ids=tokens()[None]).logits[0], forward(raw, "logits"))
    assert raw[Place("mlp.neurons", 0), "backward"].dtype == dtype


# ---- what is kept


def test_only_what_is_needed_is_kept_and_run():
    model = decoder("llama")
    circuit, ran = Circuit(model), []
    for layer, block in enumerate(model.model.layers):
        block.register_forward_hook(lambda *_, layer=layer: ran.append(layer))
    [raw] = capture(circuit, tokens(), [Need("mlp.neurons", layers=frozenset({1}))])
    assert ran == [0, 1]
    kept = {(str(place), pass_) for place, pass_ in raw}
    scales = {(f"norm.{half}.scale:{layer}", "forward") for half in ("attn", "mlp") for layer in (0, 1)}
    assert kept == {("mlp.neurons:1", "forward")} | scales
    assert raw.metric is None
    ran.clear()
    capture(circuit, tokens(), [Need("norm.final.scale")])
    assert ran == [0, 1, 2]
    assert (Place("norm.final.scale"), "forward") in capture(circuit, tokens(), [Need("resid.final")])[0]
    model.lm_head.register_forward_hook(lambda *_: ran.append("head"))
    ran.clear()
    capture(circuit, tokens(), [Need("resid.final"), Need("norm.final.scale")])
    assert ran == [0, 1, 2]
    capture(circuit, tokens(), [Need("logits")])
    assert ran == [0, 1, 2, 0, 1, 2, "head"]


@pytest.mark.parametrize("name", DECODERS)
def test_padding_changes_nothing(name):
    circuit = Circuit(shared_decoder(name))
    ids, other = tokens(), tokens(4, seed=3)
    batch = {
        "input_ids": torch.stack([torch.cat([torch.tensor([2, 2]), ids]), torch.cat([other, torch.full((5,), 2)])]),
        "attention_mask": torch.tensor([[0, 0, *[1] * 7], [1, 1, 1, 1, *[0] * 5]]),
    }
    needs = [Need("attn.logits"), Need("resid.pre", "backward")]
    found, alone = capture(circuit, batch, needs, metric=METRIC), capture(circuit, [ids, other], needs, metric=METRIC)
    for raw, single, sequence in zip(found, alone, (ids, other), strict=True):
        assert torch.equal(raw.tokens, sequence)
        assert raw.metric == single.metric
        assert all(torch.equal(raw[key], single[key]) for key in single)


@pytest.mark.parametrize("name", ["gpt2", "phi", "gemma2", "olmo2_biased", "granite"])
def test_what_else_is_wanted_changes_nothing(name):
    """Wherever the graph begins, and whatever is kept beside it."""
    circuit, raw = everything(name)
    for place, pass_ in (key for key in raw if key[0].layer in (None, 1)):
        need = Need(place.kind, pass_, None if place.layer is None else frozenset({place.layer}))
        [alone] = capture(circuit, tokens(), [need], metric=METRIC)
        assert torch.equal(alone[place, pass_], raw[place, pass_]), (place, pass_)
        assert alone.metric == raw.metric


@pytest.mark.parametrize(
    ("wanted", "first"),
    [("resid.final", 3), ("resid.post:1", 2), ("attn.z:1", 1), ("logits", 3), ("resid.pre:1", 1), ("resid.embed", 0)],
)
def test_the_graph_begins_where_the_first_gradient_is_wanted(wanted, first):
    model, seen = decoder("llama"), []
    for block in model.model.layers:
        block.mlp.register_forward_hook(lambda _, __, out: seen.append(out.requires_grad))
    circuit = Circuit(model)
    seen.clear()
    capture(circuit, tokens(), [*Need.of([wanted], "backward"), Need("mlp.neurons")], metric=METRIC)
    assert seen == [False] * first + [True] * (LAYERS - first)
    seen.clear()
    capture(circuit, tokens(), [Need("mlp.neurons")], metric=METRIC)
    assert seen == [False] * LAYERS


@pytest.mark.parametrize("name", ["gpt2", "llama", "phi3"])
def test_what_is_kept_has_memory_of_its_own(name):
    circuit = Circuit(decoder(name))
    [raw] = capture(circuit, tokens(), needs_of(circuit), metric=METRIC)
    for key in raw:
        storage = raw[key].untyped_storage()
        assert storage.nbytes() <= raw[key].numel() * raw[key].element_size(), (
            key
        )  # less: zeros, where nothing is written


class InPlace(nn.Module):
    """A part that changes what it was given after it was used."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        with torch.no_grad():
            x.mul_(2)
        return y


def test_activations_that_the_model_overwrites_are_refused_with_a_gradient():
    model = decoder("llama")
    circuit = Circuit(model)
    model.model.norm = InPlace(model.model.norm)
    with pytest.raises(SiteError, match=r"resid.final.* changes it in place"):
        capture(circuit, tokens(), [Need("resid.final"), Need("resid.pre", "backward")], metric=METRIC)
    [raw] = capture(circuit, tokens(), [Need("resid.final")])
    [known] = capture(decoder("llama"), tokens(), [Need("resid.final")])
    assert torch.equal(forward(raw, "resid.final"), forward(known, "resid.final"))


@pytest.mark.parametrize("name", ["gpt2", "gemma3"])
def test_no_graph_is_left_behind(name):
    circuit = Circuit(decoder(name))
    gc.collect()
    raw = capture(circuit, tokens(), needs_of(circuit), metric=METRIC)
    gc.collect()
    alive = [each for each in gc.get_objects() if issubclass(type(each), Tensor) and each.grad_fn is not None]
    assert not [each for each in alive if each.shape[:1] in ((1,), (7,))]
    assert raw


def test_device_and_dtype_of_what_is_kept():
    [raw] = capture(
        decoder("llama"), tokens(), [Need("mlp.neurons", "backward"), Need("attn.bias")], metric=METRIC,
        device="cpu", dtype=torch.bfloat16,
    )  # fmt: skip
    assert raw[Place("mlp.neurons", 0), "backward"].dtype == torch.bfloat16
    assert forward(raw, "attn.bias", 0).dtype == torch.bfloat16
    assert raw.scale("attn", 0).dtype == torch.float32
    assert raw.tokens.dtype == torch.long


def test_gradients_are_taken_where_gradients_are_off():
    with torch.no_grad():
        [raw] = capture(decoder("gpt2"), tokens(), [Need("attn.z", "backward")], metric=METRIC)
    assert float(backward(raw, "attn.z", 0).norm()) > 0


# ---- metrics and edits


class Neuron(Metric):
    """One neuron, computed anew from the stream before its norm."""

    def __init__(self, layer: int, freeze: bool) -> None:
        self.place, self.freeze = Place("mlp.neurons", layer), freeze

    @property
    def needs(self):
        return Need.of([f"resid.mid:{self.place.layer}"])

    def __call__(self, raw):
        resid = raw[Place("resid.mid", self.place.layer), "forward"]
        return raw.recompute(self.place, resid, freeze_norm=self.freeze)[4, 7]


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "olmo2", "opt", "granite"])
def test_a_neuron_as_the_metric(name):
    """Its gradients are those of plain hooks; nothing behind it has one."""
    model = decoder(name, torch.float64)
    circuit = Circuit(model)
    kinds = ("resid.pre", "attn.delta", "mlp.out", "attn.z", "resid.post")
    [raw] = capture(
        circuit, tokens(), [Need(kind, "backward", frozenset({0, 1, 2})) for kind in kinds], metric=Neuron(1, False)
    )
    path, _ = circuit.tap_point(Place("mlp.neurons", 1))
    seen = {}
    handles = [
        model.get_submodule(path).register_forward_pre_hook(lambda _, args: seen.update(neuron=args[0])),
        model.get_submodule(circuit.layout.blocks[1].block).register_forward_pre_hook(
            lambda _, args: seen.update(resid=args[0])
        ),
    ]
    model.set_attn_implementation("eager")
    model(input_ids=tokens()[None])
    for handle in handles:
        handle.remove()
    neurons = seen["neuron"] if seen["neuron"].dim() == 2 else seen["neuron"][0]
    [gradient] = torch.autograd.grad(neurons[4, 7], seen["resid"])
    assert raw.metric == pytest.approx(neurons[4, 7].item(), rel=1e-9)
    close(backward(raw, "resid.pre", 1), gradient[0], 1e-9)
    for kind, layer in (("mlp.out", 1), ("resid.post", 1), ("attn.delta", 2), ("attn.z", 2)):
        assert not backward(raw, kind, layer).any()
    assert backward(raw, "mlp.out", 0).any()


def test_a_metric_of_the_logits_may_be_any_function():
    circuit = Circuit(shared_decoder("gpt2"))
    needs = [Need("resid.final", "backward")]
    [raw] = capture(circuit, tokens(), needs, metric=log_probability([5, 6], position=3))
    [same] = capture(circuit, tokens(), needs, metric=lambda logits: logits[3].softmax(-1)[5:7].sum().log())
    assert raw.metric == pytest.approx(same.metric)
    close(backward(raw, "resid.final"), backward(same, "resid.final"))
    for wrong, match in (
        (lambda logits: logits[0], "one number"),
        (lambda logits: torch.zeros(()), "does not depend"),
        (3, "a metric is"),
        (LogitDifference((99,)), "vocabulary"),
    ):
        with pytest.raises(UsageError, match=match):
            capture(circuit, tokens(), needs, metric=wrong)
    with pytest.raises(IndexError, match="7 tokens"):
        capture(circuit, tokens(), needs, metric=logit_difference(1, position=7))


def editable(circuit: Circuit) -> list[str]:
    kinds = [kind for kind in KINDS if not (kind.startswith("norm.") or kind.endswith((".bias", "logits")))]
    return [kind for kind in kinds if circuit.places(kind)]


@pytest.mark.parametrize("name", ["gpt2", "qwen3", "gemma2", "olmo2", "gpt_neox", "opt", "granite", "cohere"])
def test_an_edit_moves_the_metric_as_the_gradient_says(name):
    circuit = Circuit(shared_decoder(name))
    free = capture(circuit, tokens(), needs_of(circuit), metric=METRIC, freeze_norms=())[0]
    for kind in editable(circuit):
        place = circuit.places(kind)[-1]
        step = torch.randn(free[place, "forward"].shape, generator=torch.Generator().manual_seed(1)).double() * 3e-3
        up, down = (
            capture(circuit, tokens(), [Need("logits"), *Need.of([place])], metric=METRIC,
                    edits=[Edit(place, lambda x, sign=sign, step=step: x + sign * step)])[0]
            for sign in (1, -1)
        )  # fmt: skip
        close(up[place, "forward"], free[place, "forward"] + step, 1e-9)
        slope = (up.metric - down.metric) / 2
        assert slope == pytest.approx(float((free[place, "backward"] * step).sum()), rel=5e-3, abs=1e-6), kind


def test_an_ablated_place_has_a_gradient_and_cuts_what_is_before_it():
    circuit = Circuit(shared_decoder("llama"))
    place = Place("resid.post", 1)
    [raw] = capture(
        circuit, tokens(), [Need("resid.post", "backward"), Need("mlp.out", "backward")], metric=METRIC,
        edits=[Edit(place, torch.zeros_like)],
    )  # fmt: skip
    assert backward(raw, "resid.post", 1).any()
    assert not backward(raw, "mlp.out", 1).any()
    assert not backward(raw, "resid.post", 0).any()
    with pytest.raises(ShapeError, match=r"the edit of resid.post:1"):
        capture(circuit, tokens(), [], edits=[Edit(place, lambda x: x[:1])])
    with pytest.raises(SiteError, match="derived from other places"):
        Edit(Place("attn.logits", 1), torch.zeros_like)


def test_what_an_edit_returned_stays_as_it_was():
    circuit, place = Circuit(shared_decoder("llama")), Place("resid.post", 1)
    constant = torch.ones(7, circuit.d_model, dtype=torch.float64)
    [raw] = capture(
        circuit, tokens(), [Need("resid.post", "backward")], metric=METRIC, edits=[Edit(place, lambda _: constant)]
    )
    assert backward(raw, "resid.post", 1).any()
    assert not constant.requires_grad


def test_probabilities_have_a_gradient_where_queries_and_keys_are_constants():
    """Beside the formula: z is the probabilities times the values."""
    circuit = Circuit(shared_decoder("llama"))
    kinds = ("attn.probs", "attn.z")
    [raw] = capture(
        circuit, tokens(), [Need("attn.v"), *(Need(kind, "backward") for kind in kinds)], metric=METRIC,
        edits=[Edit(Place(f"attn.{part}", 1), torch.zeros_like) for part in "qk"],
    )  # fmt: skip
    expected = torch.einsum("thd,khd->tkh", backward(raw, "attn.z", 1), forward(raw, "attn.v", 1))
    close(backward(raw, "attn.probs", 1), expected)


def test_arguments_of_attention_that_follow_from_the_stream_are_kept_without_a_graph():
    model = decoder("llama")
    model.model.layers[1].self_attn.register_forward_pre_hook(
        lambda _, args, named: (args, {**named, "earlier": named["hidden_states"]}), with_kwargs=True
    )
    [raw] = capture(model, tokens(), [Need("resid.pre"), Need("resid.pre", "backward")], metric=METRIC)
    kept = copy.deepcopy(raw.arguments[1].named)  # torch refuses to copy a tensor that has a graph
    assert kept["earlier"].shape == (1, *forward(raw, "resid.pre", 1).shape)


def test_a_pass_in_another_thread_during_a_capture_is_that_of_the_model():
    circuit, found = Circuit(shared_decoder("llama")), []
    model = circuit.model
    with torch.no_grad():
        expected = model(tokens()[None]).logits

    def run() -> None:
        with torch.no_grad():
            found.append(model(tokens(seed=0)[None]).logits)

    def meanwhile(x: Tensor) -> Tensor:
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        return x

    capture(circuit, tokens(), [Need("logits")], edits=[Edit(Place("attn.probs", 1), meanwhile)])
    assert len(found) == 1
    close(found[0], expected)


# ---- what a person can get wrong


def test_errors_say_what_to_do():
    model = decoder("gpt_neox")
    with pytest.raises(SiteError, match=r"resid.mid:0: its attention and MLP run side by side"):
        capture(model, tokens(), [Need("resid.mid")])
    with pytest.raises(SiteError, match="3 layers, 0 to 2"):
        capture(model, tokens(), [Need("attn.z", layers=frozenset({3}))])
    with pytest.raises(UsageError, match="needs a metric"):
        capture(model, tokens(), [Need("attn.z", "backward")])
    with pytest.raises(UsageError, match="norms to freeze are"):
        capture(model, tokens(), [], freeze_norms=("last",))
    with pytest.raises(SiteError, match=r"attn.z:1 \(backward\) was not captured.*attn.z:1 \(forward\)"):
        capture(model, tokens(), [Need("attn.z")])[0][Place("attn.z", 1), "backward"]
    for wrong in ("text", [], [[1], []], [1.5], {"ids": [1]}, [["a"]], torch.zeros(2, 2, 2, dtype=torch.long)):
        with pytest.raises(UsageError):
            capture(model, wrong, [])
    for mask, match in (([1, 0, 1], "gap"), ([0, 0, 0], "all padding"), ([1, 1], "shape")):
        with pytest.raises(UsageError, match=match):
            capture(model, {"input_ids": [1, 2, 3], "attention_mask": mask}, [])


@pytest.mark.parametrize("name", DECODERS)
def test_parallel_models_are_the_ones_without_a_middle(name):
    circuit = Circuit(shared_decoder(name))
    assert (name in PARALLEL) == circuit.parallel == (not circuit.places("resid.mid"))
    assert (name in POST_NORM) == bool(circuit.places("norm.mlp.post.scale"))
