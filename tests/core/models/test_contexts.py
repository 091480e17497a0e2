"""Contexts of several threads and tasks on one model, against copies of the model that one thread edits alone."""

from __future__ import annotations

import asyncio
import contextvars
import copy
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import featurizers
import pytest
import torch
from featurizers import Collect, Interchange, Steer, collect, intervene
from torch import Tensor, nn

from tests.support.models import WIDTH, fresh_model, hooked, hooks_of, module_of, prompts

torch.set_num_threads(1)

SITE = "resid.post:1"
PROMPT = {"input_ids": prompts(2, 5, seed=1)}
PADDED = {
    "input_ids": prompts(2, 7, seed=2),
    "attention_mask": torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]]),
}


@pytest.fixture(params=["gpt2", "llama"])
def architecture(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def model(architecture: str) -> Iterator[nn.Module]:
    model = fresh_model(architecture).requires_grad_(False)
    yield model
    assert not hooks_of(model)
    assert "generate" not in vars(model)


def steer(delta: float, positions: list[int] | None = None) -> dict[str, Steer]:
    return {SITE: Steer(featurizers.create("identity", d_in=WIDTH), delta=delta, positions=positions)}


def edited(model: nn.Module, architecture: str, delta: float, inputs: dict[str, Tensor] = PROMPT) -> Tensor:
    """Logits of a copy of the model with a plain hook."""
    alone = copy.deepcopy(model)
    with torch.no_grad(), hooked(*module_of(alone, architecture, "resid.post", 1), lambda hidden: hidden + delta):
        return alone(**inputs).logits


def in_thread(function: Callable[[], Any]) -> Any:
    """Result of a function in a new thread, which inherits no context variables."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join()
    return results[0]


def test_two_threads_edit_one_model_each_for_itself(model, architecture):
    together, logits = threading.Barrier(2, timeout=60), {}

    def run(delta: float) -> None:
        with intervene(model, steer(delta)):
            together.wait()
            logits[delta] = model(**PROMPT).logits
            together.wait()

    threads = [threading.Thread(target=run, args=(delta,)) for delta in (1.0, -4.0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for delta in (1.0, -4.0):
        assert torch.equal(logits[delta], edited(model, architecture, delta))


def test_a_thread_that_was_running_before_is_not_edited(model, architecture):
    clean = model(**PROMPT).logits
    with ThreadPoolExecutor(1) as pool:
        pool.submit(int).result()
        with intervene(model, steer(1.0)):
            assert torch.equal(pool.submit(lambda: model(**PROMPT).logits).result(), clean)
            copied = contextvars.copy_context()
            inherited = pool.submit(copied.run, lambda: model(**PROMPT).logits).result()
    assert torch.equal(inherited, edited(model, architecture, 1.0))


def test_the_main_thread_is_not_edited_by_a_context_of_a_worker(model, architecture):
    clean, opened, done = model(**PROMPT).logits, threading.Event(), threading.Event()

    def work() -> None:
        with intervene(model, steer(1.0)):
            opened.set()
            done.wait(60)

    thread = threading.Thread(target=work)
    thread.start()
    opened.wait(60)
    found = model(**PROMPT).logits
    done.set()
    thread.join()
    assert torch.equal(found, clean)


def test_a_plain_thread_started_inside_a_context_is_edited(model, architecture):
    with intervene(model, steer(1.0)):
        found = in_thread(lambda: model(**PROMPT).logits)
        generated = in_thread(lambda: model.generate(**PROMPT, max_new_tokens=3, do_sample=False))
        assert torch.equal(generated, model.generate(**PROMPT, max_new_tokens=3, do_sample=False))
    assert torch.equal(found, edited(model, architecture, 1.0))


def test_padding_of_one_thread_is_not_that_of_another(model, architecture):
    """Both threads stop between the decoder's first hook and the site; each must then find its own padding."""
    together, logits = threading.Barrier(2, timeout=60), {}
    inputs = {"padded": PADDED, "plain": PROMPT}
    block, _ = module_of(model, architecture, "resid.post", 0)

    def run(name: str) -> None:
        with torch.no_grad(), intervene(model, steer(3.0, positions=[0])):
            logits[name] = model(**inputs[name]).logits

    threads = [threading.Thread(target=run, args=(name,)) for name in inputs]
    wanted = {}
    for name, given in inputs.items():
        with torch.no_grad(), intervene(model, steer(3.0, positions=[0])):
            wanted[name] = model(**given).logits

    def meet(*_: Any) -> None:
        together.wait()

    handle = block.register_forward_pre_hook(meet)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    handle.remove()
    for name in inputs:
        assert torch.equal(logits[name], wanted[name])


def test_a_collect_in_a_thread_does_not_end_the_passes_of_another(model, architecture):
    """A pass of the other thread begins while the hooks of `collect` are registered."""
    clean, found = model(**PROMPT).logits, []
    block, _ = module_of(model, architecture, "resid.post", 0)
    main = threading.current_thread()

    def run_another(*_: Any) -> None:
        if threading.current_thread() is main and not found:
            found.append(in_thread(lambda: model(**PADDED).logits.shape))
            found.append(in_thread(lambda: model(**PROMPT).logits))

    handle = block.register_forward_pre_hook(run_another)
    seen = collect(model, PROMPT, [SITE], positions=[0])[SITE]
    handle.remove()
    assert torch.equal(seen, collect(model, PROMPT, [SITE], positions=[0])[SITE])
    assert torch.equal(found[1], clean)


def test_tasks_edit_each_for_itself_in_any_order(model, architecture):
    async def run(delta: float, before: asyncio.Event, after: asyncio.Event) -> Tensor:
        with intervene(model, steer(delta)):
            before.set()
            await after.wait()
            logits = model(**PROMPT).logits
        return logits

    async def both() -> list[Tensor]:
        first, second = asyncio.Event(), asyncio.Event()
        return await asyncio.gather(run(1.0, first, second), run(-4.0, second, first))

    for delta, logits in zip((1.0, -4.0), asyncio.run(both()), strict=True):
        assert torch.equal(logits, edited(model, architecture, delta))


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_contexts_may_close_in_any_order(model, architecture, order):
    clean = model(**PROMPT).logits
    stacks = [ExitStack(), ExitStack()]
    for stack, delta in zip(stacks, (1.0, -4.0), strict=True):
        stack.enter_context(intervene(model, steer(delta)))
    both = edited(fresh_model(architecture), architecture, -3.0)
    torch.testing.assert_close(model(**PROMPT).logits, both, rtol=0, atol=1e-4)
    stacks[order[0]].close()
    remaining = (1.0, -4.0)[order[1]]
    assert torch.equal(model(**PROMPT).logits, edited(fresh_model(architecture), architecture, remaining))
    assert "generate" in vars(model)
    stacks[order[1]].close()
    assert "generate" not in vars(model)
    assert torch.equal(model(**PROMPT).logits, clean)
    assert torch.equal(in_thread(lambda: model(**PROMPT).logits), clean)


def test_a_context_closed_in_another_thread_is_closed(model):
    clean, stack = model(**PROMPT).logits, ExitStack()
    stack.enter_context(intervene(model, steer(1.0)))
    in_thread(stack.close)
    assert torch.equal(model(**PROMPT).logits, clean)
    with intervene(model, steer(1.0)):
        edited_again = in_thread(lambda: model(**PROMPT).logits)
    assert not torch.equal(edited_again, clean)


def test_a_source_read_in_a_thread_of_a_context_is_clean(model, architecture):
    source = {"input_ids": prompts(2, 5, seed=3)}
    f = featurizers.create("identity", d_in=WIDTH)
    wanted = collect(model, source, [SITE])[SITE]

    def swapped() -> Tensor:
        with intervene(model, {SITE: [Interchange(f, source=source), Collect(f)]}) as seen:
            model(**PROMPT)
        return seen[SITE]

    with intervene(model, steer(1.0)):
        assert torch.equal(in_thread(swapped), wanted)


def test_a_copy_of_a_model_in_a_context_is_edited_as_the_model_is(model, architecture):
    with intervene(model, steer(1.0)):
        copied = copy.deepcopy(model)
        assert torch.equal(copied(**PROMPT).logits, model(**PROMPT).logits)
        assert torch.equal(
            copied.generate(**PROMPT, max_new_tokens=3, do_sample=False),
            model.generate(**PROMPT, max_new_tokens=3, do_sample=False),
        )
