"""Hooks on the activations of a place."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from featurizers.errors import SiteError
from featurizers.models.places import Place, edit_columns, first_tensor
from featurizers.models.routing import check_router, rerouted


class Handle(Protocol):
    """Handle of a hook."""

    def remove(self) -> None:
        """Take the hook off."""


def hook(place: Place, edit: Callable[[Tensor], Tensor], *, first: bool = False, only_reads: bool = False) -> Handle:
    """Register a hook that passes the activations of a place through ``edit``.

    The rest of the module's input or output is unchanged. Other backends are built on this function.

    Args:
        place: of the activations.
        edit: returns the activations to go on with; its own argument, to change nothing.
        first: whether to act before the hooks that are on the module already; else the hook acts after them.
        only_reads: whether ``edit`` always returns its argument.

    Returns:
        The handle; the caller removes the hook with it.
    """
    if place.stream is not None and place.sum_reader is not None:
        return _hook_on_sum(place, place.stream, place.sum_reader, edit, first=first, only_reads=only_reads)
    if place.tokens is not None and place.experts is not None:
        return _hook_on_router(place, place.tokens, place.experts, edit, first=first)

    def part(hidden: Tensor) -> Tensor:
        return edit_columns(place, hidden, edit)

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


class _Handles:
    """Handles of several hooks as one."""

    def __init__(self, handles: list[Handle]) -> None:
        self._handles = handles

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()


def _hook_on_sum(
    added: Place, stream: Place, reader: Place, edit: Callable[[Tensor], Tensor], *, first: bool, only_reads: bool
) -> Handle:
    """Register hooks that pass a sum of two places through ``edit``: the change is added to the second summand.

    The model computes the sum itself. That it is this sum is checked in the first pass, at the module that reads it.
    Hooks that edit one of the two places are to be registered before these.

    Args:
        added: place whose activations are added to the stream.
        stream: place of the stream before.
        reader: place that must have the sum.
        edit: as in `hook`.
        first: as in `hook`.
        only_reads: whether ``edit`` changes nothing, so that it may be called where the sum is read.

    Raises:
        SiteError: in the pass, if the module reads something else, as in parallel blocks, or if a later hook edits a
            summand.
    """
    local = threading.local()
    is_checked = False
    hooks_of_added: Mapping[int, Any] = added.module._forward_hooks

    def note(hidden: Tensor) -> Tensor:
        local.stream = hidden
        return hidden

    def on_added(hidden: Tensor) -> Tensor:
        if only_reads:
            local.expected = None if is_checked else local.stream + hidden
            return hidden
        total = local.stream + hidden
        edited = edit(total)
        result = hidden if edited is total else hidden + (edited - total)
        local.expected = None if is_checked else local.stream + result
        return result

    def on_reader(hidden: Tensor) -> Tensor:
        nonlocal is_checked
        if not is_checked:
            is_checked = torch.equal(hidden, local.expected)
            last = list(hooks_of_added.values())[-1]
            if not is_checked and (last is own or not hasattr(last, _ON_SUM)):  # a later one on the sum checks it too
                raise SiteError(
                    f"resid.mid: the input of {reader.path!r} is not the sum of {stream.path!r} and {added.path!r}. "
                    "Either this block has no stream between attention and MLP, or scales it: choose another site. Or "
                    "a hook that was registered later edits one of the two: give both edits to one intervene"
                )
        return edit(hidden) if only_reads else hidden

    places = [(stream, note), (replace(added, stream=None, sum_reader=None), on_added), (reader, on_reader)]
    before = [(first and function is on_added) or function is on_reader for _, function in places]
    handles: list[Any] = [hook(p, function, first=b) for (p, function), b in zip(places, before, strict=True)]
    own = hooks_of_added[handles[1].id]
    setattr(own, _ON_SUM, True)
    return _Handles(handles)


_ON_SUM = "featurizers_acts_on_a_sum"
"""Attribute of hooks that act on a sum of two places."""


def _hook_on_router(
    router: Place, tokens: Place, experts: Place, edit: Callable[[Tensor], Tensor], *, first: bool
) -> Handle:
    """Register hooks that pass a router's logits through ``edit`` and choose the experts by the result.

    That the router and the experts work together as they should is checked in the first pass.

    Args:
        router: place of the module that returns logits, weights and indices.
        tokens: place whose activations are ``(batch, sequence, d)``, while the router may see all tokens in a row.
        experts: place of the module that must take the weights and the indices.
        edit: as in `hook`.
        first: as in `hook`.

    Raises:
        SiteError: in the pass, if the logits are not what the experts are chosen by.
    """
    local = threading.local()
    is_checked = is_taken = False

    def note(hidden: Tensor) -> Tensor:
        local.axes = hidden.shape[:-1]
        return hidden

    def on_router(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        nonlocal is_checked
        if not is_checked:
            check_router(module, args, kwargs, f"mlp.router, {router.path}")
            is_checked = True
        logits = output[0].reshape(*local.axes, output[0].shape[-1])
        edited = edit(logits)
        local.output = output if edited is logits else rerouted(module, args, kwargs, edited.reshape(output[0].shape))
        return local.output

    def on_experts(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal is_taken
        if is_taken or not _is_last(handles[1], router.module._forward_hooks):
            return  # hooks of other contexts that come after check for themselves
        taken = [*args, *kwargs.values()]
        is_taken = all(any(each is part for each in taken) for part in local.output[1:3])
        if not is_taken:
            raise SiteError(
                f"mlp.router: {experts.path!r} does not take the weights and indices that {router.path!r} returns, so "
                "that an edit of the logits might do nothing; choose another site"
            )

    handles: list[Handle] = [
        hook(tokens, note),
        router.module.register_forward_hook(on_router, with_kwargs=True, prepend=first),
        experts.module.register_forward_pre_hook(on_experts, with_kwargs=True, prepend=True),
    ]
    return _Handles(handles)


def _is_last(handle: Any, hooks: Mapping[int, Any]) -> bool:
    return bool(next(reversed(list(hooks)), None) == handle.id)
