"""The router of a mixture of experts: an edit of its logits is what the model routes by."""

from __future__ import annotations

import copy
import functools
from contextlib import contextmanager

import featurizers
import pytest
import torch
import transformers
from featurizers import Anatomy, Interchange, Site, Steer, collect, intervene
from featurizers.errors import SiteError
from featurizers.models.widths import width_of
from torch import nn

from tests.support.models import WIDTH, fresh_model, prompts

torch.set_num_threads(1)

EXPERTS, CHOSEN, LAYER = 4, 2, 1
SIZES = {
    "hidden_size": WIDTH,
    "intermediate_size": 40,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts_per_tok": CHOSEN,
    "norm_topk_prob": True,
    "vocab_size": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
LATENT = {
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "head_dim": 4,
}
MODELS = {
    "Mixtral": {"num_local_experts": EXPERTS},
    "Qwen2Moe": {"num_experts": EXPERTS, "shared_expert_intermediate_size": 16},
    "Qwen3Moe": {"num_experts": EXPERTS},
    "GptOss": {"num_local_experts": EXPERTS},
    "Olmoe": {"num_experts": EXPERTS},
    "DeepseekV3": {**LATENT, "n_routed_experts": EXPERTS, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
}
SITE = f"mlp.router:{LAYER}"
BASE, SOURCE = {"input_ids": prompts(2, 5, seed=1)}, {"input_ids": prompts(2, 5, seed=2)}
F = featurizers.create("identity", d_in=EXPERTS)


@functools.cache
def build(name):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = getattr(transformers, f"{name}Config")(**{**SIZES, **MODELS[name]})
        model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def parts(model):
    """Return the router and the experts of a block."""
    mlp = model.model.layers[LAYER].mlp
    return (mlp.router if hasattr(mlp, "router") else mlp.gate), mlp.experts


def routing(model, inputs):
    """Return what the router returns, seen by a plain hook."""
    seen = []
    handle = parts(model)[0].register_forward_hook(lambda _, __, output: seen.append(output))
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    return seen[-1]


@contextmanager
def routed_by(model, weights, indices):
    """Give the experts other weights and indices, by a plain hook."""
    handle = parts(model)[1].register_forward_pre_hook(lambda _, args: (args[0], indices, weights))
    try:
        yield
    finally:
        handle.remove()


def refused_where_the_router_does_not_choose(model):
    """Return whether a router returns its logits alone, as in some releases, and see that it is refused."""
    if not isinstance(routing(model, BASE), torch.Tensor):
        return False
    with pytest.raises(SiteError, match="does not return logits, weights and indices of the experts"):
        collect(model, BASE, [SITE])
    return True


@pytest.mark.parametrize("name", MODELS)
def test_the_logits_are_those_of_the_router(name):
    model = build(name)
    if refused_where_the_router_does_not_choose(model):
        return
    found = collect(model, BASE, [SITE])[SITE]
    assert found.shape == (2, 5, EXPERTS)
    assert torch.equal(found.flatten(0, 1), routing(model, BASE)[0])
    assert torch.equal(collect(model, BASE, [SITE], positions=[-1])[SITE], found[:, [-1]])
    assert width_of(Anatomy(model), Site(SITE)) == EXPERTS
    assert Anatomy(model).place(SITE).module is parts(model)[0]


@pytest.mark.parametrize("name", MODELS)
def test_an_interchange_is_that_of_the_experts_that_are_chosen_and_their_weights(name):
    model = build(name)
    if refused_where_the_router_does_not_choose(model):
        return
    _, weights, indices = routing(model, SOURCE)
    with torch.no_grad(), routed_by(model, weights, indices):
        wanted = model(**BASE).logits
    with torch.no_grad(), intervene(model, {SITE: Interchange(F, source=SOURCE)}):
        found = model(**BASE).logits
    assert torch.equal(found, wanted)
    with torch.no_grad():
        plain = model(**BASE).logits
        assert (plain - wanted).abs().max() > 1e-3
        with intervene(model, {SITE: Interchange(F, source=BASE)}), intervene(model, {SITE: Steer(F, delta=0.0)}):
            assert torch.equal(model(**BASE).logits, plain)


@pytest.mark.parametrize("name", ["Mixtral", "Qwen2Moe", "Qwen3Moe", "GptOss", "Olmoe"])
@pytest.mark.parametrize("expert", [0, EXPERTS - 1])
def test_a_forced_expert_is_a_model_in_which_all_experts_are_that_one(name, expert):
    """The weights of the chosen experts sum to 1, so that it does not matter which copies are chosen."""
    model = build(name)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in parts(other)[1].parameters():
            parameter.copy_(parameter[[expert]].expand_as(parameter))
    delta = torch.zeros(EXPERTS)
    delta[expert] = 1e4
    with torch.no_grad(), intervene(model, {SITE: Steer(F, delta=delta)}):
        found = model(**BASE).logits
    with torch.no_grad():
        torch.testing.assert_close(found, other(**BASE).logits, rtol=1e-4, atol=1e-5)
        assert (model(**BASE).logits - found).abs().max() > 1e-3


def test_a_constant_is_the_bias_of_a_router_that_has_one():
    model = build("GptOss")
    other, delta = copy.deepcopy(model), torch.tensor([0.0, 3.0, -1.0, 0.5])
    parts(other)[0].bias.data += delta
    with torch.no_grad(), intervene(model, {SITE: Steer(F, delta=delta)}):
        torch.testing.assert_close(model(**BASE).logits, other(**BASE).logits, rtol=1e-5, atol=1e-6)


def test_positions_padding_and_generated_tokens():
    model = build("Qwen3Moe")
    alone = prompts(1, 4, seed=5)
    padded = {
        "input_ids": torch.cat([torch.zeros(1, 2, dtype=torch.long), alone], dim=1),
        "attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1]]),
    }
    of_alone = collect(model, {"input_ids": alone}, [SITE], positions=[0, -1])[SITE]
    torch.testing.assert_close(collect(model, padded, [SITE], positions=[0, -1])[SITE], of_alone, rtol=1e-4, atol=1e-5)
    delta, options = torch.tensor([0.0, 8.0, 0.0, -8.0]), {"max_new_tokens": 4, "do_sample": False}
    router = parts(model)[0]

    def on_last_token_of_prompt(module, args, output):
        logits = output[0].clone()
        if len(logits) > 1:
            logits[-1] += delta
        top = logits.softmax(-1).topk(CHOSEN)
        return logits, top.values / top.values.sum(-1, keepdim=True), top.indices

    handle = router.register_forward_hook(on_last_token_of_prompt)
    with torch.no_grad():
        wanted = model.generate(alone, **options)
    handle.remove()
    with torch.no_grad(), intervene(model, {SITE: Steer(F, delta=delta, positions=[-1])}):
        assert torch.equal(model.generate(alone, **options), wanted)


def test_the_gradient_of_an_edit_reaches_the_weights_of_the_experts():
    model = build("Mixtral").requires_grad_(False)
    deltas = [torch.zeros(EXPERTS, requires_grad=True) for _ in range(2)]
    with intervene(model, {SITE: Steer(F, delta=deltas[0])}):
        model(**BASE).logits.square().sum().backward()
    logits, _, indices = routing(model, BASE)
    weights = (logits + deltas[1]).softmax(-1).gather(-1, indices)
    with routed_by(model, weights / weights.sum(-1, keepdim=True), indices):
        model(**BASE).logits.square().sum().backward()
    assert deltas[1].grad.abs().max() > 1e-3
    torch.testing.assert_close(deltas[0].grad, deltas[1].grad, rtol=1e-4, atol=1e-5)


class OtherLogits(nn.Module):
    """A router that returns first something else than it chooses by."""

    def __init__(self, router: nn.Module) -> None:
        super().__init__()
        self.weight = router.weight

    def forward(self, hidden):
        logits = torch.nn.functional.linear(hidden, self.weight)
        return 2 * logits, *logits.softmax(-1).topk(CHOSEN)


class LogitsAlone(OtherLogits):
    """A router that leaves the choice to the block."""

    def forward(self, hidden):
        return torch.nn.functional.linear(hidden, self.weight)


class OwnChoice(nn.Module):
    """A block that does not use what its router returns."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.gate, self.experts = mlp.gate, mlp.experts

    def forward(self, hidden):
        flat = hidden.flatten(0, 1)
        _, weights, indices = self.gate(flat)
        return self.experts(flat, indices, weights.clone()).view_as(hidden)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda mlp: setattr(mlp, "gate", OtherLogits(mlp.gate)), "does not return first the logits"),
        (lambda mlp: setattr(mlp, "gate", LogitsAlone(mlp.gate)), "does not return logits, weights and indices"),
    ],
)
def test_a_router_that_works_otherwise_is_refused_in_the_first_pass(change, message):
    model = copy.deepcopy(build("Mixtral"))
    change(model.model.layers[LAYER].mlp)
    with pytest.raises(SiteError, match=rf"mlp\.router, .*{message}"):
        collect(model, BASE, [SITE])
    with intervene(model, {SITE: Steer(F, delta=1.0)}), pytest.raises(SiteError, match=message):
        model(**BASE)


def test_a_block_that_does_not_use_what_the_router_returns_is_refused_in_the_first_pass():
    model = copy.deepcopy(build("Mixtral"))
    model.model.layers[LAYER].mlp = OwnChoice(model.model.layers[LAYER].mlp)
    with (
        intervene(model, {SITE: Steer(F, delta=1.0)}),
        pytest.raises(SiteError, match=r"experts' does not take the weights and indices that .*gate' returns"),
    ):
        model(**BASE)


def test_a_hook_of_the_user_that_copies_what_the_experts_take_is_run_after_the_check():
    model, delta = build("Mixtral"), torch.tensor([0.0, 3.0, -1.0, 0.5])
    with torch.no_grad(), intervene(model, {SITE: Steer(F, delta=delta)}):
        wanted = model(**BASE).logits
    handle = parts(model)[1].register_forward_pre_hook(lambda _, args: tuple(arg.clone() for arg in args))
    try:
        with torch.no_grad(), intervene(model, {SITE: Steer(F, delta=delta)}):
            assert torch.equal(model(**BASE).logits, wanted)
    finally:
        handle.remove()


def test_a_block_without_experts_has_no_router():
    for model, name in ((fresh_model("llama"), "LlamaMLP"), (build("DeepseekV3"), "DeepseekV3MLP")):
        with pytest.raises(SiteError, match=rf"mlp\.router:0: .*its {name} has .* and no router beside experts"):
            Anatomy(model).place("mlp.router:0")
    assert "mlp.router (in 1 of them)" in repr(Anatomy(build("DeepseekV3")))
    with pytest.raises(SiteError, match="chosen anew"):
        Anatomy(build("Mixtral")).pyvene_component(SITE)
