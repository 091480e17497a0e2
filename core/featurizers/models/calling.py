"""Arguments of a model's ``forward``, and the cache of keys and values by the name that each version gives it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

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
