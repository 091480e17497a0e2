"""Arguments of a model's ``forward``, and the cache of keys and values by the name that each version gives it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


@functools.cache
def signature(forward: Callable[..., Any]) -> inspect.Signature:
    """Return the signature of a class's ``forward``, kept after the first call."""
    return inspect.signature(forward)


def takes(model: nn.Module, name: str) -> bool:
    """Return whether the model's ``forward`` has an argument of this name."""
    return name in signature(type(model).forward).parameters


def without_cache(model: nn.Module) -> dict[str, bool]:
    """Return the arguments that keep a model from building a cache; none if it has no such argument."""
    parameters = signature(type(model).forward).parameters
    accepts = "use_cache" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return {"use_cache": False} if accepts else {}


def takes_cache(model: nn.Module) -> bool:
    """Return whether the model can continue from keys and values."""
    return takes(model, "cache") or takes(model, "past_key_values")


def cache_argument(model: nn.Module, cache: Any) -> dict[str, Any]:
    """Return the cache as a keyword argument; empty for None. transformers 5.24 renamed ``past_key_values``."""
    return {} if cache is None else {"cache" if takes(model, "cache") else "past_key_values": cache}


def empty_cache() -> Any:
    """Return a cache that keeps every token, in layers with a sliding window too."""
    from transformers import DynamicCache

    return DynamicCache()


def is_keys(layer: Any) -> bool:
    """Return whether a layer of a cache holds keys and values of attention, ``(batch, heads, tokens, width)``."""
    keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
    return isinstance(keys, Tensor) and isinstance(values, Tensor) and keys.dim() == values.dim() == 4


def bound(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call of a module by their names."""
    if not args:
        return kwargs
    parameters = signature(type(module).forward)
    if len(args) == 1:  # as most models are called
        _, first, *_ = parameters.parameters.values()
        if first.kind is first.POSITIONAL_OR_KEYWORD:
            return {first.name: args[0], **kwargs}
    arguments = parameters.bind_partial(module, *args, **kwargs).arguments
    for name, parameter in parameters.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            return {**arguments, **arguments.get(name, {})}
    return arguments


def with_position_ids(model: nn.Module, inputs: Mapping[str, Any], *, of_padding: bool = False) -> Mapping[str, Any]:
    """Return inputs with the position ids that ``generate`` derives from a mask, if the model does not derive its own.

    A model of transformers counts positions by columns, so that a prompt that is padded on the left would begin
    later than the same prompt alone. ``generate`` counts the tokens of the mask instead.

    Args:
        model: whose ``forward`` is given the inputs.
        inputs: keyword arguments of the model.
        of_padding: whether to derive them even if they differ from the columns at padding only.

    Returns:
        The same object if there is nothing to add.
    """
    mask = inputs.get("attention_mask")
    tokens = next((inputs[name] for name in ("input_ids", "inputs_embeds") if inputs.get(name) is not None), None)
    if (
        not isinstance(mask, Tensor)
        or not isinstance(tokens, Tensor)
        or mask.dim() != 2
        or mask.shape != tokens.shape[:2]
        or inputs.get("position_ids") is not None
        or any(inputs.get(name) is not None for name in ("cache", "past_key_values"))
    ):
        return inputs
    outer: Any = model
    inner = outer.get_base_model() if hasattr(outer, "get_base_model") else outer  # peft
    # models with three position ids a token (M-RoPE) derive them from the mask themselves
    if not takes(inner, "position_ids") or any(hasattr(part, "get_rope_index") for part in (inner, *inner.children())):
        return inputs
    is_token: Tensor = mask != 0
    if bool(is_token.all()):
        return inputs
    counted: Tensor = is_token.long().cumsum(-1) - 1
    position_ids = counted.masked_fill(~is_token, 0)
    columns = torch.arange(mask.shape[1], device=mask.device)
    differs: Tensor = position_ids != columns
    if not of_padding and not bool((differs & is_token).any()):
        return inputs
    return {**inputs, "position_ids": position_ids}
