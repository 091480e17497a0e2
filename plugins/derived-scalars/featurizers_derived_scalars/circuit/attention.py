"""An attention function for `transformers` that shows queries, keys, values, probabilities and outputs of heads."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final, Literal, TypeAlias, cast, final, get_args

import torch
from featurizers.errors import SiteError
from torch import Tensor, nn

Part: TypeAlias = Literal["q", "k", "v", "logits", "probs", "z"]

PARTS: Final[dict[str, Part]] = {f"attn.{part}": part for part in get_args(Part)}
"""Part of attention that each of these kinds of place holds."""

NAME: Final = "featurizers_derived_scalars"
"""Name under which the attention function is registered in `transformers`."""


class Listener(ABC):
    """Receives every part of attention while a model runs, and may replace it.

    Shapes: q, k, v ``(batch, head, token, d_head)``, keys and values repeated for each query head; logits and probs
    ``(batch, head, token, key)``; z ``(batch, token, head, d_head)``.
    """

    @abstractmethod
    def wants_logits(self, module: nn.Module) -> bool:
        """Return True for modules whose attention logits must be computed; others skip it."""

    @abstractmethod
    def on_event(self, module: nn.Module, part: Part, tensor: Tensor) -> Tensor:
        """Return the tensor to go on with: the given one or a replacement. Replaced logits are ignored."""


@final
class NullListener(Listener):
    """Changes nothing: for a run that needs the same masks as all other runs."""

    def wants_logits(self, module: nn.Module) -> bool:
        """Return False."""
        return False

    def on_event(self, module: nn.Module, part: Part, tensor: Tensor) -> Tensor:
        """Return the tensor."""
        return tensor


def place_layout(part: Part, tensor: Tensor) -> Tensor:
    """Return a part of attention as its place holds it: no batch axis, tokens first."""
    if part == "z":
        return tensor[0]
    return tensor[0].transpose(0, 1) if part in ("q", "k", "v") else tensor[0].permute(1, 2, 0)


def part_layout(part: Part, tensor: Tensor) -> Tensor:
    """Return the tensor of a place as `Listener` gets it; the inverse of `place_layout`."""
    if part == "z":
        return tensor[None]
    return tensor.transpose(0, 1)[None] if part in ("q", "k", "v") else tensor.permute(2, 0, 1)[None]


_LISTENER: ContextVar[tuple[Listener, frozenset[str | None]] | None] = ContextVar("listener", default=None)
"""The listener, and the names of the implementations of attention that the model has outside of the run."""


@contextmanager
def listening(model: nn.Module, listener: Listener) -> Iterator[None]:
    """Send every part of a model's attention to a listener; restore the model's own implementation afterwards.

    Raises:
        SiteError: the model's attention does not use the interface of `transformers`, or leaves out its softcap.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise SiteError(f"{type(model).__name__} is no model of transformers, so its attention cannot be looked into")
    _register()
    token = _LISTENER.set((listener, frozenset(config._attn_implementation_internal for config in _configs(model))))
    try:
        with implementation(model, NAME):
            yield
    finally:
        _LISTENER.reset(token)


@contextmanager
def implementation(model: nn.Module, name: str) -> Iterator[None]:
    """Compute a model's attention by the registered function of this name; restore its own afterwards."""
    configs = _configs(model)
    before = [config._attn_implementation_internal for config in configs]
    try:
        for config in configs:
            # The models' own setter looks for kernels and walks through all modules; this is all that it changes.
            config._attn_implementation_internal = name
        yield
    finally:
        for config, own in zip(configs, before, strict=True):
            config._attn_implementation_internal = own


def _configs(model: nn.Module) -> list[Any]:
    """Return each configuration in the model once."""
    by_id: dict[int, Any] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and "_attn_implementation_internal" in vars(config):
            by_id[id(config)] = config
    return list(by_id.values())


def _register() -> None:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAME, _attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, eager_mask)


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    eager, run = _eager(module), _LISTENER.get()
    if run is None:
        return eager(module, query, key, value, attention_mask, **kwargs)
    listener, own = run
    left_out = [name for name in ("softcap", "s_aux") if kwargs.get(name) is not None]
    if left_out and "sdpa" in own:  # transformers refuses a softcap there, or, in some releases, ignores it
        raise SiteError(
            f"{type(module).__name__} has a {left_out[0]} that its sdpa attention leaves out, and is looked into by "
            "eager attention, which does not; load the model with attn_implementation='eager'"
        )
    # Repeated here and not inside the eager function, so that each query head has its own values and gradients.
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    query = listener.on_event(module, "q", query)
    key, value = listener.on_event(module, "k", key), listener.on_event(module, "v", value)
    with _ungrouped(module):
        z, probs = eager(module, query, key, value, attention_mask, **kwargs)
    if listener.wants_logits(module):
        logits = _scores(query, key, attention_mask, kwargs)
        _check_scores(module, logits, probs)
        listener.on_event(module, "logits", logits)
    replaced = listener.on_event(module, "probs", probs)
    if replaced is not probs:
        z = (replaced @ value).transpose(1, 2)
    return listener.on_event(module, "z", z), replaced


def _eager(module: nn.Module) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return the model's own eager attention, which knows its softcap, its sinks and its mask."""
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
