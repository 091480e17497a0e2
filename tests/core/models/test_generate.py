"""Generation under `intervene` against loops written by hand with plain hooks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import featurizers
import pytest
import torch
from featurizers import Ablate, Collect, Interchange, Steer, collect, intervene
from featurizers.errors import PositionError, ShapeError
from torch import Tensor, nn

from tests.support.models import ARCHITECTURES, WIDTH, hooked, module_of, prompts, read, tiny_model

torch.set_num_threads(1)

STEPS = 5
PROMPT = {"input_ids": prompts(2, 6, seed=1)}
SOURCE = {"input_ids": prompts(2, 6, seed=2)}
SITE = "resid.post:1"

all_architectures = pytest.mark.parametrize("architecture", ARCHITECTURES)
caches = pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no cache"])


def identity() -> featurizers.Featurizer:
    return featurizers.create("identity", d_in=WIDTH)


def generate(model: nn.Module, inputs: dict[str, Tensor] = PROMPT, **options: object) -> tuple[Tensor, Tensor]:
    """Generated tokens, and the logits that each was chosen by."""
    options = {"max_new_tokens": STEPS, "do_sample": False, **options}
    out = model.generate(**inputs, **options, return_dict_in_generate=True, output_logits=True)
    return out.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(out.logits, dim=1)


def by_hand(
    model: nn.Module,
    module: nn.Module,
    side: str,
    edit: Callable[[Tensor], Tensor],
    *,
    every_pass: bool,
    inputs: dict[str, Tensor] = PROMPT,
) -> tuple[Tensor, Tensor]:
    """The same by a greedy loop with a cache, where a plain hook edits the prompt's pass or every pass."""
    current, cache, chosen, logits = inputs["input_ids"], None, [], []
    mask = inputs.get("attention_mask", torch.ones_like(current))
    with torch.no_grad():
        for step in range(STEPS):
            position_ids = (mask.cumsum(-1) - 1).clamp_min(0)[:, -current.shape[1] :]
            with hooked(module, side, edit) if step == 0 or every_pass else nullcontext():
                out = model(
                    input_ids=current,
                    attention_mask=mask,
                    position_ids=position_ids,
                    past_key_values=cache,
                    use_cache=True,
                )
            logits.append(out.logits[:, -1].float())
            current, cache = logits[-1].argmax(-1, keepdim=True), out.past_key_values
            chosen.append(current)
            mask = torch.cat([mask, torch.ones_like(current)], dim=-1)
    return torch.cat(chosen, dim=1), torch.stack(logits, dim=1)


def assert_same(found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> None:
    torch.testing.assert_close(found[1], wanted[1], rtol=0, atol=2e-5)
    assert torch.equal(found[0], wanted[0])


def assert_differs(found: tuple[Tensor, Tensor], model: nn.Module) -> None:
    assert (found[1][:, 0] - generate(model)[1][:, 0]).abs().max() > 1e-3


@all_architectures
@pytest.mark.parametrize("positions", [[2], [-1], None], ids=["third", "last", "all"])
def test_a_patched_prompt_is_generated_from_and_no_later_token_is_patched(architecture, positions):
    model = tiny_model(architecture)
    module, side = module_of(model, architecture, "resid.post", 1)
    source = read(model, module, side, **SOURCE)
    chosen = slice(None) if positions is None else positions

    def edit(hidden: Tensor) -> Tensor:
        hidden = hidden.clone()
        hidden[:, chosen] = source[:, chosen]
        return hidden

    with intervene(model, {SITE: Interchange(identity(), source=SOURCE, positions=positions)}):
        found = generate(model)
    assert_differs(found, model)
    assert_same(found, by_hand(model, module, side, edit, every_pass=False))


@all_architectures
@pytest.mark.parametrize("kind", ["attn.out", "resid.pre"])
def test_steering_at_a_position_touches_the_prompt_alone(architecture, kind):
    model = tiny_model(architecture)
    module, side = module_of(model, architecture, kind, 0)
    delta = torch.randn(WIDTH, generator=torch.Generator().manual_seed(0))

    def edit(hidden: Tensor) -> Tensor:
        hidden = hidden.clone()
        hidden[:, -1] += delta
        return hidden

    with intervene(model, {f"{kind}:0": Steer(identity(), delta=delta, positions=[-1])}):
        found = generate(model)
    assert_differs(found, model)
    assert_same(found, by_hand(model, module, side, edit, every_pass=False))


@all_architectures
@pytest.mark.parametrize("operation", ["steer", "ablate"])
def test_an_edit_of_every_token_goes_on_while_generating(architecture, operation):
    model = tiny_model(architecture)
    module, side = module_of(model, architecture, "resid.post", 1)
    delta = torch.randn(WIDTH, generator=torch.Generator().manual_seed(0))
    todo, edit = {
        "steer": (Steer(identity(), delta=delta), lambda hidden: hidden + delta),
        "ablate": (
            Ablate(identity(), value=2.0, indices=[1, 5]),
            lambda hidden: hidden.index_fill(-1, torch.tensor([1, 5]), 2.0),
        ),
    }[operation]
    with intervene(model, {SITE: todo}):
        found = generate(model)
    assert_differs(found, model)
    assert_same(found, by_hand(model, module, side, edit, every_pass=True))


@all_architectures
@pytest.mark.parametrize("positions", [None, [1]], ids=["all", "second"])
def test_the_cache_makes_no_difference_to_steering(architecture, positions):
    model = tiny_model(architecture)
    delta = torch.randn(WIDTH, generator=torch.Generator().manual_seed(0))
    with intervene(model, {SITE: Steer(identity(), delta=delta, positions=positions)}):
        assert_same(generate(model, use_cache=False), generate(model, use_cache=True))


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gemma3"])
def test_the_cache_makes_no_difference_to_an_interchange_at_positions_from_the_start(architecture):
    model = tiny_model(architecture)
    with intervene(model, {SITE: Interchange(identity(), source=SOURCE, positions=[0, 4])}):
        assert_same(generate(model, use_cache=False), generate(model, use_cache=True))


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_the_cache_makes_no_difference_to_positions_from_the_end(architecture):
    model = tiny_model(architecture)
    with intervene(model, {SITE: Interchange(identity(), source=SOURCE, positions=[-1])}):
        assert_same(generate(model, use_cache=False), generate(model, use_cache=True))


def test_the_cache_makes_no_difference_to_an_interchange_of_the_whole_prompt():
    model = tiny_model("llama")
    with intervene(model, {SITE: Interchange(identity(), source=SOURCE)}):
        assert_same(generate(model, use_cache=False), generate(model, use_cache=True))


@caches
@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gemma3"])
def test_collect_without_positions_keeps_the_prompt_and_all_tokens_that_were_fed_back(architecture, use_cache):
    model = tiny_model(architecture)
    with intervene(model, {SITE: Collect(identity())}) as seen:
        tokens, _ = generate(model, use_cache=use_cache)
    whole = torch.cat([PROMPT["input_ids"], tokens[:, :-1]], dim=1)
    wanted = collect(model, {"input_ids": whole}, [SITE])[SITE]
    torch.testing.assert_close(seen[SITE], wanted, rtol=0, atol=5e-5)


def test_collect_at_positions_keeps_the_prompt_alone():
    model = tiny_model("llama")
    with intervene(model, {SITE: Collect(identity(), positions=[-1, 0])}) as seen:
        generate(model)
    assert torch.equal(seen[SITE], collect(model, PROMPT, [SITE], positions=[-1, 0])[SITE])


def test_collect_sees_the_edits_of_every_step_before_it_in_the_list():
    model = tiny_model("llama")
    with intervene(model, {SITE: [Ablate(identity(), value=1.5), Collect(identity())]}) as seen:
        generate(model)
    assert torch.equal(seen[SITE], torch.full((2, 6 + STEPS - 1, WIDTH), 1.5))


def test_a_second_prompt_in_the_same_context_starts_afresh():
    model = tiny_model("llama")
    swap = Interchange(identity(), source=SOURCE, positions=[-1])
    with intervene(model, {SITE: [swap, Collect(identity())]}) as seen:
        first = generate(model)
        kept = seen[SITE]
        assert_same(generate(model), first)
    assert kept.shape == (2, 6 + STEPS - 1, WIDTH)
    assert torch.equal(seen[SITE], kept)


def _left_padded() -> tuple[dict[str, Tensor], list[Tensor]]:
    tokens = [prompts(3, seed=5), prompts(6, seed=6)]
    ids, mask = torch.zeros(2, 6, dtype=torch.long), torch.zeros(2, 6, dtype=torch.long)
    for row, prompt in enumerate(tokens):
        ids[row, -len(prompt) :], mask[row, -len(prompt) :] = prompt, 1
    return {"input_ids": ids, "attention_mask": mask}, tokens


@all_architectures
def test_a_left_padded_batch_is_generated_from_as_its_prompts_one_by_one(architecture):
    model = tiny_model(architecture)
    inputs, tokens = _left_padded()
    module, side = module_of(model, architecture, "resid.post", 1)
    source = torch.randn(2, 2, WIDTH, generator=torch.Generator().manual_seed(1))

    def edit(hidden: Tensor) -> Tensor:
        hidden = hidden.clone()
        hidden[0, 3], hidden[0, 5], hidden[1, 0], hidden[1, 5] = source[0, 0], source[0, 1], source[1, 0], source[1, 1]
        return hidden

    with intervene(model, {SITE: Interchange(identity(), source=source, positions=[0, -1])}):
        batched = generate(model, inputs)
    assert_same(batched, by_hand(model, module, side, edit, every_pass=False, inputs=inputs))
    for row, prompt in enumerate(tokens):
        with intervene(model, {SITE: Interchange(identity(), source=source[row : row + 1], positions=[0, -1])}):
            alone = generate(model, {"input_ids": prompt.unsqueeze(0)})
        assert_same((batched[0][row], batched[1][row]), (alone[0][0], alone[1][0]))


def test_beams_need_a_source_for_each():
    model = tiny_model("llama")
    beams = {"num_beams": 2, "max_new_tokens": 3, "do_sample": False}
    with (
        intervene(model, {SITE: Interchange(identity(), source=SOURCE, positions=[-1])}),
        pytest.raises(ShapeError, match=r"\(2, 1, 32\).*\(4, 1, 32\).*repeat the source"),
    ):
        model.generate(**PROMPT, **beams)
    source = collect(model, SOURCE, [SITE], positions=[-1])[SITE]
    with intervene(model, {SITE: Interchange(identity(), source=source.repeat_interleave(2, 0), positions=[-1])}):
        together = model.generate(**PROMPT, **beams)
    for row in range(2):  # one example stands for all its beams
        with intervene(model, {SITE: Interchange(identity(), source=source[row : row + 1], positions=[-1])}):
            alone = model.generate(PROMPT["input_ids"][row : row + 1], **beams)
        assert torch.equal(alone[0], together[row])


class TestACacheFromOutside:
    """The context began after the prompt's first tokens had been computed."""

    @staticmethod
    def continued(architecture: str = "llama") -> tuple[nn.Module, dict]:
        model, ids = tiny_model(architecture), prompts(2, 6, seed=1)
        with torch.no_grad():
            cache = model(input_ids=ids[:, :4], use_cache=True).past_key_values
        return model, {"input_ids": ids[:, 4:], "past_key_values": cache}

    @pytest.mark.parametrize(
        "operation",
        [
            lambda: Interchange(identity(), source=SOURCE, positions=[-1]),
            lambda: Interchange(identity(), source=torch.zeros(2, 2, WIDTH)),
            lambda: Steer(identity(), delta=1.0, positions=[0]),
            lambda: Collect(identity(), positions=[0]),
        ],
        ids=["interchange at a position", "interchange of all", "steer", "collect"],
    )
    @pytest.mark.parametrize("architecture", ["gpt2", "llama", "gemma3"])
    def test_positions_of_the_prompt_are_refused(self, architecture, operation):
        model, rest = self.continued(architecture)
        with intervene(model, {SITE: operation()}), pytest.raises(PositionError, match="in a cache already"):
            model(**rest)

    def test_an_edit_of_every_token_needs_no_prompt(self):
        model, rest = self.continued()
        module, side = module_of(model, "llama", "resid.post", 1)
        with torch.no_grad(), hooked(module, side, lambda hidden: hidden + 1):
            wanted = model(**rest).logits
        model, rest = self.continued()
        with torch.no_grad(), intervene(model, {SITE: Steer(identity(), delta=1.0)}):
            assert torch.equal(model(**rest).logits, wanted)


def test_a_loop_written_by_hand_inside_the_context_is_edited_as_generate_is():
    model = tiny_model("llama")
    module, side = module_of(model, "llama", "resid.post", 1)
    swap = Interchange(identity(), source=SOURCE, positions=[-1])
    with intervene(model, {SITE: swap}):
        wanted = generate(model)
        found = by_hand(model, module, side, lambda hidden: hidden, every_pass=False)
    assert_same(found, wanted)


def test_a_static_cache_takes_edits_of_every_token():
    model = tiny_model("llama")
    with intervene(model, {SITE: Steer(identity(), delta=1.0)}):
        assert_same(generate(model, cache_implementation="static"), generate(model))


def test_a_static_cache_finds_the_padding_that_generate_sees_by_the_padding_token():
    model, delta = tiny_model("llama"), torch.linspace(-9, 9, WIDTH)
    ids = PROMPT["input_ids"].clone()
    ids[ids == 0] = 1
    ids[0, -2:] = 0  # padding on the right, so that the last token is not in the last column
    given = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    with intervene(model, {SITE: Steer(identity(), delta=delta, positions=[-1])}):
        wanted = generate(model, given)
        assert_same(generate(model, {"input_ids": ids}, cache_implementation="static", pad_token_id=0), wanted)
    assert not torch.allclose(generate(model, given)[1], wanted[1])


@pytest.mark.parametrize("positions", [[-1], None])
def test_a_prompt_computed_in_chunks_is_refused_where_its_end_matters(positions):
    model = tiny_model("llama")
    swap = Interchange(identity(), source=SOURCE, positions=positions)
    with intervene(model, {SITE: swap}), pytest.raises(PositionError, match="prefill_chunk_size"):
        generate(model, prefill_chunk_size=4)
    with intervene(model, {SITE: Steer(identity(), delta=1.0)}):
        assert_same(generate(model, prefill_chunk_size=4), generate(model))


def test_generate_is_the_models_own_again_after_the_context():
    model = tiny_model("llama")
    with intervene(model, {SITE: Steer(identity(), delta=1.0)}):
        assert "generate" in vars(model)
        with intervene(model, {SITE: Steer(identity(), delta=1.0)}):
            generate(model)
        assert "generate" in vars(model)
    assert "generate" not in vars(model)


def test_a_text_that_begins_with_the_first_token_alone_is_that_of_a_prompt_of_one_token():
    model, delta = tiny_model("llama"), torch.linspace(-2, 2, WIDTH)
    options = {"max_new_tokens": STEPS, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad(), intervene(model, {SITE: Steer(identity(), delta=delta)}):
        wanted = model.generate(torch.tensor([[1]]), **options)
        assert torch.equal(model.generate(bos_token_id=1, **options), wanted)
    with torch.no_grad():
        assert not torch.equal(model.generate(torch.tensor([[1]]), **options), wanted)
