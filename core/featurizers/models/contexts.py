"""Scope of contexts: the hooks of each act in the thread or task that opened it, and in those started from there.

Hooks are registered on modules, so that every thread that runs the model calls them. A hook acts if its context is open
in the current `contextvars.Context`, which asyncio tasks and ``asyncio.to_thread`` inherit. A plain thread inherits
nothing; it counts as started inside a context if it has opened none itself and was not running when that one opened.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

counter = itertools.count(1)
"""Order of events: contexts that open, prompts that begin."""


class Context:
    """Open `intervene` context.

    Attributes:
        opened: number of the event, from `counter`.
    """

    def __init__(self) -> None:
        self.opened = next(counter)
        self._is_open = True
        self._running = frozenset(  # threads that torch starts itself, for backward passes, are dummies
            thread.ident for thread in threading.enumerate() if not isinstance(thread, threading._DummyThread)
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Context:
        """Return the context itself: a copy of a model in a context is edited as the model is."""
        return self

    def acts(self) -> bool:
        """Return whether the hooks of this context act in the current thread and task."""
        contexts = _contexts.get()
        if self in contexts:
            return True
        return not any(other._is_open for other in contexts) and threading.get_ident() not in self._running

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Open the context in the current thread or task; contexts may close in any order, and in another task."""
        _contexts.set(_contexts.get() | {self})
        try:
            yield
        finally:
            self._is_open = False
            _contexts.set(frozenset(other for other in _contexts.get() if other._is_open))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Let this context not act in the current thread and task; others act as before."""
        token = _contexts.set((_contexts.get() | {_ALONE}) - {self})
        try:
            yield
        finally:
            _contexts.reset(token)


_contexts: ContextVar[frozenset[Context]] = ContextVar("featurizers_contexts", default=frozenset())
_ALONE = Context()
_reader: ContextVar[object] = ContextVar("featurizers_reader", default=None)


@contextmanager
def unedited() -> Iterator[None]:
    """Let no context act in the current thread and task, as while a source is read."""
    token = _contexts.set(frozenset({_ALONE}))
    try:
        yield
    finally:
        _contexts.reset(token)


@contextmanager
def reading() -> Iterator[object]:
    """Yield a mark of one reading pass; `is_reading` of the mark is true in this thread and task alone."""
    mark = object()
    token = _reader.set(mark)
    try:
        yield mark
    finally:
        _reader.reset(token)


def is_reading(mark: object) -> bool:
    """Return whether the innermost reading pass of the current thread and task is the one of this mark."""
    return _reader.get() is mark
