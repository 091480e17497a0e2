"""Caches from outside, caches of linear attention and of states, against plain hooks in loops written by hand."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import featurizers
import pytest
import torch
from featurizers import Collect, Interchange, Steer, collect, intervene
from featurizers.errors import PositionError
from featurizers.models import takes
from featurizers.models.caches import CacheLog
from torch import Tensor, nn

from tests.support.models import WIDTH, hooked, prompts, tiny_model
from tests.support.unusual_models import mamba, minimax

torch.set_num_threads(1)

PROMPT = prompts(2, 6, seed=1)
STEPS = 4

LINEAR_FIRST = partial(minimax, ["linear_attention", "full_attention"])
LINEAR_ONLY = partial(minimax, ["linear_attention", "linear_attention"])
FULL_FIRST = partial(minimax, ["full_attention", "linear_attention"])
MODELS = {
    "linear first": (LINEAR_FIRST, "model.layers.0"),
    "linear only": (LINEAR_ONLY, "model.layers.0"),
    "full first": (FULL_FIRST, "model.layers.0"),
    "mamba": (partial(mamba, 1), "backbone.layers.0"),
    "mamba2": (partial(mamba, 2), "backbone.layers.0"),
    "llama": (partial(tiny_model, "llama"), "model.layers.0"),
}

every_model = pytest.mark.parametrize("name", MODELS)


def model_and_site(name: str) -> tuple[nn.Module, str, str]:
    make, path = MODELS[name]
    return make().requires_grad_(False), path, f"module:{path}:output"


NAMES = ("cache", "past_key_values", "cache_params")  # the first came with transformers 5.24


def cache_of(output: Any) -> Any:
    """The cache that a model returned."""
    return next(output[name] for name in NAMES if output.get(name) is not None)


def filled(model: nn.Module, tokens: Tensor) -> Any:
    """The cache after a run on tokens."""
    return cache_of(model(tokens, use_cache=True))


def continuing(model: nn.Module, cache: Any) -> dict[str, Any]:
    """The argument that makes a run go on from a cache."""
    return {next(name for name in NAMES if takes(model, name)): cache}


def identity() -> featurizers.Featurizer:
    return featurizers.create("identity", d_in=WIDTH)


def steered(positions: list[int] | None, site: str) -> dict[str, Steer]:
    return {site: Steer(identity(), delta=2.0, positions=positions)}


def loop(model: nn.Module, around: Callable[[int], object] | None = None) -> Tensor:
    """Logits of a greedy loop with a cache; the first is made by the model itself."""
    current, cache, logits = PROMPT, None, []
    for step in range(STEPS):
        kwargs = continuing(model, cache) if cache is not None else {}
        if takes(model, "position_ids"):  # MiniMax counts wrongly itself
            kwargs["position_ids"] = torch.arange(step and 5 + step, 6 + step).unsqueeze(0)
        with torch.no_grad(), around(step) if around else torch.no_grad():
            out = model(current, use_cache=True, **kwargs)
        cache = cache_of(out)
        logits.append(out.logits[:, -1])
        current = logits[-1].argmax(-1, keepdim=True)
    return torch.stack(logits)


def generated(model: nn.Module) -> Tensor:
    options = {"max_new_tokens": STEPS, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    return torch.stack(model.generate(PROMPT, **options).logits)


@every_model
@pytest.mark.parametrize("positions", [[-1], [0], None])
def test_a_loop_by_hand_and_generate_are_edited_as_by_a_hook(name, positions):
    model, path, site = model_and_site(name)
    columns = slice(None) if positions is None else positions

    def around(step: int) -> object:
        def edit(hidden: Tensor) -> Tensor:
            if positions is not None and step:
                return hidden
            hidden = hidden.clone()
            hidden[:, columns] += 2.0
            return hidden

        return hooked(model.get_submodule(path), "output", edit)

    wanted = loop(model, around)
    assert (wanted - loop(model)).abs().max() > 1e-2
    with intervene(model, steered(positions, site)):
        torch.testing.assert_close(loop(model), wanted, rtol=0, atol=1e-4)
        torch.testing.assert_close(generated(model), wanted, rtol=0, atol=1e-4)


@every_model
def test_collect_keeps_all_tokens_that_were_fed(name):
    model, path, site = model_and_site(name)
    passes: list[Tensor] = []

    def keep(hidden: Tensor) -> Tensor:
        passes.append(hidden.clone())
        return hidden

    with hooked(model.get_submodule(path), "output", keep):
        loop(model)
    for run in (loop, generated):
        with intervene(model, {site: Collect(identity())}) as seen:
            run(model)
        torch.testing.assert_close(seen[site], torch.cat(passes, dim=1), rtol=0, atol=1e-4)


@every_model
@pytest.mark.parametrize("earlier", ["none", "another prompt", "another context"])
def test_positions_of_a_prompt_in_a_cache_from_outside_are_refused(name, earlier):
    model, _, site = model_and_site(name)
    if earlier == "another context":
        with torch.no_grad(), intervene(model, steered([0], site)):
            cache = filled(model, PROMPT)
    else:
        with torch.no_grad():
            cache = filled(model, PROMPT)
    with torch.no_grad(), intervene(model, steered([0], site)):
        if earlier == "another prompt":
            model(PROMPT, use_cache=True)
        with pytest.raises(PositionError, match="in a cache already"):
            model(PROMPT[:, :1], **continuing(model, cache))


def test_a_context_inside_another_does_not_take_the_cache_of_the_outer_for_its_own():
    model, _, site = model_and_site("llama")
    with torch.no_grad(), intervene(model, steered([0], site)):
        cache = filled(model, PROMPT)
        with intervene(model, steered([1], site)), pytest.raises(PositionError, match="in a cache already"):
            model(PROMPT[:, :1], **continuing(model, cache))
        model(PROMPT[:, :1], **continuing(model, filled(model, PROMPT)))


def test_two_caches_in_turn_are_each_edited_at_its_own_prompt():
    model, path, site = model_and_site("llama")
    tokens = {0: PROMPT, 1: prompts(2, 4, seed=7)}
    steps = prompts(2, 1, seed=8)

    def in_turn() -> list[Tensor]:
        with torch.no_grad():
            caches = [filled(model, tokens[number]) for number in (0, 1)]
            return [model(steps, **continuing(model, cache)).logits for cache in caches]

    def edit(hidden: Tensor) -> Tensor:
        return hidden if hidden.shape[1] == 1 else torch.cat([hidden[:, :-1], hidden[:, -1:] + 2.0], dim=1)

    with hooked(model.get_submodule(path), "output", edit):
        wanted = in_turn()
    with intervene(model, steered([-1], site)):
        found = in_turn()
    assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))


def test_a_source_whose_prompt_is_in_a_cache_is_refused_at_positions():
    model, _, site = model_and_site("llama")
    with torch.no_grad():
        cache = filled(model, PROMPT)
    source = {"input_ids": PROMPT[:, :2], "past_key_values": cache}
    with pytest.raises(PositionError, match="in a cache already"):
        collect(model, source, [site], positions=[0])
    swap = Interchange(identity(), source=source, positions=[0])
    with pytest.raises(PositionError, match="in a cache already"), intervene(model, {site: swap}):
        pass


def test_a_reset_cache_begins_again():
    model, _, _ = model_and_site("mamba")
    log = CacheLog()
    with torch.no_grad():
        cache = filled(model, PROMPT)
    assert log.start(cache) == 1  # some tokens, whose number is not known
    log.add(cache, 6, 3)
    assert (log.start(cache), log.began(cache)) == (6, 3)
    cache.reset()
    assert log.start(cache) == 0
