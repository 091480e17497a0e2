"""Runs a decoder on one sequence and shows what its modules take and give, leaving it as it was."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any, TypeAlias

from featurizers.format import Side
from featurizers.models import Place as Tap
from featurizers.models import first_tensor, hook
from jaxtyping import Int
from torch import Tensor, nn

from featurizers_derived_scalars.activations import Arguments
from featurizers_derived_scalars.attention import Listener, listening

Point: TypeAlias = tuple[str, Side]
"""Path of a module, and whether its input or its output is meant."""


class _Stop(BaseException):
    """Ends a run whose rest nobody needs; not an Exception, so that no model handles it."""


def run(
    model: nn.Module,
    tokens: Int[Tensor, " token"],
    taps: Mapping[Point, Callable[[Tensor], Tensor]],
    *,
    listener: Listener | None = None,
    arguments: Mapping[str, Callable[[Arguments], None]] | None = None,
    stop_after: str | None = None,
) -> Any:
    """What the model answers for one sequence; None if it was stopped.

    Args:
        model: a decoder in evaluation mode.
        tokens: ids.
        taps: for each point, a function from its tensor to what the model goes on with.
        listener: of attention.
        arguments: for each attention module, who is told what it is called with.
        stop_after: path of the module after which nothing is run.
    """
    with ExitStack() as stack:
        if listener is not None:
            stack.enter_context(listening(model, listener))
        for path, tell in (arguments or {}).items():
            handle = model.get_submodule(path).register_forward_pre_hook(_telling(tell), with_kwargs=True)
            stack.callback(handle.remove)
        for (path, side), edit in taps.items():
            stack.callback(hook(Tap(path, model.get_submodule(path), side), edit).remove)
        if stop_after is not None:
            stack.callback(model.get_submodule(stop_after).register_forward_hook(_stop).remove)
        try:
            return model(input_ids=tokens[None], use_cache=False)
        except _Stop:
            return None


def _stop(*_: Any) -> None:
    raise _Stop


def _telling(tell: Callable[[Arguments], None]) -> Callable[..., None]:
    def on_input(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if args:
            tell(Arguments(tuple(args[1:]), dict(kwargs)))
            return
        name = "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs))
        first_tensor(kwargs[name])
        tell(Arguments((), {key: value for key, value in kwargs.items() if key != name}))

    return on_input
