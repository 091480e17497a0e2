"""Positions count a prompt's own tokens, wherever its padding is."""

from __future__ import annotations

import featurizers
import pytest
import torch
from featurizers import Ablate, Collect, Interchange, Steer, collect, intervene
from featurizers.errors import PositionError
from featurizers.models.positions import Pass, columns
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.support.models import ARCHITECTURES, WIDTH, hooked, module_of, prompts, read, tiny_model

torch.set_num_threads(1)

LENGTHS = (3, 6, 4)
TOTAL = max(LENGTHS)
TOKENS = [prompts(length, seed=length) for length in LENGTHS]
PAD = 0

sides = pytest.mark.parametrize("side", ["left", "right"])
all_architectures = pytest.mark.parametrize("architecture", ARCHITECTURES)


def _first(side: str, row: int) -> int:
    """Column of the first token of a prompt."""
    return TOTAL - LENGTHS[row] if side == "left" else 0


def _padded(side: str, tokens: list[Tensor] = TOKENS) -> dict[str, Tensor]:
    """The prompts as one batch; the position ids are those that each prompt has on its own."""
    ids, mask, position_ids = (torch.full((len(tokens), TOTAL), PAD) for _ in range(3))
    for row, prompt in enumerate(tokens):
        own = slice(_first(side, row), _first(side, row) + len(prompt))
        ids[row, own], mask[row, own], position_ids[row, own] = prompt, 1, torch.arange(len(prompt))
    return {"input_ids": ids, "attention_mask": mask, "position_ids": position_ids}


def _own(batched: Tensor, side: str, row: int) -> Tensor:
    return batched[row, _first(side, row) : _first(side, row) + LENGTHS[row]]


@sides
@all_architectures
def test_a_prompt_in_a_padded_batch_is_edited_as_on_its_own(architecture, side):
    model = tiny_model(architecture)
    module, module_side = module_of(model, architecture, "resid.post", 1)
    source = torch.randn(3, 2, WIDTH, generator=torch.Generator().manual_seed(0))
    f = featurizers.create("identity", d_in=WIDTH)
    with torch.no_grad(), intervene(model, {"resid.post:1": Interchange(f, source=source, positions=[1, -1])}):
        batched = model(**_padded(side)).logits
    for row, tokens in enumerate(TOKENS):

        def edit(hidden: Tensor, row: int = row) -> Tensor:
            hidden = hidden.clone()
            hidden[0, 1], hidden[0, LENGTHS[row] - 1] = source[row]
            return hidden

        with torch.no_grad(), hooked(module, module_side, edit):
            alone = model(input_ids=tokens.unsqueeze(0)).logits[0]
        torch.testing.assert_close(_own(batched, side, row), alone, rtol=0, atol=2e-5)


@sides
@all_architectures
@pytest.mark.parametrize("kind", ["attn.out", "resid.pre"])
def test_an_edit_of_a_padded_batch_is_that_of_a_plain_hook_at_columns_counted_by_hand(architecture, side, kind):
    model = tiny_model(architecture)
    module, module_side = module_of(model, architecture, kind, 1)
    f = featurizers.create("identity", d_in=WIDTH)

    def edit(hidden: Tensor) -> Tensor:
        hidden = hidden.clone()
        for row, length in enumerate(LENGTHS):
            for position in (0, length - 2):
                hidden[row, _first(side, row) + position] = 0
        return hidden

    with torch.no_grad(), hooked(module, module_side, edit):
        wanted = model(**_padded(side)).logits
    with torch.no_grad(), intervene(model, {f"{kind}:1": Ablate(f, positions=[0, -2])}):
        assert torch.equal(model(**_padded(side)).logits, wanted)


@sides
@pytest.mark.parametrize("architecture", ["gpt2", "gemma2", "smollm3"])
def test_collect_reads_the_tokens_of_each_prompt(architecture, side):
    model = tiny_model(architecture)
    batched = collect(model, _padded(side), ["mlp.act:1"], positions=[0, 2, -1])["mlp.act:1"]
    for row, tokens in enumerate(TOKENS):
        alone = collect(model, {"input_ids": tokens.unsqueeze(0)}, ["mlp.act:1"])["mlp.act:1"][0]
        torch.testing.assert_close(batched[row], alone[[0, 2, LENGTHS[row] - 1]], rtol=0, atol=2e-5)


@sides
def test_a_source_may_be_padded_on_the_other_side_and_read_at_other_positions(side):
    model = tiny_model("llama")
    other = "left" if side == "right" else "right"
    swapped = [prompts(length, seed=10 + length) for length in LENGTHS]
    f = featurizers.create("identity", d_in=WIDTH)
    swap = Interchange(f, source=_padded(other, swapped), positions=[-1], source_positions=[1])
    with torch.no_grad(), intervene(model, {"resid.post:2": swap}):
        batched = model(**_padded(side)).logits
    for row, tokens in enumerate(swapped):
        with torch.no_grad():
            wanted = model(input_ids=tokens.unsqueeze(0)).logits[0, 1]
        torch.testing.assert_close(_own(batched, side, row)[-1], wanted, rtol=0, atol=2e-5)


@sides
@pytest.mark.parametrize(
    "form", [list, torch.tensor, lambda rows: tuple(map(tuple, rows))], ids=["list", "tensor", "tuple"]
)
def test_each_example_may_have_its_own_positions(side, form):
    model, wanted = tiny_model("gpt2"), [[2, 0], [-1, -6], [1, 3]]
    found = collect(model, _padded(side), ["resid.post:1"], positions=form(wanted))["resid.post:1"]
    module, module_side = module_of(model, "gpt2", "resid.post", 1)
    everything = read(model, module, module_side, **_padded(side))
    for row, positions in enumerate(wanted):
        assert torch.equal(found[row], _own(everything, side, row)[positions])


def test_positions_keep_the_order_in_which_they_are_given():
    inputs = {"input_ids": prompts(2, 5)}
    whole = collect(tiny_model("llama"), inputs, ["embed"])["embed"]
    assert torch.equal(
        collect(tiny_model("llama"), inputs, ["embed"], positions=[3, -5, 1])["embed"], whole[:, [3, 0, 1]]
    )


def test_without_a_mask_every_column_is_a_token():
    inputs = {"input_ids": torch.full((2, 4), PAD)}
    assert collect(tiny_model("llama"), inputs, ["embed"], positions=[3])["embed"].shape == (2, 1, WIDTH)


def test_all_positions_include_the_padding():
    assert collect(tiny_model("llama"), _padded("left"), ["embed"])["embed"].shape == (3, TOTAL, WIDTH)


def test_a_mask_of_booleans_or_floats_does_as_well():
    inputs = _padded("left")
    wanted = collect(tiny_model("llama"), inputs, ["embed"], positions=[0])["embed"]
    for dtype in (torch.bool, torch.float32, torch.int32):
        cast = {**inputs, "attention_mask": inputs["attention_mask"].to(dtype)}
        assert torch.equal(collect(tiny_model("llama"), cast, ["embed"], positions=[0])["embed"], wanted)


@pytest.mark.parametrize("position", [3, -4, 5, -7])
@sides
def test_a_position_beyond_the_prompt_is_refused_though_padding_is_there(side, position):
    with pytest.raises(PositionError, match=rf"position {position} is not in prompt 0, which has 3 tokens"):
        collect(tiny_model("llama"), _padded(side), ["embed"], positions=[position])


def test_the_prompt_that_is_too_short_is_named():
    with pytest.raises(PositionError, match="position 4 is not in prompt 2, which has 4 tokens"):
        collect(tiny_model("llama"), _padded("left"), ["embed"], positions=[[0], [5], [4]])


def test_a_prompt_of_padding_alone_has_no_position():
    inputs = _padded("left")
    inputs["attention_mask"][1] = 0
    with pytest.raises(PositionError, match="prompt 1, which has 0 tokens"):
        collect(tiny_model("llama"), inputs, ["embed"], positions=[-1])


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        ([[0], [1]], "given for 2 examples, but the batch has 3"),
        ([[0]], "given for 1 examples, but the batch has 3"),
        ([0.0], "list of integers"),
        ([], "list of integers"),
        ([True, False], "list of integers"),
        (1, "list of integers"),
        (torch.zeros(3, 1, 1, dtype=torch.long), "list of integers"),
        ([[0], [1, 2], [0]], "list of integers"),
        (["last"], "list of integers"),
    ],
)
def test_positions_of_the_wrong_form_are_refused(positions, message):
    with pytest.raises(PositionError, match=message):
        collect(tiny_model("llama"), _padded("left"), ["embed"], positions=positions)
    f = featurizers.create("identity", d_in=WIDTH)
    with (
        intervene(tiny_model("llama"), {"embed": Steer(f, delta=1.0, positions=positions)}),
        pytest.raises(PositionError, match=message),
    ):
        tiny_model("llama")(**_padded("left"))


def test_a_four_dimensional_mask_hides_the_padding_so_positions_are_refused():
    model = tiny_model("llama")
    ids = prompts(2, 4)
    causal = torch.ones(4, 4, dtype=torch.bool).tril().expand(2, 1, 4, 4)
    inputs = {"input_ids": ids, "attention_mask": causal}
    with pytest.raises(PositionError, match="two-dimensional mask"):
        collect(model, inputs, ["resid.post:1"], positions=[-1])
    torch.testing.assert_close(
        collect(model, inputs, ["resid.post:1"])["resid.post:1"],
        collect(model, {"input_ids": ids}, ["resid.post:1"])["resid.post:1"],
    )


def test_positions_are_found_when_the_mask_is_given_by_position():
    decoder = tiny_model("llama").get_submodule("model")
    padded = _padded("left")
    f = featurizers.create("identity", d_in=WIDTH)
    with torch.no_grad(), intervene(decoder, {"embed": Collect(f, positions=[0])}) as seen:
        decoder(padded["input_ids"], padded["attention_mask"])
    assert torch.equal(seen["embed"], collect(decoder, padded, ["embed"], positions=[0])["embed"])


def test_the_mask_is_that_of_the_latest_pass():
    model = tiny_model("llama")
    f = featurizers.create("identity", d_in=WIDTH)
    with torch.no_grad(), intervene(model, {"embed": Collect(f, positions=[0])}) as seen:
        for side in ("left", "right"):
            model(**_padded(side))
            wanted = torch.stack(
                [
                    _own(read(model, *module_of(model, "llama", "embed"), **_padded(side)), side, row)[:1]
                    for row in range(3)
                ]
            )
            assert torch.equal(seen["embed"], wanted)
        model(input_ids=prompts(1, 2))
        assert seen["embed"].shape == (1, 1, WIDTH)


@given(data=st.data())
def test_columns_are_those_of_the_tokens_by_a_plain_reference(data):
    batch, length = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 6))
    row = st.lists(st.booleans(), min_size=length, max_size=length)
    mask = data.draw(st.lists(row, min_size=batch, max_size=batch))
    shared = data.draw(st.booleans())
    size = data.draw(st.integers(1, 2))
    few = st.lists(st.integers(-length - 1, length), min_size=size, max_size=size)
    positions = data.draw(few if shared else st.lists(few, min_size=batch, max_size=batch))
    current = Pass(0, 1, torch.tensor(mask).long())

    wanted: list[list[int]] | None = []
    for example, real in enumerate(mask):
        tokens = [column for column, is_token in enumerate(real) if is_token]
        own = positions if shared else positions[example]
        if any(not -len(tokens) <= position < len(tokens) for position in own):
            wanted = None
            break
        wanted.append([tokens[position] for position in own])

    if wanted is None:
        with pytest.raises(PositionError):
            columns(positions, torch.zeros(batch, length, 1), current)
    else:
        assert columns(positions, torch.zeros(batch, length, 1), current).tolist() == wanted


def test_columns_are_made_once_a_pass_and_follow_the_activations():
    current = Pass()
    first = columns([-1], torch.zeros(2, 4, 3), current)
    assert columns([3], torch.zeros(2, 4, 7), current) is first
    assert columns([-1], torch.zeros(2, 5, 3), current).tolist() == [[4], [4]]
    assert columns([-1], torch.zeros(1, 4, 3), current).tolist() == [[3]]
    with torch.inference_mode():
        assert not columns([3], torch.zeros(2, 4, 7), Pass()).requires_grad
        assert columns([3], torch.zeros(2, 4, 7), current) is not first
