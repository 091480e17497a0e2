"""The attention function that records a clean run and attends for packed rows, registered once with `transformers`."""

from __future__ import annotations

import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from featurizers_patching.engine.scope import NotPackableError, active

NAME: Final = "featurizers_patching"
KNOWN: Final = ("eager", "sdpa")
"""Implementations of attention that may be replaced by `NAME` for the time of a run."""
IGNORED: Final = frozenset({"position_ids", "cache_position", "position_embeddings", "attention_mask"})
"""Tensors that some models pass to the attention function and that it does not need."""


class Attender(ABC):
    """A run of the engine, as the attention function sees it."""

    @abstractmethod
    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, kernel: Kernel) -> Tensor:
        """Return attention's output ``(batch, tokens, heads, width)`` for ``(batch, heads, tokens, width)`` inputs."""


@dataclass(frozen=True)
class Kernel:
    """Formula of one module's attention.

    Attributes:
        scale: number that scores are multiplied by.
        softcap: bound of the scores; None if there is none.
        sinks: a score for each head that takes weight and gives no value; None if there is none.
        causal: whether attention without a mask is causal.
    """

    scale: float
    softcap: float | None
    sinks: Tensor | None
    causal: bool

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Return ``(batch, heads, tokens, width)``; the mask is added to the scores."""
        if self.softcap is None and self.sinks is None:
            grouped = q.shape[1] != k.shape[1]
            return nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, scale=self.scale, enable_gqa=grouped
            )
        weights = self.weights(q, k, mask)
        return weights @ _repeated(v, q.shape[1])

    def weights(self, q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
        """Return attention weights ``(batch, heads, tokens, keys)``."""
        scores = q @ _repeated(k, q.shape[1]).transpose(-1, -2) * self.scale
        if self.softcap is not None:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        scores = scores if mask is None else scores + mask
        if self.sinks is not None:
            sinks = self.sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
            scores = torch.cat([scores, sinks.to(scores.dtype)], dim=-1)
        weights = scores.softmax(-1, dtype=torch.float32).to(q.dtype)  # as the eager attention of transformers
        return weights if self.sinks is None else weights[..., :-1]


def weighted(weights: Tensor, v: Tensor) -> Tensor:
    """Return values ``(batch, heads, tokens, width)`` under given attention weights."""
    return weights @ _repeated(v, weights.shape[1])


def _repeated(x: Tensor, heads: int) -> Tensor:
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor | None]:
    run = active()
    if not isinstance(run, Attender):  # another thread runs the model meanwhile
        return _own(module)(module, query, key, value, attention_mask, **options)  # type: ignore[no-any-return]
    scale, softcap, sinks = (options.pop(name, None) for name in ("scaling", "softcap", "s_aux"))
    left_out = [name for name, given in (("softcap", softcap), ("sinks", sinks)) if given is not None]
    if left_out and _name(module) == "sdpa":  # transformers refuses a softcap there, or, in some releases, ignores it
        raise NotPackableError(
            f"its sdpa attention leaves out the {' and the '.join(left_out)}; load it with attn_implementation='eager'"
        )
    if options.pop("dropout", 0.0):
        raise NotPackableError("its attention has dropout outside of training")
    if unknown := [name for name, x in options.items() if isinstance(x, Tensor) and name not in IGNORED]:
        raise NotPackableError(f"its attention takes {unknown[0]!r}")
    causal = options.pop("is_causal", None)
    causal = getattr(module, "is_causal", True) if causal is None else causal
    kernel = Kernel(query.shape[-1] ** -0.5 if scale is None else scale, softcap, sinks, bool(causal))
    return run.attend(query, key, value, attention_mask, kernel), None


ALL_ATTENTION_FUNCTIONS.register(NAME, _attend)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, eager_mask)  # a form that eager and sdpa take too

_lock = threading.Lock()
_replaced: dict[int, tuple[str, int]] = {}
"""By the id of a config: the implementation that it names outside of runs, and how many runs replace it."""


@contextmanager
def attention(config: Any) -> Iterator[None]:
    """Let the attention of a model of this config be computed by the active run.

    Other threads, in which no run is active, go on with the implementation that the config names.

    Raises:
        NotPackableError: the model does not choose its attention by its config, or by one that is not known.
    """
    with _lock:
        name: Any
        name, users = _replaced.get(id(config), ("", 0))
        name = name if users else getattr(config, "_attn_implementation", None)
        if name not in KNOWN:
            raise NotPackableError(f"its attention is {name!r}; load it with attn_implementation='sdpa'")
        _replaced[id(config)] = name, users + 1
        config._attn_implementation_internal = NAME
    try:
        yield
    finally:
        with _lock:
            name, users = _replaced[id(config)]
            _replaced[id(config)] = name, users - 1  # kept, for threads that are about to call the function
            if users == 1:
                config._attn_implementation_internal = name


def _name(module: nn.Module) -> str:
    """Return the name of the attention function that a module uses outside of runs."""
    name, _ = _replaced.get(id(getattr(module, "config", None)), ("sdpa", 0))
    return name


def _own(module: nn.Module) -> Callable[..., Any]:
    """Return the attention function that a module uses outside of runs."""
    eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    own: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get(_name(module), eager)
    return own
