"""Which run of the engine is active in the current thread or task, and stand-ins that act in that run alone."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

_active: ContextVar[object | None] = ContextVar("featurizers_patching_run", default=None)
_locks: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
_guard = threading.Lock()


class NotPackableError(Exception):
    """Raised where a model cannot run on packed rows; the sweep then runs it whole, and warns with this reason."""


def active() -> object | None:
    """Return the run that is active in the current thread or task; None outside any."""
    return _active.get()


@contextmanager
def entered(model: nn.Module, run: object) -> Iterator[None]:
    """Make a run active in this thread or task. Runs of one model in several threads wait for each other."""
    with _guard:
        lock = _locks.setdefault(model, threading.RLock())
    with lock:
        token = _active.set(run)
        try:
            yield
        finally:
            _active.reset(token)


@contextmanager
def standing_in(module: nn.Module, run: object, forward: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """Replace the ``forward`` of a module where ``run`` is active; elsewhere, and afterwards, it is the module's own.

    Hooks on the module stay. Use it inside `entered`, so that no other run replaces the same ``forward`` meanwhile.

    Yields:
        The module's own ``forward``.
    """
    before = vars(module).get("forward")
    own: Callable[..., Any] = module.forward

    def choose(*args: Any, **kwargs: Any) -> Any:
        return (forward if _active.get() is run else own)(*args, **kwargs)

    vars(module)["forward"] = choose
    try:
        yield own
    finally:
        if before is None:
            del vars(module)["forward"]
        else:
            vars(module)["forward"] = before
