"""The bank of a site against `Program.apply`, which is compared with the operations in the core's own tests."""

from __future__ import annotations

from typing import Any

import featurizers
import numpy as np
import pytest
import torch
from featurizers import Ablate, Interchange, Mask, Program, Site, Steer
from featurizers_vllm.admission import Edit, in_single
from featurizers_vllm.bank import Bank
from featurizers_vllm.rows import Rows
from torch import Tensor

from tests.support.serving import WIDTH, made

PLACE = Site("resid.post", 1)
SPECIAL = 7


def featurizer(name: str) -> Any:
    return made(torch.Generator().manual_seed(0))[name]


def programs() -> dict[str, Program]:
    source = torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(5))
    operations = {
        "relu": Ablate(featurizer("relu"), value=torch.tensor([1.0, 2.0, 0.0]), indices=[3, 1, 5]),
        "jumprelu": Ablate(featurizer("jumprelu"), indices=[0, 1, 2, 3]),
        "gated": Interchange(featurizer("gated"), source=source, indices=[9, 30]),
        "topk": Steer(featurizer("topk"), delta=torch.tensor([3.0, -3.0]), indices=[5, 6]),
        "subspace": Mask(featurizer("subspace"), source=source, gate=torch.tensor([0.0, 0.3, 1.0, 0.5])),
    }
    return {name: in_single(featurizers.lower(operation)) for name, operation in operations.items()}


def edit(name: str, stage: int = 0, **changes: Any) -> Edit:
    given = {"positions": None, "prompt_only": False, "special_tokens": (), **changes}
    return Edit(PLACE, stage, name, programs()[name], **given)


def bank(**changes: Any) -> Bank:
    sizes = {"features": 6, "requests": 4, "tokens": 64, "stages": 2, **changes}
    return Bank(WIDTH, **sizes)


def rows(**changes: Any) -> Rows:
    return Rows({PLACE: bank(**changes)}, changes.get("requests", 4))


def fill(held: Rows, lengths: list[int], *, order: list[int] | None = None, begin: list[int] | None = None) -> Tensor:
    """Tell of a pass of requests of these lengths; return the ids of its tokens."""
    starts = np.concatenate([[0], np.cumsum(lengths)])
    firsts = begin or [0] * len(lengths)
    positions = torch.cat([torch.arange(first, first + n) for first, n in zip(firsts, lengths, strict=True)])
    tokens = torch.arange(len(positions)) % 10
    held.fill(np.array(order or range(len(lengths))), starts, positions, tokens)
    return tokens


def stream(n: int, seed: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, WIDTH, generator=generator), torch.randn(n, WIDTH, generator=generator) * 3


def edited(held: Rows, hidden: Tensor, residual: Tensor | None) -> Tensor:
    given = held.banks[PLACE](hidden, residual)
    return given if residual is None else given + residual


@pytest.mark.parametrize("whole", [False, True])
def test_each_token_of_a_batch_is_edited_as_its_own_request_asks(whole):
    held, names = rows(requests=8), list(programs())
    for number, name in enumerate(names):
        held.add(number + 1, [edit(name)], 9)  # number 0 is not edited
    lengths = [3, 4, 1, 5, 2, 6]
    fill(held, lengths)
    hidden, residual = stream(sum(lengths))
    x = hidden if whole else hidden + residual
    found = edited(held, hidden, None if whole else residual).split(lengths)
    assert torch.equal(found[0], x.split(lengths)[0])
    for name, part, before in zip(names, found[1:], x.split(lengths)[1:], strict=True):
        wanted = programs()[name].apply(before)
        assert (wanted - before).abs().max() > 0.1
        torch.testing.assert_close(part, wanted, atol=2e-5, rtol=1e-5)


def test_a_second_operation_sees_the_first_ones_result():
    held = rows()
    held.add(0, [edit("relu"), edit("subspace", 1)], 3)
    fill(held, [3])
    hidden, residual = stream(3)
    wanted = programs()["subspace"].apply(programs()["relu"].apply(hidden + residual))
    torch.testing.assert_close(edited(held, hidden, residual), wanted, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_tokens_without_an_edit_keep_every_bit(dtype):
    held = rows()
    held.add(1, [edit("relu"), edit("gated", 1)], 4)
    fill(held, [5, 3, 2])
    hidden, residual = (part.to(dtype) for part in stream(64))
    found = held.banks[PLACE](hidden, residual)
    assert found.dtype == dtype
    clean = [*range(5), *range(8, 64)]  # the last are the padding of a batch
    assert torch.equal(found[clean], hidden[clean])
    assert not torch.equal(found[5:8], hidden[5:8])


def test_a_token_that_is_not_finite_stays_in_its_own_request():
    held = rows()
    held.add(0, [edit("relu")], 1)
    fill(held, [1, 1])
    hidden, residual = stream(2)
    hidden[1] = torch.nan
    torch.testing.assert_close(
        edited(held, hidden, residual)[:1], programs()["relu"].apply(hidden + residual)[:1], atol=2e-5, rtol=1e-5
    )


@pytest.mark.parametrize("chunks", [[11], [4, 4, 3], [1] * 11])
def test_positions_are_those_of_the_prompt_however_it_is_cut(chunks):
    held = rows()
    held.add(2, [edit("relu", positions=(0, -1, 5))], 11)
    changed, begin = [], 0
    for size in [*chunks, 1, 1]:  # two generated tokens
        fill(held, [2, size], order=[0, 2], begin=[7, begin])
        hidden, residual = stream(2 + size)
        difference = (held.banks[PLACE](hidden, residual) != hidden).any(-1)
        assert not difference[:2].any()
        changed += [begin + int(i) for i in difference[2:].nonzero()]
        begin += size
    assert changed == [0, 5, 10]


def test_a_source_acts_on_the_prompt_alone():
    held = rows()
    held.add(0, [edit("relu", prompt_only=True)], 4)
    fill(held, [3], begin=[2])
    hidden, residual = stream(3)
    assert (held.banks[PLACE](hidden, residual) != hidden).any(-1).tolist() == [True, True, False]


def test_special_tokens_are_left_alone_at_any_position():
    held = rows()
    held.add(
        0, [edit("relu", special_tokens=(SPECIAL,)), edit("topk", 1, special_tokens=(SPECIAL,), positions=(7,))], 9
    )
    tokens = fill(held, [20])
    hidden, residual = stream(20)
    assert torch.equal((held.banks[PLACE](hidden, residual) != hidden).any(-1), tokens != SPECIAL)


def test_equal_edits_share_rows_until_the_last_one_goes():
    held = rows()
    for number in range(3):
        held.add(number, [edit("relu")], 3)
    assert held.banks[PLACE].slots == 1
    held.remove(0)
    held.remove(1)
    fill(held, [3], order=[2])
    hidden, residual = stream(3)
    wanted = programs()["relu"].apply(hidden + residual)
    torch.testing.assert_close(edited(held, hidden, residual), wanted, atol=2e-5, rtol=1e-5)
    held.remove(2)
    assert held.banks[PLACE].slots == 0
    assert (held.banks[PLACE].owner < 0).all()


def test_a_full_batch_of_the_largest_edits_always_fits():
    """Requests come and go at random for a long time; each is edited as alone, and the rows never run out."""
    generator = torch.Generator().manual_seed(9)
    f, held, now = featurizer("relu"), rows(), {}
    for turn in range(60):
        number = int(torch.randint(4, (1,), generator=generator))
        picks = torch.randperm(40, generator=generator)[: int(torch.randint(1, 7, (1,), generator=generator))]
        program = in_single(featurizers.lower(Ablate(f, value=2.0, indices=picks)))
        if turn % 3:
            held.add(number, [Edit(PLACE, turn % 2, f"{turn}", program, None, False, ())], 5)
            now[number] = program
        else:
            held.remove(number)
            now.pop(number, None)
        fill(held, [2] * 4)
        hidden, residual = stream(8, turn)
        for place, (part, before) in enumerate(
            zip(edited(held, hidden, residual).split(2), (hidden + residual).split(2), strict=True)
        ):
            wanted = now[place].apply(before) if place in now else before
            torch.testing.assert_close(part, wanted, atol=2e-5, rtol=1e-5)


def test_requests_that_move_and_swap_take_their_edits_along():
    held = rows()
    held.add(0, [edit("relu")], 3)
    held.add(2, [edit("topk")], 3)
    held.swap(0, 1)  # relu at 1
    held.swap(1, 2)  # topk at 1, relu at 2
    held.add(3, [edit("gated")], 3)
    held.move(2, 3)  # gated goes, relu at 3
    assert held.edited == (1, 3)
    assert held.banks[PLACE].slots == 2
    fill(held, [2] * 4)
    hidden, residual = stream(8)
    found = edited(held, hidden, residual).split(2)
    for place, part, before in zip(range(4), found, (hidden + residual).split(2), strict=True):
        wanted = {1: programs()["topk"].apply, 3: programs()["relu"].apply}.get(place, lambda x: x)(before)
        torch.testing.assert_close(part, wanted, atol=2e-5, rtol=1e-5)


def test_a_later_pass_is_not_edited_where_an_earlier_one_was():
    held = rows()
    held.add(1, [edit("relu")], 3)
    fill(held, [2, 30])
    fill(held, [1, 1])
    hidden, residual = stream(32)
    assert (held.banks[PLACE](hidden, residual) != hidden).any(-1).nonzero().tolist() == [[1]]
    held.remove(1)
    fill(held, [1, 1])
    assert torch.equal(held.banks[PLACE](hidden, residual), hidden)
    assert (held.banks[PLACE].slot < 0).all()


def test_padding_is_left_alone_where_every_slot_is_taken():
    held = rows()
    for number, name in enumerate(("relu", "jumprelu", "gated", "topk")):
        held.add(number, [edit(name)], 2)
    fill(held, [2] * 4)
    hidden, residual = stream(11)
    changed = (held.banks[PLACE](hidden, residual) != hidden).any(-1)
    assert changed.tolist() == [True] * 8 + [False] * 3


@pytest.mark.parametrize("sizes", [{"features": 2, "requests": 2}, {"features": 6, "requests": 1}])
def test_a_bank_that_is_full_says_so_and_keeps_what_it_has(sizes):
    """Four rows for edits of three and of two, and a slot for two edits."""
    held = rows(**sizes)
    held.add(0, [edit("relu")], 2)
    with pytest.raises(RuntimeError, match="the bank is full"):
        held.banks[PLACE].acquire(0, "gated", programs()["gated"])
    fill(held, [2])
    hidden, residual = stream(2)
    wanted = programs()["relu"].apply(hidden + residual)
    torch.testing.assert_close(edited(held, hidden, residual), wanted, atol=2e-5, rtol=1e-5)


def test_a_bank_adds_nothing_to_the_weights_of_the_model():
    assert not bank().state_dict()
    assert not list(bank().parameters())


def test_a_program_in_double_precision_is_served_in_single():
    wide = featurizers.lower(Ablate(featurizer("jumprelu").double(), indices=[0, 1]))
    assert wide.rows.read.dtype == torch.float64
    program = in_single(wide)
    gate = program.rows.gate
    assert gate is not None
    parts = [program.constant, program.factor, program.rows.read, program.rows.bias, program.rows.write]
    parts += [gate.threshold, gate.slope, gate.offset, gate.floor]
    assert {part.dtype for part in parts} == {torch.float32}
    x = torch.randn(9, WIDTH, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(program.apply(x), wide.apply(x.double()).float(), atol=1e-5, rtol=1e-5)


def test_a_bank_is_one_graph_for_every_batch():
    """A compiled or captured pass sees the tensors alone, so nothing in it may depend on what they hold."""
    held, graphs = rows(), []

    def counted(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(held.banks[PLACE], backend=counted, fullgraph=True, dynamic=True)
    compiled(*stream(4))
    held.add(0, [edit("relu")], 3)
    for tokens in (3, 5):
        fill(held, [tokens])
        assert torch.equal(compiled(*stream(tokens)), held.banks[PLACE](*stream(tokens)))
    assert len(graphs) == 1
