"""`featurizers.prepare`: what `intervene` does, looked up once."""

from __future__ import annotations

import threading
from typing import Any

import featurizers
import pytest
import torch
from featurizers import Collect, Interchange, Steer
from featurizers.errors import UsageError
from torch import Tensor, nn

from tests.support.models import WIDTH, fresh_model, hooked, hooks_of, module_of, prompts, read, tiny_model

SITE = "resid.post:1"
IDS, OTHER = prompts(2, 6, seed=1), prompts(2, 6, seed=2)


def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


def swapped(model: nn.Module, source: Tensor) -> Tensor:
    """Return the logits with the last token's activations replaced by a plain hook."""

    def edit(hidden: Tensor) -> Tensor:
        return torch.cat([hidden[:, :-1], source], dim=1)

    with hooked(*module_of(model, "gpt2", "resid.post", 1), edit):
        return logits(model)


def source_of(model: nn.Module, ids: Tensor) -> Tensor:
    return read(model, *module_of(model, "gpt2", "resid.post", 1), input_ids=ids)[:, -1:]


def interchange(source: Any) -> Interchange:
    return Interchange(featurizers.create("identity", d_in=WIDTH), source=source, positions=[-1])


def test_every_entry_edits_as_a_plain_hook_and_leaves_the_model_as_it_was() -> None:
    model = tiny_model("gpt2")
    clean, hooks = logits(model), hooks_of(model)
    edit = featurizers.prepare(model, {SITE: interchange({"input_ids": OTHER})})
    expected = swapped(model, source_of(model, OTHER))
    for _ in range(3):
        assert hooks_of(model) == hooks
        assert torch.equal(logits(model), clean)
        with edit:
            assert torch.equal(logits(model), expected)


def test_the_sources_are_read_once_and_replaced_on_demand() -> None:
    model = fresh_model("gpt2")
    calls: list[int] = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    edit = featurizers.prepare(model, {SITE: interchange({"input_ids": OTHER})})
    assert len(calls) == 1
    with edit, edit:
        pass
    assert len(calls) == 1
    third = prompts(2, 6, seed=3)
    edit.sources({"input_ids": third})
    assert len(calls) == 2
    with edit:
        found = logits(model)
    assert torch.equal(found, swapped(model, source_of(model, third)))
    edit.sources(activations := torch.ones(2, 1, WIDTH))
    with edit:
        found = logits(model)
    assert torch.equal(found, swapped(model, activations))


def test_sources_follow_weights_that_changed() -> None:
    model = fresh_model("gpt2")
    edit = featurizers.prepare(model, {SITE: interchange({"input_ids": OTHER})})
    with torch.no_grad():
        next(model.parameters()).mul_(2.0)
    edit.sources()
    with edit:
        found = logits(model)
    assert torch.equal(found, swapped(model, source_of(model, OTHER)))


def test_each_entry_has_results_of_its_own() -> None:
    model = tiny_model("gpt2")
    edit = featurizers.prepare(model, {SITE: Collect(featurizers.create("identity", d_in=WIDTH), positions=[-1])})
    with edit as first:
        logits(model)
    with edit as second:
        logits(model, OTHER)
    assert torch.equal(first[SITE], source_of(model, IDS))
    assert torch.equal(second[SITE], source_of(model, OTHER))


def test_an_entry_within_itself_edits_twice() -> None:
    model = tiny_model("gpt2")
    edit = featurizers.prepare(model, {SITE: Steer(featurizers.create("identity", d_in=WIDTH), delta=1.5)})
    with hooked(*module_of(model, "gpt2", "resid.post", 1), lambda hidden: hidden + 1.5 + 1.5):
        expected = logits(model)
    with edit:
        with edit:
            assert torch.equal(logits(model), expected)
        assert not torch.equal(logits(model), expected)


def test_threads_enter_it_each_for_themselves() -> None:
    model = tiny_model("gpt2")
    clean = logits(model)
    edit = featurizers.prepare(model, {SITE: interchange(torch.ones(2, 1, WIDTH))})
    expected, found = swapped(model, torch.ones(2, 1, WIDTH)), []
    entered, left = threading.Event(), threading.Event()

    def other() -> None:
        with edit:
            entered.set()
            left.wait(60)
            found.append(logits(model))

    thread = threading.Thread(target=other)
    thread.start()
    entered.wait(60)
    with edit:
        found.append(logits(model))
    found.append(logits(model))
    left.set()
    thread.join()
    assert [torch.equal(each, wanted) for each, wanted in zip(found, [expected, clean, expected], strict=True)] == [
        True
    ] * 3


def test_a_module_that_was_replaced_is_refused() -> None:
    model: Any = fresh_model("gpt2")
    edit = featurizers.prepare(model, {SITE: interchange(torch.ones(2, 1, WIDTH))})
    model.transformer.h[1] = fresh_model("gpt2").transformer.h[1]
    with pytest.raises(UsageError, match=r"'transformer\.h\.1' was replaced.*prepare again"), edit:
        pass


def test_an_end_in_another_thread_is_refused() -> None:
    edit = featurizers.prepare(tiny_model("gpt2"), {SITE: interchange(torch.ones(2, 1, WIDTH))})
    with pytest.raises(UsageError, match="ends in the thread that entered it"):
        edit.__exit__(None, None, None)
