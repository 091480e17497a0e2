"""From the output of a decoder's last block to its logits, by the model's own code, for some tokens alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Final

import torch
from featurizers.errors import UsageError
from featurizers.models import Place, Wrap, eager, head_of, hook, without_cache
from torch import Tensor, nn

from featurizers_patching.engine.scope import NotPackableError, active, standing_in


def checked_head(model: nn.Module) -> nn.Module:
    """Return the language-model head.

    Raises:
        UsageError: the model has none.
    """
    head = head_of(model)
    if head is None:
        name = type(model).__name__
        raise UsageError(f"patching measures logits, and {name} has no language-model head; load AutoModelForCausalLM")
    return head


FEW: Final = 16
"""Matrix products of fewer rows or columns take other kernels, which round differently."""


@contextmanager
def narrowed(model: nn.Module, run: object, at: Tensor) -> Iterator[None]:
    """Let the head compute the logits of some tokens ``(batch, n)`` alone where a run is active.

    Logits after the first n of each prompt are repetitions; see `FEW`.
    """
    at = at.repeat(1, -(-FEW // at.numel()))

    def narrow(hidden: Tensor) -> Tensor:
        if active() is not run:
            return hidden
        if hidden.dim() != 3 or hidden.shape[0] != at.shape[0]:
            raise NotPackableError("its head does not take (batch, tokens, width)")
        return hidden.gather(1, at.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))

    handle = hook(Place("", checked_head(model), "input"), narrow)
    try:
        yield
    finally:
        handle.remove()


def takes_columns(model: nn.Module) -> bool:
    """Return whether single columns of the head can be computed: it is a plain linear layer."""
    head = checked_head(model)
    return type(head) is nn.Linear and not head._forward_pre_hooks and not head._forward_hooks


def unembed(
    model: nn.Module,
    run: object,
    blocks: Sequence[nn.Module],
    wraps: Sequence[Wrap],
    hidden: Tensor,
    columns: Tensor | None = None,
) -> Tensor:
    """Return the logits of outputs of the last block, ``(rows, vocabulary or columns)``; call it inside a run.

    The model runs on as many prompts of one token with its blocks replaced, so that norms, scales and soft caps are
    its own.

    Args:
        model: a decoder with its head.
        run: the active run.
        blocks: of the model.
        wraps: form of each block's output.
        hidden: ``(rows, d)``.
        columns: tokens whose logits to compute, if `takes_columns`; None for the whole vocabulary.
    """
    repeated = hidden.repeat(-(-FEW // len(hidden)), 1)
    with eager(), ExitStack() as stack:
        for number, (block, wrap) in enumerate(zip(blocks, wraps, strict=True)):
            last = number == len(blocks) - 1
            stack.enter_context(standing_in(block, run, _giving(wrap, repeated.unsqueeze(1) if last else None)))
        if columns is not None:
            head: Any = checked_head(model)
            padded = columns.repeat(-(-FEW // len(columns)))
            bias = None if head.bias is None else head.bias[padded]
            weight = head.weight[padded]
            linear = nn.functional.linear
            stack.enter_context(standing_in(head, run, lambda x: linear(x, weight, bias)))
        ids = torch.zeros(len(repeated), 1, dtype=torch.long, device=hidden.device)
        logits: Tensor = model(input_ids=ids, **without_cache(model)).logits
    logits = logits[: len(hidden), 0]
    return logits if columns is None else logits[:, : len(columns)]


def _giving(wrap: Wrap, hidden: Tensor | None) -> Callable[..., Any]:
    """Return a ``forward`` that gives ``hidden``; its own input, if that is None."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        given = args[0] if args else kwargs["hidden_states"]
        return wrap(given if hidden is None else hidden)

    return forward
