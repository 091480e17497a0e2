"""An attention function that shows queries, keys, values, probabilities and heads' outputs as the model runs."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final, Literal, TypeAlias, cast, final

import torch
from featurizers.errors import SiteError
from torch import Tensor, nn

Part: TypeAlias = Literal["q", "k", "v", "logits", "probs", "z"]

NAME: Final = "featurizers_derived_scalars"
"""Name of the attention function in `transformers`."""


class Listener(ABC):
    """What hears of every part of attention, and may replace it.

    Shapes: q, k, v ``(batch, head, token, d_head)``, keys and values one a query head; logits and probs
    ``(batch, head, token, key)``; z ``(batch, token, head, d_head)``.
    """

    @abstractmethod
    def wants_logits(self, module: nn.Module) -> bool:
        """Whether scores should be computed for a module; nothing else does."""

    @abstractmethod
    def hear(self, module: nn.Module, part: Part, tensor: Tensor) -> Tensor:
        """What to go on with: the tensor, or one in its place (of logits, which are not read again, it is ignored)."""


@final
class Deaf(Listener):
    """Hears nothing and changes nothing: for a run whose masks are to be as in all other runs."""

    def wants_logits(self, module: nn.Module) -> bool:
        """Never."""
        return False

    def hear(self, module: nn.Module, part: Part, tensor: Tensor) -> Tensor:
        """The tensor."""
        return tensor


_LISTENER: ContextVar[Listener | None] = ContextVar("listener", default=None)


@contextmanager
def listening(model: nn.Module, listener: Listener) -> Iterator[None]:
    """Let a listener hear the attention of a model; the model's own implementation is back afterwards.

    Raises:
        SiteError: the model's attention does not go through the interface of `transformers`.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise SiteError(f"{type(model).__name__} is no model of transformers, so its attention cannot be looked into")
    _register()
    token = _LISTENER.set(listener)
    try:
        with implementation(model, NAME):
            yield
    finally:
        _LISTENER.reset(token)


@contextmanager
def implementation(model: nn.Module, name: str) -> Iterator[None]:
    """Let a model's attention be computed by the function of a name; its own is back afterwards."""
    configs = _configs(model)
    before = [config._attn_implementation_internal for config in configs]
    try:
        for config in configs:
            # The setter that models offer looks for kernels and walks through all modules; this is all that it changes.
            config._attn_implementation_internal = name
        yield
    finally:
        for config, own in zip(configs, before, strict=True):
            config._attn_implementation_internal = own


def _configs(model: nn.Module) -> list[Any]:
    """Every configuration in the model, once."""
    found: dict[int, Any] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and "_attn_implementation_internal" in vars(config):
            found[id(config)] = config
    return list(found.values())


def _register() -> None:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAME, _attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, eager_mask)


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    eager, listener = _eager(module), _LISTENER.get()
    if listener is None:
        return eager(module, query, key, value, attention_mask, **kwargs)
    # Repeated here and not in the function below, values and their gradients are one a query head.
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    query = listener.hear(module, "q", query)
    key, value = listener.hear(module, "k", key), listener.hear(module, "v", value)
    with _ungrouped(module):
        z, probs = eager(module, query, key, value, attention_mask, **kwargs)
    if listener.wants_logits(module):
        logits = _scores(query, key, attention_mask, kwargs)
        _check_scores(module, logits, probs)
        listener.hear(module, "logits", logits)
    heard = listener.hear(module, "probs", probs)
    if heard is not probs:
        z = (heard @ value).transpose(1, 2)
    return listener.hear(module, "z", z), heard


def _eager(module: nn.Module) -> Callable[..., tuple[Tensor, Tensor]]:
    """The model's own plain attention, which knows of its softcap, its sinks and its mask."""
    for base in type(module).__mro__:
        function = getattr(sys.modules.get(base.__module__), "eager_attention_forward", None)
        if function is not None:
            return cast("Callable[..., tuple[Tensor, Tensor]]", function)
    raise SiteError(f"{type(module).__name__} has no eager_attention_forward beside it, so it cannot be looked into")


@contextmanager
def _ungrouped(module: nn.Module) -> Iterator[None]:
    """Tell a module that its keys and values are repeated already."""
    groups = vars(module).get("num_key_value_groups")
    if groups is None:
        yield
        return
    module.num_key_value_groups = 1  # type: ignore[assignment]
    try:
        yield
    finally:
        module.num_key_value_groups = groups


def _scores(query: Tensor, key: Tensor, mask: Tensor | None, options: dict[str, Any]) -> Tensor:
    scaling, softcap = options.get("scaling"), options.get("softcap")
    scores: Tensor = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    if mask is None:
        return scores
    mask = mask[..., : key.shape[-2]]  # some releases make it as long as a cache might become
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, float("-inf"))
    return (scores + mask).masked_fill(mask <= torch.finfo(mask.dtype).min / 2, float("-inf"))


def _check_scores(module: nn.Module, scores: Tensor, probs: Tensor) -> None:
    tolerance = 1e-4 if probs.dtype in (torch.float32, torch.float64) else 3e-2
    softmax = scores.detach().float().softmax(-1)
    if not torch.allclose(softmax, probs.detach().float(), rtol=tolerance, atol=tolerance):
        raise SiteError(
            f"the scores of {type(module).__name__} are not query · key with a mask and a softcap, so attn.logits "
            "cannot be captured; attn.probs can"
        )
