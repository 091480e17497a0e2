"""Routers of mixtures of experts: which experts, and with what weights, follow from logits that were edited.

The routers of transformers return logits, weights and indices of the chosen experts, and the block uses only the latter
two. An edit of the logits alone would do nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from featurizers.errors import SiteError


def rerouted(router: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], logits: Tensor) -> tuple[Any, ...]:
    """Return what a router would return if its linear map gave these logits; the router's own code does the rest.

    Args:
        router: as `check_router` accepts it.
        args: of its call.
        kwargs: likewise.
        logits: in the shape in which it returns them.
    """
    with _Given(logits):
        output: tuple[Any, ...] = router.forward(*args, **kwargs)
    return output


@torch.no_grad()
def check_router(router: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], site: str) -> None:
    """Raise a SiteError unless a router returns first the result of its one linear map, and all else follows from it.

    Args:
        router: whose call is looked at.
        args: of the call.
        kwargs: likewise.
        site: name for the error.
    """
    output = router.forward(*args, **kwargs)  # without hooks, which may have edited what the call returned
    what = f"{site}: {type(router).__name__}"
    if not isinstance(output, tuple) or len(output) < 3 or not all(isinstance(part, Tensor) for part in output[:3]):
        raise SiteError(f"{what} does not return logits, weights and indices of the experts. {_HELP}")
    with _Given(output[0], compare=True) as given:
        again = router.forward(*args, **kwargs)
    same = all(torch.equal(one, other) for one, other in zip(output[:3], again[:3], strict=True))
    if given.calls != 1 or not given.is_same or not same:
        raise SiteError(f"{what} does not return first the logits that it chooses the experts by. {_HELP}")


_HELP = "Name the module itself, as in 'module:PATH:output', to read what it returns."


class _Given(TorchFunctionMode):
    """Makes a linear map return logits that are given, in the code that runs in this context.

    Args:
        logits: to return, where a linear map has as many outputs.
        compare: whether to compute the map too and compare.

    Attributes:
        calls: number of such maps.
        is_same: whether they returned the logits themselves.
    """

    def __init__(self, logits: Tensor, *, compare: bool = False) -> None:
        super().__init__()
        self._logits, self._compare = logits, compare
        self.calls, self.is_same = 0, True

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call a function of torch, or return the logits for a linear map with as many outputs."""
        named = dict(kwargs or {})
        if func is not torch.nn.functional.linear:
            return func(*args, **named)
        hidden, weight = [*args, *(named[name] for name in ("input", "weight") if name in named)][:2]
        if weight.shape[0] != self._logits.shape[-1]:
            return func(*args, **named)
        self.calls += 1
        logits = self._logits.reshape(*hidden.shape[:-1], weight.shape[0])
        if self._compare:
            found = func(*args, **named)
            self.is_same &= found.shape == logits.shape and torch.equal(found.to(logits.dtype), logits)
        return logits.clone()  # the router may write into it
