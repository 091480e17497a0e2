"""Padding, ids and prompts are found at the model that the user calls; against hooks at columns counted by hand."""

from __future__ import annotations

import functools

import featurizers
import pytest
import torch
from featurizers import Collect, Interchange, Steer, collect, intervene
from featurizers.errors import PositionError, UsageError
from torch import Tensor, nn

from tests.support.models import fresh_model, hooked, hooks_of, module_of, prompts, tiny_model
from tests.support.unusual_models import WIDTH, PromptTuned, gemma3, llava, paligemma, qwen2_5_vl

torch.set_num_threads(1)

SITE = "resid.post:0"
DELTA = torch.linspace(-3.0, 3.0, WIDTH)
SIGHTED = {"gemma3": gemma3, "paligemma": paligemma, "llava": llava, "qwen2_5_vl": qwen2_5_vl}
PADDED = {
    "input_ids": torch.cat([torch.tensor([[0, 0], [11, 12]]), torch.randint(13, 50, (2, 4))], dim=1),
    "attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]]),
}
PROMPT = {"input_ids": prompts(2, 6, seed=1)}

sighted = pytest.mark.parametrize("name", SIGHTED)


@functools.cache
def seeing(name: str) -> nn.Module:
    return SIGHTED[name]()


def identity(**options: object) -> featurizers.Featurizer:
    return featurizers.create("identity", d_in=WIDTH, **options)


def steer(positions: list[int] | None = None) -> dict[str, Steer]:
    return {SITE: Steer(identity(), delta=DELTA, positions=positions)}


def generated(model: nn.Module, inputs: dict[str, Tensor], **options: object) -> Tensor:
    options = {"max_new_tokens": 4, "do_sample": False, **options}
    return torch.stack(model.generate(**inputs, **options, return_dict_in_generate=True, output_logits=True).logits)


def steered_by_hand(model: nn.Module, layer: nn.Module, columns: list[int], **options: object) -> Tensor:
    """Generate with a hook that edits one column of each prompt, in the first pass."""
    passes: list[int] = []

    def edit(hidden: Tensor) -> Tensor:
        passes.append(1)
        if len(passes) > 1:
            return hidden
        hidden = hidden.clone()
        for row, column in enumerate(columns):
            hidden[row, column] += DELTA
        return hidden

    with hooked(layer, "output", edit):
        return generated(model, PADDED, **options)


@sighted
@pytest.mark.parametrize(("position", "columns"), [(0, [2, 0]), (1, [3, 1]), (-1, [5, 5])])
def test_a_model_that_sees_is_edited_at_positions(name, position, columns):
    model = seeing(name)
    layers = featurizers.Anatomy(model).layers
    with intervene(model, steer([position])):
        found = generated(model, PADDED)
    assert (found - generated(model, PADDED)).abs().max() > 1e-3
    torch.testing.assert_close(found, steered_by_hand(model, layers[0], columns), rtol=0, atol=1e-5)


@sighted
def test_a_forward_pass_of_a_model_that_sees_is_edited_at_positions(name):
    model = seeing(name)

    def edit(hidden: Tensor) -> Tensor:
        hidden = hidden.clone()
        hidden[0, 2] += DELTA
        hidden[1, 0] += DELTA
        return hidden

    with torch.no_grad(), hooked(featurizers.Anatomy(model).layers[0], "output", edit):
        wanted = model(**PADDED).logits
    with torch.no_grad(), intervene(model, steer([0])):
        assert torch.equal(model(**PADDED).logits, wanted)
        unpadded = model(input_ids=PADDED["input_ids"]).logits
    assert unpadded.shape == wanted.shape


@sighted
def test_a_model_that_sees_knows_its_special_tokens(name):
    model = seeing(name)
    f = identity()
    f.special_tokens = (int(PADDED["input_ids"][1, 0]),)

    def edit(hidden: Tensor) -> Tensor:
        return torch.where((PADDED["input_ids"] == PADDED["input_ids"][1, 0])[..., None], hidden, hidden + DELTA)

    with torch.no_grad(), hooked(featurizers.Anatomy(model).layers[0], "output", edit):
        wanted = model(**PADDED).logits
    with torch.no_grad(), intervene(model, {SITE: Steer(f, delta=DELTA)}):
        assert torch.equal(model(**PADDED).logits, wanted)


@sighted
def test_an_interchange_of_a_model_that_sees_with_itself_changes_nothing(name):
    model = seeing(name)
    swap = {SITE: Interchange(identity(), source=PADDED, positions=[0, -1])}
    with torch.no_grad():
        clean = model(**PADDED).logits, generated(model, PADDED)
        with intervene(model, swap):
            found = model(**PADDED).logits, generated(model, PADDED)
    for one, other in zip(found, clean, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gemma3"])
def test_a_static_cache_takes_edits_at_positions(architecture):
    model = tiny_model(architecture)
    layer, _ = module_of(model, architecture, "resid.post", 0)
    static = {"cache_implementation": "static", "disable_compile": True}
    with torch.no_grad(), intervene(model, steer([0])):
        found = generated(model, PADDED, **static)
    wanted = steered_by_hand(model, layer, [2, 0], **static)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no cache"])
@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gemma3"])
@pytest.mark.parametrize("position", [-1, 0])
def test_a_context_on_the_inner_model_knows_the_prompt_of_generate(architecture, use_cache, position):
    model = tiny_model(architecture)
    inner = model.get_submodule("transformer" if architecture == "gpt2" else "model")
    with torch.no_grad():
        with intervene(model, steer([position])):
            wanted = generated(model, PADDED, use_cache=use_cache)
        with intervene(inner, steer([position])):
            found = generated(model, PADDED, use_cache=use_cache)
    assert (found - generated(model, PADDED)).abs().max() > 1e-3
    assert torch.equal(found, wanted)


def test_a_generate_that_was_looked_up_before_the_context_is_known_as_well():
    model = tiny_model("llama")
    before = model.generate
    with torch.no_grad(), intervene(model, steer([-1])):
        options = {"max_new_tokens": 4, "do_sample": False, "use_cache": False}
        found = before(**PADDED, **options, return_dict_in_generate=True, output_logits=True).logits
    with torch.no_grad(), intervene(model, steer([-1])):
        wanted = generated(model, PADDED, use_cache=False)
    assert torch.equal(torch.stack(found), wanted)


def test_a_failed_pass_leaves_no_padding_for_the_next():
    model = tiny_model("llama")
    inner = model.get_submodule("model")

    def fail(*_: object) -> None:
        raise RuntimeError("on purpose")

    with torch.no_grad(), intervene(model, {SITE: Collect(identity(), positions=[0])}) as seen:
        handle = inner.register_forward_pre_hook(fail, prepend=True)
        with pytest.raises(RuntimeError, match="on purpose"):
            model(**PADDED)
        handle.remove()
        inner(input_ids=PROMPT["input_ids"])
        found = seen[SITE]
    assert torch.equal(found, collect(inner, PROMPT, [SITE], positions=[0])[SITE])


class TestVirtualTokens:
    """Prompt tuning puts columns before the prompt's own."""

    @staticmethod
    def test_positions_are_refused():
        model = PromptTuned()
        f = identity()
        for operation in (Steer(f, delta=1.0, positions=[0]), Collect(f, positions=[-1])):
            with (
                torch.no_grad(),
                intervene(model, {SITE: operation}),
                pytest.raises(PositionError, match=r"\+3 columns.*virtual tokens"),
            ):
                model(**PADDED)
        with pytest.raises(PositionError, match=r"\+3 columns"):
            collect(model, PADDED, [SITE], positions=[0])

    @staticmethod
    def test_special_tokens_are_refused():
        f = identity()
        f.special_tokens = (1,)
        model = PromptTuned()
        with intervene(model, {SITE: Steer(f, delta=1.0)}), pytest.raises(PositionError, match="special tokens"):
            model(**PADDED)

    @staticmethod
    def test_an_edit_of_every_column_is_that_of_a_hook():
        model = PromptTuned()
        layer = model.base_model.get_submodule("model.layers.0")
        with torch.no_grad(), hooked(layer, "output", lambda hidden: hidden + DELTA):
            wanted = model(**PADDED).logits
        with torch.no_grad(), intervene(model, steer()):
            assert torch.equal(model(**PADDED).logits, wanted)

    @staticmethod
    def test_a_whole_source_is_that_of_the_model():
        model = PromptTuned()
        source = {"input_ids": prompts(2, 6, seed=4)}
        with torch.no_grad(), intervene(model, {"resid.post:2": Interchange(identity(), source=source)}):
            found = model(**PROMPT).logits
        with torch.no_grad():
            assert torch.equal(found, model(**source).logits)


class TestGuidance:
    """With guidance a second prompt passes through the model."""

    @pytest.mark.parametrize(
        "operation",
        [
            lambda: Steer(identity(), delta=1.0, positions=[-1]),
            lambda: Interchange(identity(), source=torch.zeros(1, 1, WIDTH), positions=[-1]),
            lambda: Interchange(identity(), source=torch.zeros(2, 6, WIDTH)),
            lambda: Collect(identity()),
            lambda: Collect(identity(), positions=[0]),
        ],
        ids=["steer", "interchange", "interchange of all", "collect", "collect at a position"],
    )
    @pytest.mark.parametrize("inner", [False, True], ids=["outer", "inner"])
    def test_is_named_where_it_is_refused(self, operation, inner):
        model = tiny_model("llama")
        watched = model.get_submodule("model") if inner else model
        with intervene(watched, {SITE: operation()}), pytest.raises(PositionError, match="guidance_scale"):
            generated(model, PROMPT, guidance_scale=1.5)

    def test_of_a_generation_config_is_refused_as_well(self):
        model = fresh_model("llama")
        model.generation_config.guidance_scale = 1.5
        with intervene(model, steer([0])), pytest.raises(PositionError, match="guidance_scale"):
            generated(model, PROMPT)

    def test_every_token_of_both_prompts_is_edited(self):
        model = tiny_model("llama")
        layer, _ = module_of(model, "llama", "resid.post", 0)
        with hooked(layer, "output", lambda hidden: hidden + DELTA):
            wanted = generated(model, PROMPT, guidance_scale=1.5)
        with intervene(model, steer()):
            assert torch.equal(generated(model, PROMPT, guidance_scale=1.5), wanted)


def test_a_generate_of_another_kind_that_computes_the_prompt_in_parts_is_told_so():
    model = fresh_model("llama").requires_grad_(False)
    model.generate = lambda ids: model(ids[:, :2], use_cache=True)
    with intervene(model, steer([-1])), pytest.raises(PositionError, match="whole prompt in its first pass") as error:
        model.generate(PROMPT["input_ids"])
    assert "prefill_chunk_size" not in str(error.value)


def test_a_generate_that_the_user_replaces_inside_the_context_stays():
    model = fresh_model("llama").requires_grad_(False)

    def mine(*_: object) -> None: ...

    with intervene(model, steer([-1])):
        model.generate = mine
    assert model.generate is mine
    assert not hooks_of(model)


NO_TOKEN = 12  # prompt lookup of transformers 5.9 fails without a token for the end


class TestCollectWhileGenerating:
    """What is kept belongs to the returned sequences."""

    @pytest.fixture
    def assisted(self) -> nn.Module:
        return fresh_model("llama", vocab_size=12, num_hidden_layers=2).requires_grad_(False)

    @pytest.mark.parametrize("how", ["assistant", "prompt lookup", "greedy"])
    @pytest.mark.parametrize("seed", range(3))
    @pytest.mark.parametrize("given", ["ids", "config"])
    def test_rejected_candidates_are_left_out(self, assisted, how, seed, given):
        assistant = fresh_model("llama", vocab_size=12, num_hidden_layers=1)
        prompt = torch.randint(1, 12, (1, 3), generator=torch.Generator().manual_seed(seed)).repeat(1, 3)
        options = {
            "assistant": {"assistant_model": assistant},
            "prompt lookup": {"prompt_lookup_num_tokens": 3, "eos_token_id": NO_TOKEN},
            "greedy": {},
        }[how]
        computed: list[int] = []
        layer, _ = module_of(assisted, "llama", "resid.post", 0)
        handle = layer.register_forward_hook(lambda *call: computed.append(call[1][0].shape[1]))
        with intervene(assisted, {SITE: Collect(identity())}) as seen:
            out = assisted.generate(prompt, max_new_tokens=9, do_sample=False, return_dict_in_generate=True, **options)
            tokens = out.sequences
        handle.remove()
        if given == "ids" and how != "greedy" and seed == 0:
            assert sum(computed) > tokens.shape[1] - 1, "no candidate was rejected"
        wanted = collect(assisted, {"input_ids": tokens[:, :-1]}, [SITE])[SITE]
        torch.testing.assert_close(seen[SITE], wanted, rtol=0, atol=1e-4)

    def test_assisted_decoding_is_refused_where_its_end_is_not_seen(self, assisted):
        inner = assisted.get_submodule("model")
        with intervene(inner, {SITE: Collect(identity())}), pytest.raises(UsageError, match="whose `generate`"):
            assisted.generate(prompts(1, 6) % 12, max_new_tokens=4, prompt_lookup_num_tokens=2, eos_token_id=NO_TOKEN)

    @pytest.mark.parametrize("inner", [False, True], ids=["outer", "inner"])
    def test_beams_that_are_not_returned_are_refused(self, inner):
        model = tiny_model("llama")
        watched = model.get_submodule("model") if inner else model
        with intervene(watched, {SITE: Collect(identity())}), pytest.raises(UsageError, match="beam search"):
            model.generate(**PROMPT, num_beams=2, max_new_tokens=3, do_sample=False)

    def test_beams_of_a_generation_config_are_refused(self):
        model = fresh_model("llama")
        model.generation_config.num_beams = 2
        with intervene(model, {SITE: Collect(identity())}), pytest.raises(UsageError, match="beam search"):
            model.generate(**PROMPT, max_new_tokens=3, do_sample=False)

    def test_beams_have_positions_of_the_prompt(self):
        model = tiny_model("llama")
        with intervene(model, {SITE: Collect(identity(), positions=[0, -1])}) as seen:
            model.generate(**PROMPT, num_beams=2, max_new_tokens=3, do_sample=False)
        wanted = collect(model, PROMPT, [SITE], positions=[0, -1])[SITE]
        torch.testing.assert_close(seen[SITE], wanted.repeat_interleave(2, 0), rtol=0, atol=1e-5)

    def test_several_collects_at_a_site_keep_the_last_whole(self):
        model = tiny_model("llama")
        operations = [Collect(identity(), indices=[0]), Collect(identity(), indices=[3, 5])]
        with intervene(model, {SITE: operations}) as seen:
            tokens = model.generate(**PROMPT, max_new_tokens=4, do_sample=False)
        wanted = collect(model, {"input_ids": tokens[:, :-1]}, [SITE])[SITE][..., [3, 5]]
        torch.testing.assert_close(seen[SITE], wanted, rtol=0, atol=1e-4)
