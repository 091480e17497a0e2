"""Running a model from the middle: its head, its cache by any name, and blocks that give what is known already."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from featurizers import Site
from featurizers.errors import SiteError
from featurizers.models import Anatomy
from torch import Tensor, nn

Wrap = Callable[[Tensor], Any]
"""Puts activations into the form in which a block returns them: alone, or the first of a tuple."""


def wrap_like(output: Any) -> Wrap:
    """How to return activations as a block that returned this does."""
    if not isinstance(output, tuple):
        return lambda hidden: hidden
    rest = [None] * (len(output) - 1)
    return lambda hidden: (hidden, *rest)


def last_clean_block(anatomy: Anatomy, site: Site) -> int:
    """The last block whose output an edit at the site leaves as it was but for the edit itself, or -1."""
    if site.layer is not None:
        return site.layer if site.kind == "resid.post" else site.layer - 1
    if site.kind == "norm.out":
        return anatomy.n_layers - 1
    if site.module is not None:
        try:
            inside = site.module.removeprefix(f"{anatomy.blocks.layers}.")
        except SiteError:
            return -1
        number, _, rest = inside.partition(".")
        if inside != site.module and number.isdecimal():
            return int(number) if site.side == "output" and not rest else int(number) - 1
    return -1


@contextmanager
def restarted(blocks: Sequence[nn.Module], start: int, hidden: Tensor, wrap: Wrap) -> Iterator[None]:
    """The model with ``hidden`` as the output of block ``start``, and without the blocks before it."""

    def pass_on(x: Tensor, *_: Any, **__: Any) -> Any:
        return wrap(x)

    def give(*_: Any, **__: Any) -> Any:
        return wrap(hidden)

    with ExitStack() as stack:
        for i in range(start + 1):
            stack.enter_context(_forward_of(blocks[i], pass_on if i < start else give))
        yield


def head_of(model: nn.Module) -> nn.Module | None:
    """The module that turns the last activations into logits, if the model says."""
    get: Any = getattr(model, "get_output_embeddings", None)
    head = None if get is None else get()
    return head if isinstance(head, nn.Module) else None


def takes(model: nn.Module, name: str) -> bool:
    """Whether the model has an argument of this name."""
    return name in inspect.signature(type(model).forward).parameters


def takes_cache(model: nn.Module) -> bool:
    """Whether the model can go on from keys and values."""
    return takes(model, "cache") or takes(model, "past_key_values")


def cache_argument(model: nn.Module, cache: Any) -> dict[str, Any]:
    """The cache by the name that this version of transformers gives it."""
    return {} if cache is None else {"cache" if takes(model, "cache") else "past_key_values": cache}


def empty_cache() -> Any:
    """A cache that keeps every token, in layers with a window too."""
    from transformers import DynamicCache

    return DynamicCache()


def is_keys(layer: Any) -> bool:
    """Whether a layer of a cache holds keys and values of attention, ``(batch, heads, tokens, width)``."""
    keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
    return isinstance(keys, Tensor) and isinstance(values, Tensor) and keys.dim() == values.dim() == 4


def padded(rows: Sequence[Tokens], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids padded on the right, and which of them are tokens."""
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=device)
    mask = torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in rows], device=device)
    return ids, mask


@contextmanager
def _forward_of(block: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """The block with another ``forward``, its hooks as they are."""
    before = vars(block).get("forward")
    vars(block)["forward"] = forward
    try:
        yield
    finally:
        if before is None:
            del vars(block)["forward"]
        else:
            vars(block)["forward"] = before
