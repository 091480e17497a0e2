"""Hooks on the activations of a place, and the columns of activations that an edit concerns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from featurizers.models.anatomy import Place, first_tensor


def scatter(hidden: Tensor, chosen: Tensor, edited: Tensor) -> Tensor:
    """Replace columns of activations: the inverse of `gather`.

    Args:
        hidden: activations, ``(batch, sequence, d)``.
        chosen: columns, ``(batch, n)``.
        edited: what to put there, ``(batch, n, d)``.
    """
    rows = torch.arange(hidden.shape[0], device=hidden.device).unsqueeze(-1)
    return hidden.index_put((rows, chosen), edited)


def gather(hidden: Tensor, chosen: Tensor | None) -> Tensor:
    """Return columns of activations, ``(batch, n, d)``.

    Args:
        hidden: activations, ``(batch, sequence, d)``.
        chosen: columns, ``(batch, n)``; None for all of ``hidden``.
    """
    if chosen is None:
        return hidden
    return hidden.gather(1, chosen.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))


def hook(place: Place, edit: Callable[[Tensor], Tensor], *, first: bool = False) -> RemovableHandle:
    """Register a hook that passes the activations of a place through ``edit``.

    The rest of the module's input or output is unchanged. Other backends are built on this function.

    Args:
        place: of the activations.
        edit: returns the activations to go on with; its own argument, to change nothing.
        first: whether to act before the hooks that are on the module already; else the hook acts after them.

    Returns:
        The handle; the caller removes the hook with it.
    """

    def part(hidden: Tensor) -> Tensor:
        if place.columns is None:
            return edit(hidden)
        chosen = hidden[..., place.columns]
        edited = edit(chosen)
        if edited is chosen:
            return hidden
        return torch.cat([hidden[..., : place.columns.start], edited, hidden[..., place.columns.stop :]], dim=-1)

    def on_output(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        hidden = first_tensor(output)
        edited = part(hidden)
        if edited is hidden:
            return None
        return (edited, *output[1:]) if isinstance(output, tuple) else edited

    def on_input(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (part(first_tensor(args)), *args[1:]), kwargs
        name = "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs), "hidden_states")
        return args, {**kwargs, name: part(first_tensor(kwargs.get(name)))}

    if place.side == "output":
        return place.module.register_forward_hook(on_output, prepend=first)
    return place.module.register_forward_pre_hook(on_input, with_kwargs=True, prepend=first)
