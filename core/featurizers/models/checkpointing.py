"""Gradient checkpointing is left out of the blocks that are edited or read.

A checkpoint runs its block a second time during ``backward``. By then the hooks of a context may be gone, or belong to
another prompt: the gradient is that of another computation, or of none. A block with a site in it therefore keeps its
activations, as without checkpointing. All other blocks are checkpointed as before, since they hold no hook.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

NAMES = ("_gradient_checkpointing_func", "checkpoint_fn")
"""Attributes that hold the checkpointing function: of transformers' modules, and of torch's ``CheckpointWrapper``."""

_NAMES = frozenset(NAMES)
_lock = threading.Lock()


@contextmanager
def uncheckpointed(model: nn.Module, paths: Iterable[str]) -> Iterator[None]:
    """Run the modules around some modules of a model without gradient checkpointing while the context lasts.

    Contexts may overlap and end in any order. Nothing is changed in a model without checkpointing.

    Args:
        model: whose modules may be checkpointed, reentrant or not.
        paths: of the modules that have hooks.
    """
    modules = tuple({module: None for path in paths for module in _line(model, path)})
    replaced: list[tuple[nn.Module, str]] = []
    with _lock:
        for module in modules:
            own = vars(module)
            if _NAMES.isdisjoint(own):
                continue
            for name in NAMES:
                function = own.get(name)
                if function is None:
                    continue
                if not isinstance(function, _Direct):
                    function = own[name] = _Direct(function)
                function.calls.append(modules)
                replaced.append((module, name))
    try:
        yield
    finally:
        with _lock:
            for module, name in replaced:
                _restore(module, name, modules)


class _Direct:
    """Calls the functions of some modules at once, and those of others through a checkpoint."""

    def __init__(self, checkpoint: Callable[..., Any]) -> None:
        self.checkpoint = checkpoint
        self.calls: list[tuple[nn.Module, ...]] = []
        """Modules that are called at once, for each context that is open."""

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        module = _module_of(function)
        if module is None or any(module is direct for modules in self.calls for direct in modules):
            return function(*args, **kwargs)
        return self.checkpoint(function, *args, **kwargs)


def _restore(module: nn.Module, name: str, modules: tuple[nn.Module, ...]) -> None:
    function = vars(module).get(name)
    if isinstance(function, _Direct):  # else checkpointing was set anew inside the context
        function.calls = [others for others in function.calls if others is not modules]
        if not function.calls:
            vars(module)[name] = function.checkpoint


def _line(model: nn.Module, path: str) -> list[nn.Module]:
    """Return the model and the modules on the way to a path, the last one included."""
    line = [model]
    for name in path.split(".") if path else ():
        child: Any = line[-1]._modules.get(name)
        line.append(getattr(line[-1], name) if child is None else child)
    return line


def _module_of(function: Any) -> nn.Module | None:
    """Return the module that a checkpointed function runs: itself, the owner of a method, or that of a ``partial``."""
    for candidate in (function, getattr(function, "__self__", None), *getattr(function, "args", ())[:1]):
        if isinstance(candidate, nn.Module):
            return candidate
    inner = getattr(function, "func", None)
    return None if inner is None else _module_of(inner)
