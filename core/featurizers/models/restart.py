"""Runs a decoder from the middle: earlier blocks are skipped, and a block returns activations that are known."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias

from jaxtyping import Float
from torch import Tensor, nn

from featurizers.errors import SiteError
from featurizers.format.sites import Site
from featurizers.models.anatomy import Anatomy
from featurizers.models.compilation import eager

Wrap: TypeAlias = Callable[[Tensor], Any]
"""Puts activations into the form in which a block returns them: alone, or the first of a tuple."""


def wrap_like(output: Any, *, keep_rest: bool = False) -> Wrap:
    """Return a function that puts activations into the form of a block's output.

    Args:
        output: what the block returned in an earlier run.
        keep_rest: whether to return the rest of a tuple as it was in that run (and keep its tensors alive); else the
            rest is None.
    """
    if not isinstance(output, tuple):
        return lambda hidden: hidden
    rest = output[1:] if keep_rest else (None,) * (len(output) - 1)
    return lambda hidden: (hidden, *rest)


@contextmanager
def restarted(
    blocks: Sequence[nn.Module] | nn.ModuleList,
    start: int,
    hidden: Float[Tensor, "batch sequence d_model"],
    wrap: Wrap | Sequence[Wrap],
) -> Iterator[None]:
    """Make block ``start`` return ``hidden``, and skip the blocks before it, while the context lasts.

    Blocks keep their hooks; only their ``forward`` is replaced. Whether a model computes the same this way depends on
    its later blocks reading nothing of the earlier ones but their output: compare with one whole run.

    Args:
        blocks: of the model, in order.
        start: index of the block that returns ``hidden``; -1 changes nothing.
        hidden: its output.
        wrap: form of the output of every block, or of each block up to ``start``; see `wrap_like`.

    Examples:
        >>> import torch
        >>> from featurizers.models import first_tensor
        >>> from transformers import GPT2Config, GPT2Model
        >>> model = GPT2Model(GPT2Config(n_layer=3, n_embd=8, n_head=2, vocab_size=5)).eval()
        >>> ids, seen = torch.tensor([[1, 2]]), []
        >>> handle = model.h[1].register_forward_hook(lambda *call: seen.append(call[-1]))
        >>> whole = model(ids).last_hidden_state
        >>> handle.remove()
        >>> with restarted(model.h, 1, first_tensor(seen[0]), wrap_like(seen[0])):
        ...     again = model(ids).last_hidden_state
        >>> torch.equal(again, whole)
        True
    """
    wraps = [wrap] * (start + 1) if callable(wrap) else wrap
    with eager(), ExitStack() as stack:
        for number in range(start):
            stack.enter_context(_forward_of(blocks[number], _passing_on(wraps[number])))
        if start >= 0:
            stack.enter_context(_forward_of(blocks[start], lambda *_, **__: wraps[start](hidden)))
        yield


def last_clean_block(anatomy: Anatomy, site: Site) -> int:
    """Return the index of the last block that runs unchanged when only ``site`` is edited, or -1.

    The output of that block is what `restarted` needs. An edit of the block's own output counts as after it.
    """
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


def head_of(model: nn.Module) -> nn.Module | None:
    """Return the module that turns the last activations into logits, or None if the model names none."""
    get: Any = getattr(model, "get_output_embeddings", None)
    head = None if get is None else get()
    return head if isinstance(head, nn.Module) else None


def _passing_on(wrap: Wrap) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        return wrap(args[0] if args else kwargs["hidden_states"])

    return forward


@contextmanager
def _forward_of(block: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replace the ``forward`` of a block, and leave its hooks alone."""
    before = vars(block).get("forward")
    vars(block)["forward"] = forward
    try:
        yield
    finally:
        if before is None:
            del vars(block)["forward"]
        else:
            vars(block)["forward"] = before
