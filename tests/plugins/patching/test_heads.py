"""Queries, keys, values and routers as sites of a grid, against plain hooks on the projections."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from featurizers_patching import patch
from torch import Tensor

from tests.support.patching import packable

BASE, SOURCE = [5, 9, 3, 7, 11, 2], [6, 2, 14, 3, 9, 7]
METRIC: dict[str, Any] = {"metric": ("logit_difference", 7, 9), "normalize": False}

COLUMNS: dict[str, dict[str, Any]] = {  # of a head, as the attention of each architecture splits its projections
    "gpt2": {"module": "transformer.h.{}.attn.c_attn", "q": lambda h: [8 * h], "k": lambda h: [32 + 8 * h],
             "v": lambda h: [64 + 8 * h], "heads": (4, 4), "width": 8},
    "gpt_neox": {"module": "gpt_neox.layers.{}.attention.query_key_value", "q": lambda h: [24 * h],
                 "k": lambda h: [24 * h + 8], "v": lambda h: [24 * h + 16], "heads": (4, 4), "width": 8},
    "llama": {"module": "model.layers.{}.self_attn.%s_proj", "q": lambda h: [8 * h], "k": lambda h: [8 * h],
              "v": lambda h: [8 * h], "heads": (4, 2), "width": 8},
}  # fmt: skip


def place(name: str, kind: str, block: int, head: int | None) -> tuple[str, list[int]]:
    """Return the module of queries, keys or values, and the columns of one head or of all."""
    layout, letter = COLUMNS[name], kind[-1]
    module = str(layout["module"]).format(block).replace("%s", letter)
    heads = range(layout["heads"][letter != "q"]) if head is None else [head]
    return module, [column for h in heads for start in layout[letter](h) for column in range(start, start + 8)]


@contextmanager
def on_output(model: Any, module: str, change: Any) -> Iterator[None]:
    handle = model.get_submodule(module).register_forward_hook(lambda _, __, output: change(output.clone()))
    try:
        yield
    finally:
        handle.remove()


def run(model: Any, tokens: Sequence[int]) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([list(tokens)]), use_cache=False).logits[0, -1]


def projected(model: Any, tokens: Sequence[int], module: str) -> Tensor:
    found: list[Tensor] = []

    def keep(output: Tensor) -> Tensor:
        found.append(output)
        return output

    with on_output(model, module, keep):
        run(model, tokens)
    return found[0]


def swap(values: Tensor, token: int, columns: list[int]) -> Any:
    def change(output: Tensor) -> Tensor:
        output[:, token, columns] = values[:, token, columns]
        return output

    return change


@pytest.mark.parametrize("name", COLUMNS)
@pytest.mark.parametrize("kind", ["attn.q", "attn.k", "attn.v"])
def test_queries_keys_and_values_are_those_of_plain_hooks(name: str, kind: str) -> None:
    model: Any = packable(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        grid = patch(model, BASE, SOURCE, [kind, f"{kind}:*:*"], **METRIC)
    n_heads = COLUMNS[name]["heads"][kind != "attn.q"]
    assert len(grid.sites) == 3 + 3 * n_heads
    for s, site in enumerate(grid.sites):
        if site.head not in (None, 1) or site.layer is None:
            continue
        module, columns = place(name, kind, site.layer, site.head)
        values = projected(model, SOURCE, module)
        for token in (1, 4, 5):
            with on_output(model, module, swap(values, token, columns)):
                after = run(model, BASE)
            assert math.isclose(grid.raw[0, s, 0, token], after[7] - after[9], abs_tol=1e-10), (site, token)


@pytest.mark.parametrize("kind", ["attn.q", "attn.k"])
def test_a_query_or_key_is_edited_though_attention_is_frozen(kind: str) -> None:
    model: Any = packable("llama")
    site = f"{kind}:1:0"
    grid = patch(model, BASE, SOURCE, site, freeze=("attn.out", "mlp.out"), **METRIC)
    module, columns = place("llama", kind, 1, 0)
    values = projected(model, SOURCE, module)
    clean = {
        name: projected(model, BASE, name)
        for block in range(3)
        for name in (f"model.layers.{block}.mlp", f"model.layers.{block}.self_attn.o_proj")
    }
    moved = 0.0
    for token in range(6):
        with ExitStack() as stack:
            stack.enter_context(on_output(model, module, swap(values, token, columns)))
            for name, output in clean.items():
                if name != "model.layers.1.self_attn.o_proj":  # what the edit is inside of
                    stack.enter_context(on_output(model, name, lambda _, output=output: output))
            after = run(model, BASE)
        assert math.isclose(grid.raw[0, 0, 0, token], after[7] - after[9], abs_tol=1e-10), token
        moved = max(moved, abs(float(grid.raw[0, 0, 0, token] - grid.base[0, 0])))
    assert moved > 1e-3


def test_a_router_is_a_site() -> None:
    import featurizers

    model: Any = packable("Mixtral")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        grid = patch(model, BASE, SOURCE, "mlp.router", skip_equal=False, **METRIC)
    f = featurizers.create("identity")
    for s, site in enumerate(grid.sites):
        for token in (2, 5):
            swapped = featurizers.Interchange(f, source={"input_ids": torch.tensor([SOURCE])}, positions=[token])
            with featurizers.intervene(model, {site: swapped}):
                after = run(model, BASE)
            assert math.isclose(grid.raw[0, s, 0, token], after[7] - after[9], abs_tol=1e-4), (site, token)
    assert float((grid.raw - grid.base[0, 0]).abs().max()) > 1e-3
