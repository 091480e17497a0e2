"""The cache of keys and values, which transformers 5.24 calls by a name that TransformerLens 4.3 does not read.

transformers renamed ``past_key_values`` to ``cache``. TransformerLens' attention looks for the old name, finds nothing,
and leaves the cache empty: each pass of a generation sees its own tokens alone, in the clean model as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakSet

from featurizers.errors import UsageError
from torch import nn

NAMES = ("cache", "past_key_values")


@contextmanager
def fill_cache(bridge: nn.Module) -> Iterator[None]:
    """Let the attention of a bridge fill the cache that it is given, while the context lasts.

    Generation with a cache then gives the tokens that the model of `transformers` gives. Nothing changes for versions
    of TransformerLens and transformers that agree on the name.

    Args:
        bridge: a TransformerBridge.

    Raises:
        UsageError: it has no blocks.

    Examples:
        >>> with fill_cache(bridge):  # doctest: +SKIP
        ...     bridge.generate(ids, max_new_tokens=8)
    """
    blocks: Any = getattr(bridge, "blocks", None)
    if not isinstance(blocks, nn.ModuleList):
        raise UsageError(f"fill_cache takes a TransformerBridge, not {type(bridge).__name__}")
    with ExitStack() as hooks:
        for block in blocks:
            if isinstance(attention := getattr(block, "attn", None), nn.Module):
                hooks.callback(attention.register_forward_pre_hook(_by_old_name, with_kwargs=True).remove)
        yield


def _by_old_name(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if kwargs.get("cache") is None or kwargs.get("past_key_values") is not None:
        return None
    return args, {**kwargs, "past_key_values": kwargs["cache"]}


@contextmanager
def refusing_empty_caches(decoder: nn.Module) -> Iterator[None]:
    """Raise UsageError in a pass that goes on from a cache which the pass before has left empty."""
    unfilled: WeakSet[Any] = WeakSet()

    def before(_: nn.Module, __: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if (cache := _cache(kwargs)) is not None and cache in unfilled:
            raise UsageError(
                "this version of TransformerLens does not fill the cache of this version of transformers, so that "
                "each token is computed without those before it; run it inside "
                "featurizers_transformer_lens.fill_cache(bridge), or "
                "generate with use_past_kv_cache=False (use_cache=False in `generate` of transformers)"
            )

    def after(_: nn.Module, __: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        for values in (kwargs, output):  # the first pass may make its cache itself
            if (cache := _cache(values)) is not None and _is_empty(cache):
                unfilled.add(cache)

    handles = [
        decoder.register_forward_pre_hook(before, with_kwargs=True),
        decoder.register_forward_hook(after, with_kwargs=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _cache(values: Any) -> Any:
    """Return the cache object among the arguments or outputs of a decoder; None if there is none."""
    names = values.keys() if hasattr(values, "keys") else ()
    cache = next((values[name] for name in NAMES if name in names and values[name] is not None), None)
    return cache if hasattr(cache, "get_seq_length") else None


def _is_empty(cache: Any) -> bool:
    """Return whether a cache of attention holds no token; a cache of states alone does not know its length."""
    try:
        return int(cache.get_seq_length()) == 0
    except ValueError:
        return False
