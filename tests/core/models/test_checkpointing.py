"""Gradient checkpointing: gradients are those of plain hooks in a model without it, wherever backward is called."""

import functools

import featurizers
import pytest
import torch
from featurizers import Collect, Interchange, Steer, collect, intervene
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.utils.checkpoint import checkpoint

from tests.support.models import WIDTH, fresh_model, hooked, module_of, prompts

BASE, SOURCE = prompts(2, 4), prompts(2, 4, seed=1)
SITES = ("resid.pre:1", "attn.out:1", "mlp.out:1", "resid.post:1")
each_kind = pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])


def checkpointed(architecture, reentrant):
    model = fresh_model(architecture).train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    return model


def gradients(model, parameter):
    return [parameter.grad, *(p.grad for p in model.parameters())]


@each_kind
@pytest.mark.parametrize("inside", [True, False], ids=["backward inside", "backward after"])
@pytest.mark.parametrize("site", SITES)
def test_steering_has_the_gradients_of_a_model_without_checkpointing(site, inside, reentrant):
    plain, model = fresh_model("llama").train(), checkpointed("llama", reentrant)
    deltas = [torch.ones(WIDTH, requires_grad=True) for _ in range(2)]
    kind, _, layer = site.partition(":")
    with hooked(*module_of(plain, "llama", kind, int(layer)), lambda hidden: hidden + deltas[0]):
        wanted = plain(BASE).logits
    wanted.square().mean().backward()
    with intervene(model, {site: Steer(featurizers.create("identity", d_in=WIDTH), delta=deltas[1])}):
        found = model(BASE).logits
        if inside:
            found.square().mean().backward()
    if not inside:
        found.square().mean().backward()
    torch.testing.assert_close(found, wanted)
    assert deltas[0].grad.abs().max() > 1e-4
    for a, b in zip(gradients(model, deltas[1]), gradients(plain, deltas[0]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


@each_kind
@pytest.mark.parametrize("architecture", ["gpt2", "gemma2"])
def test_a_subspace_is_trained_as_without_checkpointing(architecture, reentrant):
    found = []
    for model in (fresh_model(architecture), checkpointed(architecture, reentrant)):
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        f = featurizers.create("subspace", d_in=WIDTH, n_features=3, seed=0)
        model.requires_grad_(False)
        swap = Interchange(f, source={"input_ids": SOURCE}, positions=[-1])
        with intervene(model, {"mlp.out:1": swap}):
            first = model(BASE).logits
        with intervene(model, {"mlp.out:1": swap}):  # a second prompt before the backward pass of the first
            model(SOURCE)
        first.square().mean().backward()
        found.append([p.grad for p in f.parameters()])
    assert found[0][0].abs().max() > 1e-6
    for plain, other in zip(*found, strict=True):
        torch.testing.assert_close(other, plain, rtol=1e-3, atol=1e-7)


@each_kind
def test_what_is_collected_has_its_gradient(reentrant):
    plain, model = fresh_model("llama").train(), checkpointed("llama", reentrant)
    read = []
    with hooked(*module_of(plain, "llama", "mlp.out", 1), lambda hidden: read.append(hidden) or hidden):
        plain(BASE)
    read[0].square().mean().backward()
    wanted = [p.grad for p in plain.parameters()]
    f = featurizers.create("identity", d_in=WIDTH)
    with intervene(model, {"mlp.out:1": Collect(f)}) as collected:
        model(BASE)
    found = collect(model, {"input_ids": BASE}, ["mlp.out:1"], grad=True)["mlp.out:1"]
    for activations in (collected["mlp.out:1"], found):
        model.zero_grad()
        activations.square().mean().backward()
        for a, b in zip((p.grad for p in model.parameters()), wanted, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


@each_kind
def test_blocks_without_a_site_stay_checkpointed(reentrant):
    model, runs = checkpointed("llama", reentrant), []
    for number, block in enumerate(model.model.layers):
        block.self_attn.register_forward_pre_hook(lambda *_, number=number: runs.append(number))
    with intervene(model, {"mlp.out:1": Steer(featurizers.create("identity", d_in=WIDTH), delta=1.0)}):
        loss = model(BASE).logits.square().mean()
    loss.backward()
    assert sorted(runs) == [0, 0, 1, 2, 2]


@pytest.mark.parametrize("first_out", [0, 1])
def test_contexts_that_end_in_any_order_leave_checkpointing_as_it_was(first_out):
    model = checkpointed("llama", reentrant=False)
    before = {name: vars(m).get("_gradient_checkpointing_func") for name, m in model.named_modules()}
    f = featurizers.create("identity", d_in=WIDTH)
    contexts = [intervene(model, {f"mlp.out:{layer}": Steer(f, delta=1.0)}) for layer in (1, 1)]
    for context in contexts:
        context.__enter__()
    contexts[first_out].__exit__(None, None, None)
    delta = torch.ones(WIDTH, requires_grad=True)
    with intervene(model, {"mlp.out:2": Steer(f, delta=delta)}):
        logits = model(BASE).logits
    contexts[1 - first_out].__exit__(None, None, None)
    after = {name: vars(m).get("_gradient_checkpointing_func") for name, m in model.named_modules()}
    assert all(after[name] is before[name] for name in before)
    logits.square().mean().backward()
    assert delta.grad is not None


class Decoder(nn.Module):
    """Checkpoints its layers itself, as older models of transformers do."""

    def __init__(self, reentrant):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(2))
        self._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=reentrant)

    def forward(self, x):
        for layer in self.layers:
            x = self._gradient_checkpointing_func(layer.__call__, x)
        return x


class Wrapped(nn.Module):
    """Has layers in torch's own wrapper."""

    def __init__(self, reentrant):
        super().__init__()
        kind = CheckpointImpl.REENTRANT if reentrant else CheckpointImpl.NO_REENTRANT
        layers = (nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(2))
        self.layers = nn.Sequential(*(checkpoint_wrapper(layer, kind) for layer in layers))

    def forward(self, x):
        return self.layers(x)


@each_kind
@pytest.mark.parametrize("make", [Decoder, Wrapped])
def test_other_models_that_checkpoint_their_layers(make, reentrant):
    model = make(reentrant)
    x = torch.randn(1, 2, WIDTH, generator=torch.Generator().manual_seed(0)).requires_grad_()
    inside = "._checkpoint_wrapped_module" if make is Wrapped else ""
    site, deltas = f"module:layers.1{inside}.0:output", [torch.ones(WIDTH, requires_grad=True) for _ in range(2)]
    with intervene(model, {site: Steer(featurizers.create("identity", d_in=WIDTH), delta=deltas[0])}):
        found = model(x)
    found.square().mean().backward()
    layers = [getattr(layer, "_checkpoint_wrapped_module", layer) for layer in model.layers]
    hidden = layers[0](x)
    layers[1][1](layers[1][0](hidden) + deltas[1]).square().mean().backward()
    torch.testing.assert_close(deltas[0].grad, deltas[1].grad)
