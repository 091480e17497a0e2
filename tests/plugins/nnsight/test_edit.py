"""`featurizers_nnsight.edit` against plain torch hooks, and against the same edit of the model without nnsight."""

from __future__ import annotations

import copy
from typing import Any

import featurizers
import pytest
import torch
from featurizers import Ablate, Collect, Interchange, Steer
from featurizers.errors import PositionError, SiteError, UsageError
from torch import Tensor, nn

from tests.support.nnsight_models import CONFIGS, held, model_of

nnsight = pytest.importorskip("nnsight", reason="nnsight is not installed")
edit = pytest.importorskip("featurizers_nnsight").edit

SITES = ("embed", "resid.pre:1", "attn.q:1", "attn.z:1:2", "attn.out:1", "resid.mid:1", "mlp.act:1", "mlp.out:1",
         "resid.post:1", "norm.out", "module:lm_head:input")  # fmt: skip
IDS = torch.arange(1, 13).reshape(2, 6)
SOURCE = IDS.flip(1) + 20
WAVE = torch.linspace(-1.0, 1.0, 32)  # LayerNorm takes out what is added to all activations alike
GREEDY = {"do_sample": False, "max_new_tokens": 4, "min_new_tokens": 4}


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request: pytest.FixtureRequest) -> tuple[nn.Module, Any]:
    """Return a model and its copy held by nnsight."""
    model = model_of(request.param)
    return model, held(model)


@pytest.fixture(scope="module")
def gpt2() -> tuple[nn.Module, Any]:
    model = model_of("gpt2")
    return model, held(model)


def identity() -> featurizers.Featurizer:
    return featurizers.create("identity", d_in=32)


def block_of(model: nn.Module, layer: int) -> nn.Module:
    return model.transformer.h[layer] if hasattr(model, "transformer") else model.model.layers[layer]


def hooked(model: nn.Module, change: Any, layer: int = 1) -> nn.Module:
    """Return a copy of a model with a plain torch hook that changes the output of a block."""
    model = copy.deepcopy(model)

    def on_output(_: nn.Module, __: Any, output: Any) -> Any:
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    block_of(model, layer).register_forward_hook(on_output)
    return model


def at(columns: Any, delta: float) -> Any:
    """Return a change that adds to all activations of some columns of a prompt."""

    def change(hidden: Tensor) -> Tensor:
        if hidden.shape[1] < 2:  # a generated token
            return hidden
        hidden = hidden.clone()
        hidden[:, columns] += delta * WAVE
        return hidden

    return change


def test_logits_are_those_of_a_torch_hook_bit_by_bit(pair: tuple[nn.Module, Any]) -> None:
    model, lm = pair
    with lm.trace(IDS):
        edit(lm, {"resid.post:1": Steer(identity(), delta=2.0 * WAVE, positions=[0, -1])})
        logits = lm.output.logits.save()
    expected = hooked(model, at([0, -1], 2.0))(IDS).logits
    assert torch.equal(logits, expected)
    assert (expected - model(IDS).logits).abs().max() > 0.1


@pytest.mark.parametrize("site", SITES)
def test_a_site_in_a_trace_is_the_site_of_the_model(pair: tuple[nn.Module, Any], site: str) -> None:
    model, lm = pair
    f = featurizers.create("subspace", d_in=width(model, site), n_features=3, seed=0)
    operation = Interchange(f, source={"input_ids": SOURCE}, positions=[-1])
    with featurizers.intervene(model, {site: operation}):
        expected = model(IDS).logits
    with lm.trace(IDS):
        edit(lm, {site: operation})
        logits = lm.output.logits.save()
    assert torch.equal(logits, expected)
    assert (expected - model(IDS).logits).abs().max() > 1e-3


def width(model: nn.Module, site: str) -> int:
    return featurizers.collect(model, {"input_ids": IDS}, [site])[site].shape[-1]


def test_sites_in_any_order_are_edited_in_execution_order(pair: tuple[nn.Module, Any]) -> None:
    model, lm = pair
    operations: dict[str, Any] = {
        site: Steer(featurizers.create("identity", d_in=width(model, site)), delta=0.5) for site in reversed(SITES)
    }
    with featurizers.intervene(model, operations):
        expected = model(IDS).logits
    with lm.trace(IDS):
        edit(lm, operations)
        logits = lm.output.logits.save()
    assert torch.equal(logits, expected)


def test_several_calls_of_edit_and_the_reads_after_them_see_the_edit(gpt2: tuple[nn.Module, Any]) -> None:
    model, lm = gpt2
    f = identity()
    with lm.trace(IDS):
        edit(lm, {"resid.post:0": Steer(f, delta=1.0 * WAVE, positions=[-1])})
        edit(lm, {"resid.post:1": [Ablate(f, indices=[3], positions=[0]), Steer(f, delta=1.0 * WAVE, positions=[0])]})
        at_site = lm.transformer.h[1].output.save()
        later = lm.transformer.h[2].input.save()
        logits = lm.output.logits.save()
    first = hooked(model, at([-1], 1.0), layer=0)

    def change(hidden: Tensor) -> Tensor:
        hidden = hidden.clone()
        hidden[:, 0, 3] = 0.0
        hidden[:, 0] += 1.0 * WAVE
        return hidden

    assert torch.equal(logits, hooked(first, change)(IDS).logits)
    assert torch.equal(at_site if isinstance(at_site, Tensor) else at_site[0], later)


def test_each_invoke_is_edited_in_its_own_rows_at_its_own_positions(pair: tuple[nn.Module, Any]) -> None:
    model, lm = pair
    f = identity()
    with lm.trace() as tracer:
        with tracer.invoke("t1 t2 t3"):
            edit(lm, {"resid.post:1": Steer(f, delta=2.0 * WAVE, positions=[0])})
            edit(lm, {"resid.post:2": Steer(f, delta=1.0 * WAVE, positions=[1])})
            short = lm.output.logits[:, -3:].save()
        with tracer.invoke("t4 t5 t6 t7 t8 t9"):
            long = lm.output.logits.save()
    alone = hooked(hooked(model, at([0], 2.0)), at([1], 1.0), layer=2)(torch.tensor([[1, 2, 3]])).logits
    assert torch.allclose(short, alone, atol=2e-6)
    assert torch.allclose(long, model(torch.tensor([[4, 5, 6, 7, 8, 9]])).logits, atol=2e-6)
    assert (alone - model(torch.tensor([[1, 2, 3]])).logits).abs().max() > 0.1


def test_generate_edits_the_prompt_once_and_every_step_of_iter(pair: tuple[nn.Module, Any]) -> None:
    model, lm = pair
    once, always = (Steer(identity(), delta=3.0 * WAVE, positions=positions) for positions in ([-1], None))
    with lm.generate(IDS, **GREEDY) as tracer:
        edit(lm, {"resid.post:1": once})
        prompt_only = tracer.result.save()
    with lm.generate(IDS, **GREEDY) as tracer:
        for _ in tracer.iter[:4]:
            edit(lm, {"resid.post:0": once})  # acts in the first step alone
            edit(lm, {"resid.post:1": always})
        every = tracer.result.save()
    assert torch.equal(prompt_only, hooked(model, at([-1], 3.0)).generate(IDS, **GREEDY))
    both = hooked(hooked(model, at([-1], 3.0), layer=0), lambda hidden: hidden + 3.0 * WAVE)
    assert torch.equal(every, both.generate(IDS, **GREEDY))


def test_generate_without_a_cache_keeps_the_positions_of_the_prompt(gpt2: tuple[nn.Module, Any]) -> None:
    model, lm = gpt2
    with lm.generate(IDS, use_cache=False, **GREEDY) as tracer:
        for _ in tracer.iter[:4]:
            edit(lm, {"resid.post:1": Steer(identity(), delta=3.0 * WAVE, positions=[-1])})
        tokens = tracer.result.save()
    assert torch.equal(tokens, hooked(model, at([5], 3.0)).generate(IDS, use_cache=False, **GREEDY))


def test_what_is_collected_is_saved(gpt2: tuple[nn.Module, Any]) -> None:
    model, lm = gpt2
    f = featurizers.create("subspace", d_in=32, n_features=3, seed=0)
    with lm.trace(IDS):
        found = edit(lm, {"resid.post:1": Collect(f, positions=[-1]), "resid.post:0": Collect(f)})
    hidden = model(IDS, output_hidden_states=True).hidden_states
    assert torch.allclose(found["resid.post:1"], hidden[2][:, -1:] @ f.encode(torch.eye(32)), atol=1e-5)
    assert found["resid.post:0"].shape == (2, 6, 3)


def test_special_tokens_are_not_edited(gpt2: tuple[nn.Module, Any]) -> None:
    model, lm = gpt2
    f = featurizers.create("dictionary", d_in=32, n_features=8, special_tokens=[1])
    torch.nn.init.normal_(f.W_dec)
    with lm.trace(IDS):
        edit(lm, {"resid.post:1": Steer(f, delta=1.0)})
        logits = lm.output.logits.save()

    def change(hidden: Tensor) -> Tensor:
        return torch.where((IDS == 1).unsqueeze(-1), hidden, hidden + f.W_dec.sum(0))

    assert torch.allclose(logits, hooked(model, change)(IDS).logits, atol=1e-5)


def test_an_interchange_with_itself_changes_nothing_with_padding(gpt2: tuple[nn.Module, Any]) -> None:
    _, lm = gpt2
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    inputs = {"input_ids": IDS, "attention_mask": mask}
    plain = nnsight.NNsight(lm._module)  # gives the model no position ids
    for holder in (lm, plain):
        with holder.trace(**inputs):
            clean = holder.output.logits.save()
        with holder.trace(**inputs):
            edit(holder, {"resid.post:1": Interchange(identity(), source=inputs)})
            logits = holder.output.logits.save()
        # equal in all columns but those of padding
        assert torch.allclose(logits[mask == 1], clean[mask == 1], atol=1e-6)


def test_gradients_flow_through_an_edit(gpt2: tuple[nn.Module, Any]) -> None:
    model, lm = gpt2
    delta = torch.zeros(32, requires_grad=True)
    f = identity()
    with lm.trace(IDS):
        edit(lm, {"resid.post:1": Steer(f, delta=delta)})
        loss = lm.output.logits.square().mean().save()
    loss.backward()
    other = torch.zeros(32, requires_grad=True)
    hooked(model, lambda hidden: hidden + other)(IDS).logits.square().mean().backward()
    assert torch.allclose(delta.grad, other.grad, atol=1e-7)


def test_a_module_that_is_no_language_model_is_edited() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    lm, x = nnsight.NNsight(copy.deepcopy(model)), torch.randn(2, 4)
    f = featurizers.create("identity", d_in=4)
    with lm.trace(x):
        edit(lm, {"module:1:output": Steer(f, delta=1.0), "module:0:output": Steer(f, delta=2.0)})
        result = lm.output.save()
    assert torch.allclose(result, model[1](model[0](x) + 2.0) + 1.0)


def trace_of(lm: Any, site: str, operation: Any, *, reads: int | None = None, **inputs: Any) -> None:
    """Edit in a trace, after a read of the output of some block."""
    with lm.trace(IDS, **inputs):
        if reads is not None:
            lm.transformer.h[reads].output.save()
        edit(lm, {site: operation})


def generate_of(lm: Any, site: str, operation: Any, steps: Any, *, reads: int | None = None, **options: Any) -> None:
    """Edit in steps of generation; in all but the first, after a read of the output of some block."""
    with lm.generate(IDS, **GREEDY, **options) as tracer:
        for step in tracer.iter[steps]:
            if reads is not None and (step or site == "resid.post:0"):
                lm.transformer.h[reads].output.save()
                edit(lm, {site: operation})
            elif reads is None:
                edit(lm, {site: operation})


def test_a_site_that_the_pass_has_gone_past_is_refused(gpt2: tuple[nn.Module, Any]) -> None:
    _, lm = gpt2
    everywhere, first = (Steer(identity(), delta=1.0 * WAVE, positions=positions) for positions in (None, [0]))
    with pytest.raises(UsageError, match=r"resid\.post:0: this pass has gone past"):
        trace_of(lm, "resid.post:0", everywhere, reads=1)
    with pytest.raises(UsageError, match="gone past"):
        generate_of(lm, "resid.post:0", everywhere, slice(2), reads=1)
    with pytest.raises(UsageError, match="first request of each pass"):
        trace_of(lm, "resid.post:1", first, reads=0)


def test_in_a_later_step_inputs_that_have_passed_are_not_those_of_the_next(gpt2: tuple[nn.Module, Any]) -> None:
    _, lm = gpt2
    with pytest.raises(UsageError, match="first request of each pass"):
        generate_of(lm, "resid.post:1", Steer(identity(), delta=WAVE, positions=[0]), slice(3), reads=0)


def test_what_cannot_be_right_is_refused(gpt2: tuple[nn.Module, Any]) -> None:
    model, lm = gpt2
    steer, last = (Steer(identity(), delta=1.0, positions=positions) for positions in ([9], [-1]))
    with pytest.raises(UsageError, match="in the body of a trace"):
        edit(lm, {"resid.post:0": steer})
    with pytest.raises(UsageError, match="a model of nnsight"):
        edit(model, {"resid.post:0": steer})
    with pytest.raises(PositionError, match="position 9 is not in prompt 0"):
        trace_of(lm, "resid.post:0", steer)
    with pytest.raises(SiteError, match=r"resid\.post:7"):
        trace_of(lm, "resid.post:7", steer)
    with pytest.raises(UsageError, match="takes operations"):
        trace_of(lm, "resid.post:1", identity())
    for option in ({"guidance_scale": 2.0}, {"prefill_chunk_size": 2}):
        with pytest.raises(PositionError, match=next(iter(option))):
            generate_of(lm, "resid.post:0", last, slice(1), **option)
    with pytest.raises(PositionError, match="length of the prompt is not known"):
        generate_of(lm, "resid.post:0", last, slice(1, 3), use_cache=False)


@pytest.mark.skipif(torch.__version__.startswith("2.8."), reason="torch 2.8 runs no experts of transformers on the CPU")
def test_a_router_is_not_edited_in_a_trace() -> None:
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.MixtralConfig(num_local_experts=4, num_key_value_heads=2, vocab_size=48, **sizes)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    lm, f = nnsight.NNsight(copy.deepcopy(model)), featurizers.create("identity", d_in=4)
    steer = Steer(f, delta=torch.tensor([4.0, 0.0, 0.0, -4.0]))
    with pytest.raises(SiteError, match=r"featurizers\.intervene\(lm, …\)"):
        trace_by_keyword(lm, "mlp.router:1", steer)
    with featurizers.intervene(model, {"mlp.router:1": steer}):
        expected = model(input_ids=IDS).logits
    with featurizers.intervene(lm, {"mlp.router:1": steer}), lm.trace(input_ids=IDS):
        logits = lm.output.logits.save()
    assert torch.equal(logits, expected)


def trace_by_keyword(lm: Any, site: str, operation: Any) -> None:
    with lm.trace(input_ids=IDS):
        edit(lm, {site: operation})


def test_a_trace_after_a_refused_edit_is_clean(gpt2: tuple[nn.Module, Any]) -> None:
    model, lm = gpt2
    with pytest.raises(PositionError):
        trace_of(lm, "resid.post:0", Steer(identity(), delta=WAVE, positions=[9]))
    with lm.trace(IDS):
        logits = lm.output.logits.save()
    assert torch.equal(logits, model(IDS).logits)
    assert not lm.interleaver.interleaving


def test_an_edit_that_nnsight_keeps_for_later_traces_sees_each_prompt(gpt2: tuple[nn.Module, Any]) -> None:
    model, lm = gpt2
    steer = Steer(identity(), delta=2.0 * WAVE, positions=[-1])
    with lm.edit() as (_, edited):
        edit(lm, {"resid.post:1": steer})
    for ids in (IDS, IDS[:, :4], IDS[:1]):
        with edited.trace(ids):
            logits = edited.output.logits.save()
        assert torch.equal(logits, hooked(model, at([-1], 2.0))(ids).logits)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0]] * 2)
    with edited.trace({"input_ids": IDS, "attention_mask": mask}):
        logits = edited.output.logits.save()
    assert torch.equal(logits[:, :4], hooked(model, at([3], 2.0))(IDS, attention_mask=mask).logits[:, :4])
