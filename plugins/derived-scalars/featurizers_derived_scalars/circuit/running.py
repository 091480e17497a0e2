"""Run a decoder on one sequence, or on a batch, with hooks on its modules, and leave it unchanged."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from featurizers.format import Side
from featurizers.models import Place as Tap
from featurizers.models import eager, first_tensor, hook, run_until, without_cache
from jaxtyping import Int
from torch import Tensor, nn

from featurizers_derived_scalars.circuit.attention import Listener, listening

Point: TypeAlias = tuple[str, Side]
"""Path of a module, and which side of it: its input or its output."""


@dataclass(frozen=True)
class Arguments:
    """Arguments of an attention module beside the residual stream: mask, positions and so on.

    Attributes:
        positional: those after the residual stream.
        named: those given by name, without the residual stream.
    """

    positional: tuple[Any, ...] = ()
    named: Mapping[str, Any] = field(default_factory=dict)


def run(
    model: nn.Module,
    tokens: Int[Tensor, "*batch token"],
    taps: Mapping[Point, Callable[[Tensor], Tensor]],
    *,
    listener: Listener | None = None,
    on_arguments: Mapping[str, Callable[[Arguments], None]] | None = None,
    stop_after: str | None = None,
) -> Any:
    """Run the model on one sequence, or on a batch, and return its output, or None if the run was stopped.

    Args:
        model: a decoder in evaluation mode.
        tokens: ids.
        taps: for each point, a function from its tensor to the tensor that the model goes on with.
        listener: receives the parts of attention.
        on_arguments: for each attention module, a function that is called with its arguments.
        stop_after: path of the last module to run.
    """
    with eager(), ExitStack() as stack:
        if listener is not None:
            stack.enter_context(listening(model, listener))
        for path, receive in (on_arguments or {}).items():
            handle = model.get_submodule(path).register_forward_pre_hook(_argument_hook(receive), with_kwargs=True)
            stack.callback(handle.remove)
        for (path, side), edit in taps.items():
            stack.callback(hook(Tap(path, model.get_submodule(path), side), edit).remove)
        ids = tokens if tokens.dim() == 2 else tokens[None]
        call = functools.partial(model, input_ids=ids, **without_cache(model))
        return call() if stop_after is None else run_until(model.get_submodule(stop_after), call)


def _argument_hook(receive: Callable[[Arguments], None]) -> Callable[..., None]:
    def on_input(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if args:
            receive(Arguments(tuple(args[1:]), dict(kwargs)))
            return
        stream = "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs))
        first_tensor(kwargs[stream])
        receive(Arguments((), {name: value for name, value in kwargs.items() if name != stream}))

    return on_input
