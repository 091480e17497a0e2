"""Ending a forward pass early, once everything that is needed has been computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn, TypeVar

from torch import nn

from featurizers.models.compilation import eager

T = TypeVar("T")


class _Stopped(BaseException):
    """Ends a forward pass; not an Exception, so that no model's code handles it."""

    def __init__(self, pass_: object) -> None:
        self.pass_ = pass_


@contextmanager
def stoppable() -> Iterator[Callable[[], NoReturn]]:
    """Yield a function that ends the ``with`` block when a hook calls it.

    Blocks may be nested: each function ends the block that it was made for.

    Examples:
        >>> import torch
        >>> layer = nn.Linear(2, 2)
        >>> with stoppable() as stop:
        ...     _ = layer.register_forward_hook(lambda *_: stop())
        ...     _ = layer(torch.zeros(2))
        ...     print("not reached")
    """
    this_pass = object()

    def stop() -> NoReturn:
        raise _Stopped(this_pass)

    try:
        yield stop
    except _Stopped as stopped:
        if stopped.pass_ is not this_pass:
            raise


def run_until(module: nn.Module, call: Callable[[], T]) -> T | None:
    """Run a model and end its forward pass after one of its modules has run.

    Hooks that are on the module already run before the pass ends.

    Args:
        module: after which nothing is run.
        call: runs the model.

    Returns:
        What ``call`` returns, or None if it was ended.
    """
    with eager(), stoppable() as stop:
        handle = module.register_forward_hook(lambda *_: stop())
        try:
            return call()
        finally:
            handle.remove()
    return None
