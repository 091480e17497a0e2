"""Frozen modules: attention or MLPs that give packed rows what they gave in the clean run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from featurizers.models import Place, Wrap, hook
from torch import Tensor

from featurizers_patching.engine.scope import active, standing_in


@contextmanager
def frozen_output(run: object, place: Place, wrap: Wrap, clean: Tensor, own: Tensor | None) -> Iterator[None]:
    """Let a module give clean outputs where a run is active; register the hooks of edits after this.

    Args:
        run: the active run.
        place: the module's output.
        wrap: form of the output.
        clean: its clean outputs of the packed rows, ``(rows, d)``.
        own: rows that an edit inside of the module changes, which are not frozen, ``(rows,)`` booleans; None if there
            are none, and the module need not run.
    """

    def freeze(hidden: Tensor) -> Tensor:
        if active() is not run or own is None:
            return hidden
        flat = hidden.reshape(clean.shape)
        return torch.where(own.unsqueeze(-1), flat, clean).view(hidden.shape)

    def give(*_: Any, **__: Any) -> Any:
        return wrap(clean.unsqueeze(0))

    with ExitStack() as stack:
        if own is None:
            stack.enter_context(standing_in(place.module, run, give))
        else:
            stack.callback(hook(place, freeze, first=True).remove)
        yield
