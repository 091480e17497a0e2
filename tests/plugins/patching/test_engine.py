"""The engine against plain torch hooks, a cell at a time."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from typing import Any

import featurizers
import pytest
import torch
from featurizers import Anatomy, Site
from featurizers_patching.engine.advance import advance
from featurizers_patching.engine.cells import Cells
from featurizers_patching.engine.clean import CleanRun
from featurizers_patching.engine.spots import spot_of
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tests.support.decoders import decoder, without_its_softcap
from tests.support.models import fresh_model, tiny_model
from tests.support.patching import ARCHITECTURES, Pairs, activations, has_interface, packable, plain_hook, put, sites_of

BASE = [[5, 9, 3, 7, 11, 2], [8, 1, 4, 6]]
EAGER = ("gemma2",)  # their attention weights are rounded to float32
SOURCE = [[6, 2, 14, 3, 9, 7], [3, 12, 5, 1]]


def single_cells(pairs: Pairs, step: int = 1, start: int = 0) -> list[tuple[int, list[tuple[int, int]]]]:
    """Return cells of one edit each, every so many of all sites and tokens."""
    every = [
        (pair, [(site, token)])
        for site in range(len(pairs.sites))
        for pair, tokens in enumerate(pairs.base)
        for token in range(len(tokens))
    ]
    return every[start::step]


def without_warnings(run: Callable[[], Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return run()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_gives_what_plain_hooks_give(name: str) -> None:
    model = packable(name)
    sites = [site for site in sites_of(name, model) if site.kind != "resid.mid"]
    pairs = Pairs(model, BASE, SOURCE, sites)
    cells = single_cells(pairs, step=13, start=len(name) % 13)
    if has_interface(model):
        logits, report = without_warnings(lambda: pairs.run(cells, verify=0))
    else:
        with pytest.warns(UserWarning, match="has no attention that goes through transformers' interface"):
            logits, report = pairs.run(cells, verify=0)
    assert report.packed == has_interface(model)
    for found, (pair, [(site, token)]) in zip(logits, cells, strict=True):
        atol = 1e-4 if found.dtype == torch.float32 else 1e-6 if name in EAGER else 1e-10
        torch.testing.assert_close(found, pairs.expected(pair, site, [token]), rtol=0, atol=atol)


@pytest.mark.parametrize("rows", [3, 20, 2048])
def test_chunks_of_any_size_give_the_same(rows: int) -> None:
    pairs = Pairs(packable("gpt2"), BASE, SOURCE, sites_of("gpt2", packable("gpt2")))
    cells = single_cells(pairs, step=4)
    logits, report = pairs.run(cells, rows=rows, verify=6)
    assert (report.packed, report.verified) == (True, 6)
    for found, (pair, [(site, token)]) in list(zip(logits, cells, strict=True))[:: 2 if rows == 20 else 9]:
        if pairs.sites[site].kind != "resid.mid":
            torch.testing.assert_close(found, pairs.expected(pair, site, [token]), rtol=0, atol=1e-10)


def test_single_precision_equals_plain_hooks_to_rounding() -> None:
    model = tiny_model("llama").requires_grad_(False)
    pairs = Pairs(model, BASE, SOURCE, ["resid.pre:0", "mlp.out:1"])
    cells = single_cells(pairs)
    logits, _ = pairs.run(cells)
    for found, (pair, [(site, token)]) in zip(logits, cells, strict=True):
        torch.testing.assert_close(found, pairs.expected(pair, site, [token]), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
def test_the_middle_of_a_block_is_what_intervene_edits(name: str) -> None:
    model = packable(name)
    sites = [Site("resid.mid", block) for block in range(3)]
    pairs = Pairs(model, BASE, SOURCE, sites)
    cells = single_cells(pairs)
    logits, _ = pairs.run(cells, verify=0)
    f = featurizers.create("identity")
    for found, (pair, [(site, token)]) in zip(logits, cells, strict=True):
        swap = featurizers.Interchange(f, source={"input_ids": torch.tensor([SOURCE[pair]])}, positions=[token])
        with featurizers.intervene(model, {sites[site]: swap}):
            torch.testing.assert_close(found, pairs.logits(pair), rtol=0, atol=1e-6)


@pytest.mark.parametrize("module", ["self_attn.q_proj", "self_attn.v_proj", "input_layernorm", "mlp.gate_proj"])
@pytest.mark.parametrize("side", ["input", "output"])
def test_modules_before_and_after_attention_may_be_sites(module: str, side: str) -> None:
    model = packable("llama")
    pairs = Pairs(model, BASE, SOURCE, [f"module:model.layers.{block}.{module}:{side}" for block in range(3)])
    cells = single_cells(pairs)
    logits, report = without_warnings(lambda: pairs.run(cells))
    assert report.packed
    for found, (pair, [(site, token)]) in zip(logits, cells, strict=True):
        torch.testing.assert_close(found, pairs.expected(pair, site, [token]), rtol=0, atol=1e-10)


def test_a_cell_may_edit_several_tokens_and_sites() -> None:
    model = packable("qwen3")
    pairs = Pairs(
        model, BASE, SOURCE, ["resid.pre:1", "mlp.out:0", "attn.z:1:2", "attn.z:1:3", "resid.post:2", "embed"]
    )
    edits = [
        [(0, 4), (0, 2)],  # a span, in any order
        [(0, token) for token in range(6)],  # all tokens
        [(1, 4), (0, 1)],  # a later block at an earlier token
        [(2, 2), (3, 2), (2, 5)],  # two heads of one module
        [(5, 1), (4, 5)],  # the first and the last
        [(1, 1), (1, 4)],  # tokens between the edited ones change in the next block
    ]
    logits, report = without_warnings(lambda: pairs.run([(0, each) for each in edits], verify=6))
    assert report.verified == 6
    values = [activations(model, SOURCE[0], site) for site in pairs.sites]
    for found, each in zip(logits, edits, strict=True):
        by_site: dict[int, list[int]] = {}
        for site, token in each:
            by_site.setdefault(site, []).append(token)
        hooks = [plain_hook(model, pairs.sites[site], put(tokens, values[site])) for site, tokens in by_site.items()]
        for hook in hooks:
            hook.__enter__()
        torch.testing.assert_close(found, pairs.logits(0), rtol=0, atol=1e-10)
        for hook in hooks:
            hook.__exit__(None, None, None)


@pytest.mark.parametrize("freeze", [("mlp.out",), ("attn.out",), ("attn.out", "mlp.out")])
@pytest.mark.parametrize("name", ["gemma2", "gpt_neox"])
def test_frozen_modules_give_what_they_gave_before(name: str, freeze: tuple[str, ...]) -> None:
    model = packable(name)
    sites = [
        f"{kind}:{block}" for block in range(3) for kind in ("resid.pre", "attn.out", "mlp.out", "attn.z", "mlp.act")
    ]
    pairs = Pairs(model, BASE, SOURCE, sites)
    cells = [cell for cell in single_cells(pairs) if cell[0] == 0]
    logits, report = without_warnings(lambda: pairs.run(cells, freeze=freeze, verify=8))
    assert report.packed
    clean = {(kind, block): activations(model, BASE[0], f"{kind}:{block}") for kind in freeze for block in range(3)}
    inside = {"attn.z": "attn.out", "mlp.act": "mlp.out", "attn.out": "attn.out", "mlp.out": "mlp.out"}
    moved = 0.0
    for found, (_, [(number, token)]) in list(zip(logits, cells, strict=True))[::7]:
        site = pairs.sites[number]
        hooks = []
        for (kind, block), values in clean.items():
            if block >= site.layer:
                own = (kind, block) == (inside.get(site.kind), site.layer)
                hooks.append(
                    plain_hook(model, f"{kind}:{block}", put([t for t in range(6) if not (own and t == token)], values))
                )
        hooks.append(plain_hook(model, site, put([token], activations(model, SOURCE[0], site))))
        for hook in hooks:
            hook.__enter__()
        torch.testing.assert_close(found, pairs.logits(0), rtol=0, atol=1e-6)
        for hook in hooks:
            hook.__exit__(None, None, None)
        moved = max(moved, float((found - pairs.logits(0)).abs().max()))
    assert moved > 1e-3


@pytest.mark.parametrize("token", [1, 4])
def test_the_attention_that_an_edit_is_inside_of_is_not_frozen(token: int) -> None:
    model = packable("llama")
    site = "module:model.layers.1.self_attn.v_proj:output"
    pairs = Pairs(model, BASE[:1], SOURCE[:1], [site])
    logits, report = without_warnings(lambda: pairs.run([(0, [(0, token)])], freeze=("attn.out",)))
    assert report.verified == 1
    clean = put(range(6), activations(model, BASE[0], "attn.out:2"))  # of the block after it alone
    with plain_hook(model, "attn.out:2", clean):
        torch.testing.assert_close(logits[0], pairs.expected(0, 0, [token]), rtol=0, atol=1e-10)


def test_frozen_attention_patterns_are_those_of_the_clean_run() -> None:
    model = packable("gpt2")
    pairs = Pairs(model, BASE[:1], SOURCE[:1], ["resid.pre:1"])
    logits, _ = pairs.run([(0, [(0, 2)])], freeze=("attn.pattern",))
    # the same by hand: eager attention whose weights are multiplied anew with the values of the edited run
    again = decoder("gpt2", torch.float64, attn_implementation="eager").requires_grad_(False)
    with torch.no_grad():
        clean = again(torch.tensor(BASE[:1]), output_attentions=True).attentions
    values: dict[int, Tensor] = {}
    handles = []
    for block, layer in enumerate(again.transformer.h):

        def keep_values(_: Any, __: Any, output: Tensor, block: int = block) -> None:
            values[block] = output[..., 64:].view(1, 6, 4, 8).transpose(1, 2)

        def under_clean(_: Any, args: Any, block: int = block) -> Any:
            return ((clean[block] @ values[block]).transpose(1, 2).reshape(1, 6, 32),)

        handles.append(layer.attn.c_attn.register_forward_hook(keep_values))
        if block >= 1:
            handles.append(layer.attn.c_proj.register_forward_pre_hook(under_clean))
    with plain_hook(again, "resid.pre:1", put([2], activations(model, SOURCE[0], "resid.pre:1"))), torch.no_grad():
        expected = again(torch.tensor(BASE[:1])).logits[0, pairs.at[0]]
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(logits[0], expected, rtol=0, atol=1e-6)
    assert not torch.allclose(expected, pairs.expected(0, 0, [2]))


@pytest.mark.parametrize("block", [0, 2])
def test_the_last_norm_and_the_block_before_it_may_be_edited_alone_and_together(block: int) -> None:
    model = packable("gpt2")
    pairs = Pairs(model, BASE, SOURCE, ["norm.out", f"mlp.act:{block}"])
    cells = [(0, [(0, 5)]), (1, [(1, 3)]), (0, [(1, 3), (0, 5)]), (1, [(0, 2)])]
    logits, report = without_warnings(lambda: pairs.run(cells))
    assert report.packed
    torch.testing.assert_close(logits[0], pairs.expected(0, 0, [5]), rtol=0, atol=1e-10)
    torch.testing.assert_close(logits[1], pairs.expected(1, 1, [3]), rtol=0, atol=1e-10)
    torch.testing.assert_close(logits[3], pairs.logits(1), rtol=0, atol=1e-10)  # not a token that is read
    with plain_hook(model, "norm.out", put([5], activations(model, SOURCE[0], "norm.out"))):
        torch.testing.assert_close(logits[2], pairs.expected(0, 1, [3]), rtol=0, atol=1e-10)


def test_gradients_reach_what_the_edits_return() -> None:
    model = packable("llama")
    pairs = Pairs(model, BASE[:1], SOURCE[:1], ["resid.pre:1"])
    clean = CleanRun(model, Anatomy(model), pairs.prompts)
    value = torch.randn(1, 32, dtype=torch.float64, requires_grad=True)
    cells = Cells.of([0], [0], [0], [2])
    logits = advance(clean, cells, [spot_of(clean.anatomy, "resid.pre:1")], [lambda base, _: value])
    (grad,) = torch.autograd.grad(logits[0, 0, 7], value)
    with plain_hook(model, "resid.pre:1", lambda hidden: hidden.index_copy(1, torch.tensor([2]), value.unsqueeze(0))):
        expected = model(torch.tensor(BASE[:1]), use_cache=False).logits[0, -1, 7]
    torch.testing.assert_close(grad, torch.autograd.grad(expected, value)[0], rtol=0, atol=1e-10)


def state(model: nn.Module) -> list[Any]:
    """Return what a run could leave behind on a model."""
    modules = [
        (id(module), sorted(vars(module)), len(module._forward_hooks), len(module._forward_pre_hooks))
        for module in model.modules()
    ]
    return [modules, model.config._attn_implementation]  # type: ignore[union-attr]


def test_an_exception_leaves_the_model_as_it_was() -> None:
    model = fresh_model("gpt2").requires_grad_(False)
    pairs = Pairs(model, BASE, SOURCE, ["resid.pre:1", "mlp.act:2"])
    before, clean = state(model), pairs.logits(0)

    def fail(*_: Any) -> Tensor:
        raise KeyboardInterrupt

    run = CleanRun(model, Anatomy(model), pairs.prompts)
    spots = [spot_of(run.anatomy, site) for site in pairs.sites]
    for number in range(2):
        with pytest.raises(KeyboardInterrupt):
            advance(run, Cells.of([0], [0], [number], [5]), spots, [fail, fail])
        assert state(model) == before
    assert torch.equal(pairs.logits(0), clean)


def test_other_threads_run_the_model_as_it_is_meanwhile() -> None:
    model = fresh_model("llama").requires_grad_(False)
    pairs = Pairs(model, BASE, SOURCE, ["resid.pre:0", "mlp.out:1", "mlp.act:2", "norm.out"])
    clean = pairs.logits(0)
    seen: list[Tensor] = []

    def elsewhere() -> None:
        thread = threading.Thread(target=lambda: seen.append(pairs.logits(0)))
        thread.start()
        thread.join()

    run = CleanRun(model, Anatomy(model), pairs.prompts)
    spots = [spot_of(run.anatomy, site) for site in pairs.sites]

    def edit(base: Tensor, _: Any) -> Tensor:
        elsewhere()  # while hooks, stand-ins and the attention of the run are in place
        return base + 1

    logits = advance(run, Cells.of([0], [0] * 4, range(4), [5] * 4), spots, [edit] * 4)
    assert len(seen) == 4
    assert not torch.allclose(logits[0, 0], clean[0], atol=1e-2)
    for each in seen:
        torch.testing.assert_close(each, clean, rtol=0, atol=1e-5)


def test_two_threads_patch_one_model_at_once() -> None:
    model = fresh_model("gpt2").requires_grad_(False).double()
    pairs = Pairs(model, BASE, SOURCE, ["resid.pre:0", "mlp.out:1"])
    cells = single_cells(pairs)
    expected, _ = pairs.run(cells)
    found: list[Tensor] = []
    threads = [
        threading.Thread(target=lambda rows=rows: found.append(pairs.run(cells, rows=rows)[0])) for rows in (4, 9)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for each in found:
        torch.testing.assert_close(each, expected, rtol=0, atol=1e-10)
    assert model.config._attn_implementation in ALL_ATTENTION_FUNCTIONS


def test_a_softcap_that_the_attention_leaves_out_is_left_out_of_every_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    model = without_its_softcap(monkeypatch).requires_grad_(False)
    pairs = Pairs(model, BASE, SOURCE, ["resid.pre:0", "mlp.out:1"])
    cells = single_cells(pairs)
    with pytest.warns(UserWarning, match=r"sdpa attention leaves out the softcap; load it with attn_imp.*='eager'"):
        logits, report = pairs.run(cells, verify=0)
    assert not report.packed
    for found, (pair, [(site, token)]) in zip(logits, cells, strict=True):
        torch.testing.assert_close(found, pairs.expected(pair, site, [token]), rtol=0, atol=1e-10)


class Shifted(nn.Module):
    """A module that mixes tokens where attention is not looked for: it adds a part of the token before."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x + 0.5 * nn.functional.pad(x, (0, 0, 1, 0))[:, :-1])


def test_a_model_that_mixes_tokens_beside_attention_is_run_whole_and_says_so() -> None:
    model = fresh_model("gpt2").double().requires_grad_(False)
    for block in model.transformer.h:
        block.mlp = Shifted(block.mlp)
    pairs = Pairs(model, BASE, SOURCE, ["resid.pre:0", "resid.pre:1"])
    cells = single_cells(pairs)
    with pytest.warns(UserWarning, match="cannot be patched on packed rows .*differ from") as caught:
        logits, report = pairs.run(cells)
    assert len(caught) == 1
    assert not report.packed
    for found, (pair, [(site, token)]) in zip(logits, cells, strict=True):
        torch.testing.assert_close(found, pairs.expected(pair, site, [token]), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["gpt_neo", "bloom", "bidirectional", "mamba"])
def test_models_without_the_interface_are_run_whole_and_say_so(name: str) -> None:
    from transformers import BloomConfig, BloomForCausalLM

    from tests.support.unusual_models import mamba

    if name == "bidirectional":  # attention that sees later tokens
        model = fresh_model("llama").double()
        for layer in model.model.layers:
            layer.self_attn.is_causal = False
        model.model.config.is_causal = False
    elif name == "bloom":
        model = BloomForCausalLM(BloomConfig(hidden_size=32, n_layer=3, n_head=4, vocab_size=48)).eval().double()
    else:
        model = mamba() if name == "mamba" else fresh_model(name).double()
    model.requires_grad_(False)
    pairs = Pairs(model, BASE, SOURCE, ["resid.pre:0", "resid.post:1"])
    cells = single_cells(pairs, step=3)
    with pytest.warns(UserWarning, match="cannot be patched on packed rows") as caught:
        logits, report = pairs.run(cells, rows=20)
    assert len([each for each in caught if "packed rows" in str(each.message)]) == 1
    assert not report.packed
    for found, (pair, [(site, token)]) in zip(logits, cells, strict=True):
        torch.testing.assert_close(found, pairs.expected(pair, site, [token]), rtol=1e-4, atol=1e-5)


def test_memory_that_runs_out_halves_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    from featurizers_patching.engine import sweep

    pairs = Pairs(packable("gpt2"), BASE, SOURCE, ["resid.pre:0", "mlp.out:1"])
    cells = single_cells(pairs)
    expected, _ = pairs.run(cells)

    def small(clean: CleanRun, cells: Cells, *args: Any, **kwargs: Any) -> Tensor:
        if len(cells) > 3:
            raise torch.OutOfMemoryError("out of memory")
        return advance(clean, cells, *args, **kwargs)

    monkeypatch.setattr(sweep, "advance", small)
    logits, report = pairs.run(cells, rows=64)
    assert (report.packed, report.batch_rows < 64) == (True, True)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-10)


def rows_of_calls(
    pairs: Pairs, cells: list[tuple[int, list[tuple[int, int]]]], rows: int, module: str = "transformer.h.1.mlp"
) -> tuple[list[int], Tensor]:
    """Return how many tokens a module sees in each call after the clean run, and the cells' logits."""
    seen: list[int] = []
    handle = pairs.model.get_submodule(module).register_forward_pre_hook(
        lambda _, args: seen.append(args[0][..., 0].numel())
    )
    logits, _ = pairs.run(cells, rows=rows, verify=0)
    handle.remove()
    return seen[1:], logits


def test_last_tokens_of_many_pairs_fill_the_chunks() -> None:
    torch.manual_seed(0)
    base, source = (torch.randint(0, 48, (24, 7)).tolist() for _ in range(2))
    pairs = Pairs(packable("gpt2"), base, source, ["resid.pre:0", "resid.pre:1"])
    cells = [(pair, [(site, 6)]) for site in range(2) for pair in range(24)]  # one row each
    seen, logits = rows_of_calls(pairs, cells, rows=16)
    assert seen == [16, 16, 16]
    torch.testing.assert_close(logits[29], pairs.expected(5, 1, [6]), rtol=0, atol=1e-10)
    mixed = [(pair, [(site, token)]) for site in range(2) for pair in range(24) for token in (2, 6)]
    seen, logits = rows_of_calls(pairs, mixed, rows=40)  # of 5 rows and of one
    assert max(seen) <= 40
    assert sum(seen) == 2 * 24 * (5 + 1)
    assert len(seen) <= 9
    torch.testing.assert_close(logits[2 * 29], pairs.expected(5, 1, [2]), rtol=0, atol=1e-10)


def test_keys_and_values_of_long_prompts_bound_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    from featurizers_patching.engine import sweep

    base, source = [[1, 2, 3, 4, 5, 6, 7]] * 6, [[8, 9, 10, 11, 12, 13, 14]] * 6
    pairs = Pairs(packable("gpt2"), base, source, ["resid.pre:0"])
    width = pairs.model.config.n_embd
    monkeypatch.setattr(sweep, "MOST_NUMBERS", 2 * 2 * 7 * width)  # keys and values of two cells
    seen, _ = rows_of_calls(pairs, [(pair, [(0, 6)]) for pair in range(6)], rows=1024)
    assert seen == [2, 2, 2]


def test_an_edit_of_the_last_block_runs_the_tokens_that_are_edited_or_read() -> None:
    pairs = Pairs(packable("gpt2"), [[1, 2, 3, 4, 5, 6, 7]], [[8, 9, 10, 11, 12, 13, 14]], ["resid.pre:2"])
    cells = [(0, [(0, 1)]), (0, [(0, 5)])]  # the tokens 4 and 6 are read
    seen, logits = rows_of_calls(pairs, cells, 1024, "transformer.h.2.attn.c_attn")
    assert seen == [3 + 2]
    seen, _ = rows_of_calls(pairs, cells, 1024, "transformer.h.2.mlp.c_fc")
    assert seen == [2 + 1]
    for found, (pair, [(site, token)]) in zip(logits, cells, strict=True):
        torch.testing.assert_close(found, pairs.expected(pair, site, [token]), rtol=0, atol=1e-10)


def test_a_stream_that_something_changes_between_blocks_is_run_whole() -> None:
    model = fresh_model("llama").double().requires_grad_(False)
    doubled = model.model.layers[1].register_forward_pre_hook(
        lambda _, args, kwargs: ((2 * args[0], *args[1:]), kwargs), with_kwargs=True
    )
    pairs = Pairs(model, BASE, SOURCE, ["mlp.out:0"])
    cells = single_cells(pairs, step=3)
    with pytest.warns(UserWarning, match="something changes the residual stream between blocks 0 and 1"):
        logits, report = pairs.run(cells)
    assert not report.packed
    for found, (pair, [(site, token)]) in zip(logits, cells, strict=True):
        torch.testing.assert_close(found, pairs.expected(pair, site, [token]), rtol=0, atol=1e-10)
    doubled.remove()
