"""Clean runs: a run from the middle equals the whole run, computes fewer layers and tokens, and changes no model."""

from __future__ import annotations

import random
import warnings
from typing import Any

import featurizers
import featurizers_training as training
import pytest
import torch
from featurizers.errors import ShapeError, SiteError, UsageError
from featurizers_training.runs.clean_runs import CleanRuns, SiteEdit
from torch import Tensor, nn

from tests.support.models import ARCHITECTURES, LAYERS, fresh_model, hooked, hooks_of, module_of, tiny_model

IDENTITY = featurizers.create("identity")
ROWS = [5, 0, 7, 2]
SITES = {
    "a block's output": (["resid.post:1"], ("tokens", "layers")),
    "two sites, a head among them": (["attn.z:1:2", "mlp.out:2"], ("tokens", "layers")),
    "two layers": (["resid.post:0", "mlp.act:2"], ("tokens", "layers")),
    "the first block's input": (["resid.pre:0"], ("tokens",)),
    "the embedding": (["embed"], ("tokens",)),
    "the final norm": (["norm.out"], ("layers",)),
}


def make_pairs(count: int = 9, **positions: Any) -> training.Pairs:
    """Make pairs with prompts of different lengths, labels of one and two tokens, and two positions."""
    random_ = random.Random(0)
    positions = positions or {"base_position": [-2, -1], "source_position": [1, 2]}

    def prompt() -> list[int]:
        return [random_.randrange(1, 60) for _ in range(random_.randrange(5, 9))]

    labels = [[random_.randrange(60)] * (1 + i % 2) for i in range(count)]
    return training.Pairs.of({"base": prompt(), "source": prompt(), "label": label, **positions} for label in labels)


def blend(base: Tensor, source: Tensor) -> Tensor:
    return 0.3 * base + 0.7 * source


def edits(runs: CleanRuns) -> list[SiteEdit]:
    return [SiteEdit(j, IDENTITY, blend) for j in range(len(runs.sites))]


@pytest.mark.parametrize("sites", SITES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_a_run_from_the_middle_is_the_whole_run(architecture: str, sites: str) -> None:
    model, pairs = tiny_model(architecture), make_pairs()
    where, kept = SITES[sites]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        runs = CleanRuns(model, pairs, where, batch_size=4)
    plain = CleanRuns(model, pairs, where, batch_size=4, plain=True)
    assert (runs.kept, plain.kept) == (kept, ())
    torch.testing.assert_close(runs.logits(ROWS, edits(runs)), plain.logits(ROWS, edits(plain)), atol=2e-5, rtol=1e-4)
    assert torch.equal(runs.answers, plain.answers)


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox", "gemma3"])
def test_a_run_is_that_of_a_plain_hook_one_prompt_at_a_time(architecture: str) -> None:
    """Compare with an oracle that needs no padding and no positions: one unpadded prompt, and a slice."""
    model, pairs = tiny_model(architecture), make_pairs()
    runs = CleanRuns(model, pairs, ["resid.post:1"], batch_size=4)
    logits = runs.logits(ROWS, edits(runs))
    module, side = module_of(model, architecture, "resid.post", 1)
    for row, found in zip(ROWS, logits, strict=True):
        pair = pairs[row]
        seen: list[Tensor] = []

        def keep(hidden: Tensor, seen: list[Tensor] = seen) -> Tensor:
            seen.append(hidden.clone())
            return hidden

        def edit(hidden: Tensor, seen: list[Tensor] = seen) -> Tensor:
            hidden = hidden.clone()
            n = len(pair.base)  # noqa: B023  # called at once
            hidden[:, n - 2 : n] = blend(hidden[:, n - 2 : n], seen[0][:, 1:3])
            return hidden

        with hooked(module, side, keep):
            model(torch.tensor([pair.sources[0]]))
        with hooked(module, side, edit):
            wanted = model(torch.tensor([[*pair.base, *pair.label[:-1]]])).logits[0, len(pair.base) - 1 :]
        torch.testing.assert_close(found[: len(pair.label)], wanted, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_without_edits_the_answers_are_the_models_own() -> None:
    model, pairs = tiny_model("llama"), make_pairs()
    runs = CleanRuns(model, pairs, ["resid.post:1"])
    for row, pair in enumerate(pairs):
        wanted = model(torch.tensor([pair.run])).logits[0, len(pair.base) - 1 :].argmax(-1)
        assert runs.answers[row, : len(pair.label)].tolist() == wanted.tolist()
        assert runs.logits([row], []).argmax(-1)[0].tolist() == wanted.tolist()


@torch.no_grad()
def test_each_site_has_its_own_source_and_positions() -> None:
    prompts = [[[3, 4, 5, 6], [7, 8, 9]], [[9, 8, 7], [1, 2]]]
    records = [
        {
            "base": [i + 1, 2, 3, 4, 5],
            "source": sources,
            "label": 1,
            "base_position": [[1], [-1]],
            "source_position": [[0], [-1]],
        }
        for i, sources in enumerate(prompts)
    ]
    model, pairs = tiny_model("llama"), training.Pairs.of(records)
    sites = ["resid.post:0", "resid.post:1"]
    runs = CleanRuns(model, pairs, sites)
    found = runs.logits([1, 0], [SiteEdit(j, IDENTITY, lambda base, source: source) for j in range(2)])
    for row, logits in zip([1, 0], found, strict=True):
        swaps = {
            site: featurizers.Interchange(
                IDENTITY,
                source={"input_ids": torch.tensor([prompts[row][j]])},
                positions=[[1], [4]][j],
                source_positions=[[0], [-1]][j],
            )
            for j, site in enumerate(sites)
        }
        with featurizers.intervene(model, swaps):
            wanted = model(torch.tensor([records[row]["base"]])).logits[0, -1]
        torch.testing.assert_close(logits[0], wanted, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_a_run_with_fewer_edits_starts_later_and_is_exact() -> None:
    model, pairs = tiny_model("qwen3"), make_pairs()
    runs = CleanRuns(model, pairs, ["resid.post:0", "resid.post:2"])
    one = [SiteEdit(1, IDENTITY, blend)]
    called = []
    handle = model.model.layers[1].mlp.register_forward_hook(lambda *_: called.append(None))
    found = runs.logits(ROWS, one)
    handle.remove()
    assert not called
    torch.testing.assert_close(found, runs.plain_logits(ROWS, one), atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_blocks_and_tokens_before_the_edit_are_not_computed_again() -> None:
    model, pairs = tiny_model("llama"), make_pairs(base_position=-1)
    runs = CleanRuns(model, pairs, ["resid.post:1"])
    seen: dict[int, tuple[int, ...]] = {}
    handles = [
        model.model.layers[i].mlp.register_forward_hook(lambda _, __, out, i=i: seen.update({i: tuple(out.shape)}))
        for i in range(LAYERS)
    ]
    logits = runs.logits([1], edits(runs))  # a label of two tokens: one token of the prompt and one of the label
    for handle in handles:
        handle.remove()
    assert seen == {2: (1, 2, 32)}
    assert logits.shape[:2] == (1, 2)


@torch.no_grad()
@pytest.mark.parametrize(("budget", "kept"), [(0, ()), (200, ()), (12_000, ("layers",)), (2**31, ("tokens", "layers"))])
def test_with_little_memory_less_is_kept_and_the_result_is_the_same(budget: int, kept: tuple[str, ...]) -> None:
    model, pairs = tiny_model("llama"), make_pairs()
    runs = CleanRuns(model, pairs, ["resid.post:0"], batch_size=4, cache_bytes=budget)
    assert runs.kept == kept
    torch.testing.assert_close(
        runs.logits(ROWS, edits(runs)), runs.plain_logits(ROWS, edits(runs)), atol=2e-5, rtol=1e-4
    )


@torch.no_grad()
def test_prompts_that_repeat_are_run_once() -> None:
    model = tiny_model("llama")
    pairs = training.Pairs.of([{"base": [1, 2, 3], "source": [4, 5], "label": i} for i in range(50)])
    rows = []
    handle = model.model.layers[0].register_forward_hook(lambda _, __, out: rows.append(len(out)))
    CleanRuns(model, pairs, ["resid.post:1"], plain=True)
    handle.remove()
    assert rows == [1, 1]  # the source and the base


@torch.no_grad()
def test_special_tokens_are_left_alone() -> None:
    model = tiny_model("llama")
    pairs = training.Pairs.of([{"base": [1, 2, 3], "source": [4, 5, 6], "label": 1, "base_position": [0, 1, 2]}])
    runs = CleanRuns(model, pairs, ["resid.post:1"])
    spared = featurizers.create("identity")
    spared.special_tokens = (2,)
    one = [SiteEdit(0, spared, lambda base, source: source)]
    without = [SiteEdit(0, IDENTITY, lambda base, source: torch.stack([source[:, 0], base[:, 1], source[:, 2]], dim=1))]
    torch.testing.assert_close(runs.logits([0], one), runs.logits([0], without))
    torch.testing.assert_close(runs.logits([0], one), runs.plain_logits([0], one), atol=2e-5, rtol=1e-4)


def test_gradients_reach_the_edit_and_not_the_model() -> None:
    model, pairs = fresh_model("llama").requires_grad_(False), make_pairs()
    runs = CleanRuns(model, pairs, ["resid.post:1"])
    gradients = []
    for logits in (runs.logits, runs.plain_logits):
        weight = torch.tensor(0.4, requires_grad=True)
        edit = [SiteEdit(0, IDENTITY, lambda base, source, weight=weight: torch.lerp(base, source, weight))]
        logits(ROWS, edit).square().sum().backward()
        gradients.append(weight.grad)
    torch.testing.assert_close(*gradients, atol=1e-3, rtol=1e-4)
    assert gradients[0] is not None
    assert gradients[0].abs() > 0.1


def test_runs_do_not_change_the_model() -> None:
    model, pairs = fresh_model("llama"), make_pairs()
    before = hooks_of(model), {name: dict(vars(module)) for name, module in model.named_modules()}
    runs = CleanRuns(model, pairs, ["resid.post:1"])
    runs.logits(ROWS, edits(runs))
    with pytest.raises(ZeroDivisionError):
        runs.logits(ROWS, [SiteEdit(0, IDENTITY, lambda base, source: base / (1 // 0))])
    assert hooks_of(model) == before[0]
    for name, module in model.named_modules():
        assert vars(module).keys() == before[1][name].keys(), name


class Reversed(nn.Module):
    """A block that adds the first token's activations to every token, so that runs of later tokens alone are wrong."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.mlp = block.mlp

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.block(hidden, *args, **kwargs) + hidden[:, :1]


@torch.no_grad()
def test_a_model_that_cannot_be_run_from_the_middle_is_run_whole_with_a_warning() -> None:
    model, pairs = fresh_model("llama"), make_pairs()
    for i in range(LAYERS):
        model.model.layers[i] = Reversed(model.model.layers[i])
    with pytest.warns(UserWarning, match="cannot be run from the middle"):
        runs = CleanRuns(model, pairs, ["resid.post:1"])
    assert runs.kept == ()
    assert torch.equal(runs.logits(ROWS, edits(runs)), runs.plain_logits(ROWS, edits(runs)))


def test_invalid_arguments_are_refused_before_anything_runs() -> None:
    model = tiny_model("llama")
    with pytest.raises(SiteError, match="has 3 layers"):
        CleanRuns(model, make_pairs(), ["resid.post:3"])
    three = make_pairs(base_position=[[0], [1], [2]])
    with pytest.raises(UsageError, match="is for 3 sites, and the search has 2"):
        CleanRuns(model, three, ["resid.post:0", "resid.post:1"])
    records = [{"base": [1, 2, 3], "source": [1, 2, 3], "label": 1, "base_position": p} for p in ([0], [0, 1])]
    with pytest.raises(UsageError, match="pair 1 has 2 positions and pair 0 has 1"):
        CleanRuns(model, training.Pairs.of(records), ["resid.post:0"])
    with pytest.raises(UsageError, match=r"call model.eval\(\)"):
        CleanRuns(fresh_model("llama").train(), make_pairs(), ["resid.post:0"])


def test_an_edit_that_gives_another_shape_is_refused() -> None:
    model = tiny_model("llama")
    runs = CleanRuns(model, make_pairs(), ["resid.post:1"])
    for logits in (runs.logits, runs.plain_logits):
        with pytest.raises(ShapeError, match=r"resid.post:1: the edit of \(4, 2, 32\) gives \(4, 2, 3\)"):
            logits(ROWS, [SiteEdit(0, IDENTITY, lambda base, source: base[..., :3])])
