"""Compiled models run eagerly while hooks are on them.

A hook that is registered after ``torch.compile`` has compiled a module is not called: dynamo does not look at hooks
again. Nothing on a model says for certain that it is compiled, since a function around it may be. Therefore everything
compiled runs eagerly, by the stance ``force_eager`` of ``torch.compiler``. The stance belongs to the process, and its
own context manager restores the wrong one if contexts end in another order than they began. Hence one count for all.
"""

from __future__ import annotations

import sys
import threading
from contextlib import AbstractContextManager
from typing import Any, Final, NoReturn

import torch

from featurizers.errors import UsageError


def eager() -> AbstractContextManager[None]:
    """Run everything that is compiled eagerly while the context lasts, so that hooks on its modules are called.

    Contexts may overlap, in several threads too, and end in any order: the first sets the stance, and the last restores
    the one from before, unless somebody has set another one meanwhile. Nothing is compiled again afterwards.

    Raises:
        UsageError: the context is entered inside a compiled function.

    Examples:
        >>> layer = torch.nn.Linear(2, 2)
        >>> compiled, called = torch.compile(layer, backend="eager"), []
        >>> _ = compiled(torch.zeros(2))
        >>> handle = layer.register_forward_hook(lambda *_: called.append("hook"))
        >>> with eager():
        ...     _ = compiled(torch.zeros(2))
        >>> called
        ['hook']
    """
    return _EAGER


def refuse_compiled_caller() -> None:
    """Raise UsageError inside a function that ``torch.compile`` compiles, where hooks may be skipped."""
    if torch.compiler.is_compiling():
        # torch 2.8 cannot compile the raising of our errors
        torch.compiler.disable(_refuse)()  # type: ignore[no-untyped-call]


def _refuse() -> NoReturn:
    raise UsageError(_COMPILED_CALLER)


_COMPILED_CALLER: Final = (
    "the model was to be read or edited inside a function that torch.compile compiles, which may skip its hooks; take "
    "torch.compile off that function (the model itself may be compiled)"
)


class _Stance:
    """Stance of the process, counted.

    Attributes:
        contexts: number of contexts that are open.
        held: stance that was set for them; None if none was needed so far.
        blind: whether one of them began before dynamo was imported: what is compiled in it may have its hooks inside.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.contexts = 0
        self.held: Any = None
        self.blind = False

    def enter(self) -> None:
        with self.lock:
            # torch.compile imports dynamo, and so does transformers; without it nothing is compiled
            if self.held is None and "torch._dynamo" in sys.modules:
                try:
                    self.held = torch.compiler.set_stance("force_eager")
                except RuntimeError as error:
                    raise UsageError(_COMPILED_CALLER) from error
            self.blind |= self.held is None
            self.contexts += 1

    def leave(self) -> None:
        with self.lock:
            self.contexts -= 1
            if self.contexts:
                return
            if self.blind and "torch._dynamo" in sys.modules:
                torch.compiler.reset()
            held, self.held, self.blind = self.held, None, False
            if held is not None:
                now = torch.compiler.set_stance("default")
                (held if now.prev is held.stance else now).__exit__(None, None, None)


_stance = _Stance()


class _Eager(AbstractContextManager[None]):
    """See `eager`."""

    def __enter__(self) -> None:
        _stance.enter()

    def __exit__(self, *_: object) -> None:
        _stance.leave()


_EAGER = _Eager()
