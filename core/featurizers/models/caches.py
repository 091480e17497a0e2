"""Number of tokens in a cache of any class, and when its prompt was computed."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor

CACHE_NAMES = ("cache", "past_key_values", "cache_params")
"""Names of the cache among the arguments and outputs of models; transformers 5.24 uses ``cache``."""


class CacheLog:
    """Caches that the passes of one model have filled, with the tokens counted and the event that began the prompt.

    A cache of linear attention or of states alone does not know its length, and that of a hybrid model may ask the
    wrong layer. Therefore tokens are counted for each cache object as well.
    """

    def __init__(self) -> None:
        self._entries: WeakKeyDictionary[Any, tuple[int, int]] = WeakKeyDictionary()

    def start(self, cache: Any) -> int:
        """Return the number of tokens in a cache; at least 1 if it holds some and their number is not known."""
        if cache is None:
            return 0
        if isinstance(cache, tuple | list):
            return _length_of_tuple(cache)
        if length := _length(cache):
            return length
        if not _holds_states(cache):
            return 0
        return self._entries[cache][0] if cache in self._entries else 1

    def began(self, cache: Any) -> int:
        """Return the event at which the first tokens of a cache were computed; 0 if no watched pass did."""
        if isinstance(cache, tuple | list) or cache not in self._entries:
            return 0
        return self._entries[cache][1]

    def add(self, cache: Any, tokens: int, began: int) -> None:
        """Note after a pass that a cache holds some tokens, whose first were computed at an event."""
        if cache is not None and not isinstance(cache, tuple | list):
            self._entries[cache] = (tokens, began)


def cache_of(values: Any) -> Any:
    """Return the cache among a model's arguments or outputs; None if there is none."""
    if isinstance(values, tuple):  # return_dict=False
        return next((value for value in values if hasattr(value, "get_seq_length")), None)
    if not hasattr(values, "get"):
        return None
    names = values.keys()  # asking for a name that is not there makes transformers warn that it is deprecated
    return next((values[name] for name in CACHE_NAMES if name in names and values[name] is not None), None)


def _length(cache: Any) -> int:
    """Return the largest number of tokens that the cache or one of its layers names; 0 if none does."""
    try:
        if length := int(cache.get_seq_length()):
            return length
    except (AttributeError, ValueError):  # layers of states alone
        pass
    layers = getattr(cache, "layers", None) or ()
    return max((int(layer.get_seq_length()) for layer in layers if hasattr(layer, "get_seq_length")), default=0)


def _holds_states(cache: Any) -> bool:
    """Return whether a cache holds states of linear attention, which have no length."""
    if any(isinstance(state, Tensor) for state in getattr(cache, "linear_cache", ())):
        return True
    for part in (cache, *(getattr(cache, "layers", None) or ())):
        states = getattr(part, "has_previous_state", False)
        if any(states.values()) if isinstance(states, dict) else states is True:
            return True
    return False


def _length_of_tuple(cache: Any) -> int:
    first = cache[0] if cache else None
    keys = first[0] if isinstance(first, tuple | list) and first else first
    return int(keys.shape[-2]) if isinstance(keys, Tensor) and keys.dim() >= 2 else 0
