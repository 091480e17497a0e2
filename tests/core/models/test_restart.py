"""Runs from the middle of a model, compared with whole runs."""

import pytest
import torch
from featurizers import Site
from featurizers.models import (
    Anatomy,
    cache_argument,
    empty_cache,
    first_tensor,
    head_of,
    hook,
    is_keys,
    last_clean_block,
    restarted,
    takes,
    takes_cache,
    without_cache,
    wrap_like,
)
from torch import nn

from tests.support.models import ARCHITECTURES, LAYERS, fresh_model, module_of, prompts, tiny_model


def outputs_of_blocks(model, ids):
    """What each block returns in a whole run, and the logits."""
    seen = []
    blocks = Anatomy(model).layers
    handles = [block.register_forward_hook(lambda _, __, output: seen.append(output)) for block in blocks]
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
    for handle in handles:
        handle.remove()
    return blocks, seen, logits


@pytest.mark.parametrize("keep_rest", [True, False])
@pytest.mark.parametrize("start", range(-1, LAYERS))
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_run_from_the_middle_is_the_whole_run(architecture, start, keep_rest):
    model, ids = fresh_model(architecture), prompts(2, 6)
    blocks, seen, logits = outputs_of_blocks(model, ids)
    wraps = [wrap_like(output, keep_rest=keep_rest) for output in seen]
    ran = [block.mlp.register_forward_hook(lambda m, *_: mlps.append(m)) for block in blocks]
    mlps: list[nn.Module] = []
    with torch.no_grad(), restarted(blocks, start, first_tensor(seen[start]), wraps):
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, logits)
    assert mlps == [block.mlp for block in blocks[start + 1 :]]
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, logits)
    assert mlps[LAYERS - start - 1 :] == [block.mlp for block in blocks]
    assert all("forward" not in vars(block) for block in blocks)
    assert len(ran) == LAYERS


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradients_go_through_the_later_blocks(architecture):
    model, ids = fresh_model(architecture).requires_grad_(False), prompts(1, 5)
    blocks, seen, _ = outputs_of_blocks(model, ids)
    gradients = []
    for restart in (True, False):
        hidden = first_tensor(seen[1]).clone().requires_grad_()
        if restart:
            with restarted(blocks, 1, hidden, wrap_like(seen[1])):
                logits = model(input_ids=ids, use_cache=False).logits
        else:
            handle = hook(Anatomy(model).place("resid.post:1"), lambda _, hidden=hidden: hidden)
            logits = model(input_ids=ids, use_cache=False).logits
            handle.remove()
        gradients += torch.autograd.grad(logits.square().sum(), hidden)
    assert torch.allclose(*gradients, rtol=1e-5)


def test_hooks_of_blocks_that_are_skipped_run():
    model, ids = fresh_model("gpt2"), prompts(1, 4)
    blocks, seen, _ = outputs_of_blocks(model, ids)
    handle = hook(Anatomy(model).place("resid.post:1"), lambda hidden: 2 * hidden)
    with torch.no_grad():
        edited = model(input_ids=ids).logits
        with restarted(blocks, 1, first_tensor(seen[1]), wrap_like(seen[1])):
            assert torch.equal(model(input_ids=ids).logits, edited)
    handle.remove()


def test_a_forward_that_was_replaced_is_restored_however_the_block_ends():
    blocks = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])

    def mine(x: torch.Tensor) -> torch.Tensor:
        return x + 1

    blocks[0].forward = mine

    def run(error: Exception) -> None:
        with restarted(blocks, 1, torch.zeros(2), wrap_like(torch.zeros(2))):
            assert blocks[0](torch.zeros(2)).sum() == 0
            raise error

    with pytest.raises(KeyError):
        run(KeyError())
    assert blocks[0].forward is mine
    assert "forward" not in vars(blocks[1])


def test_activations_are_put_into_the_form_of_the_output():
    hidden, more = torch.zeros(1), torch.ones(1)
    assert wrap_like(more)(hidden) is hidden
    assert wrap_like((more, more, None))(hidden) == (hidden, None, None)
    assert wrap_like((more, more, None), keep_rest=True)(hidden) == (hidden, more, None)
    block = nn.ModuleList([nn.Identity()])
    with restarted(block, 0, hidden, lambda x: {"hidden": x}):
        assert block[0](more) == {"hidden": hidden}


@pytest.mark.parametrize(
    ("site", "block"),
    [
        ("resid.pre:1", 0),
        ("resid.post:1", 1),
        ("attn.out:1", 0),
        ("mlp.act:0", -1),
        ("norm.out", LAYERS - 1),
        ("embed", -1),
        ("module:model.layers.1:output", 1),
        ("module:model.layers.1:input", 0),
        ("module:model.layers.1.mlp:output", 0),
        ("module:model.layers:output", -1),
        ("module:lm_head:input", -1),
    ],
)
def test_the_last_block_that_an_edit_leaves_unchanged(site, block):
    assert last_clean_block(Anatomy(tiny_model("llama")), Site.parse(site)) == block


def test_a_model_without_blocks_has_no_clean_block():
    assert last_clean_block(Anatomy(nn.Sequential(nn.Linear(2, 2))), Site.parse("module:0:output")) == -1


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_cache_continues_a_prompt(architecture):
    model, ids = tiny_model(architecture), prompts(1, 6)
    assert takes_cache(model)
    assert takes(model, "input_ids")
    assert not takes(model, "nothing")
    assert without_cache(model) == {"use_cache": False}
    cache = empty_cache()
    with torch.no_grad():
        whole = model(input_ids=ids).logits[:, 3:]
        model(input_ids=ids[:, :3], use_cache=True, **cache_argument(model, cache))
        assert len(cache.layers) == LAYERS
        assert all(is_keys(layer) for layer in cache.layers)
        rest = model(input_ids=ids[:, 3:], use_cache=True, **cache_argument(model, cache)).logits
    assert torch.allclose(rest, whole, atol=1e-4)
    assert cache_argument(model, None) == {}
    assert head_of(model) is model.get_output_embeddings()


def test_what_has_no_cache_and_no_head():
    module = nn.Linear(2, 2)
    assert not takes_cache(module)
    assert without_cache(module) == {}
    assert head_of(module) is None
    assert head_of(tiny_model("llama").model) is None
    assert not is_keys(module)
    assert module_of(tiny_model("llama"), "llama", "norm.out")[1] == "output"
