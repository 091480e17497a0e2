"""Hooks that edit packed rows of activations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
from featurizers.errors import ShapeError
from featurizers.models import Place, hook
from torch import Tensor

from featurizers_patching.engine.cells import Edit, IntArray
from featurizers_patching.engine.scope import NotPackableError, active
from featurizers_patching.engine.spots import Spot, own_columns, with_columns


@dataclass(frozen=True)
class SpotEdits:
    """Edits at one site.

    Attributes:
        spot: the site.
        edit: computes the activations to go on with.
        rows: of the packed batch, to edit.
        numbers: of the edits.
    """

    spot: Spot
    edit: Edit
    rows: IntArray
    numbers: IntArray


class RowHooks:
    """Hooks for the edits of one block, one for each module: edits of its heads share it.

    Args:
        run: in which they act.
        edits: by site.
        index: maps rows of the packed batch to those that a module sees, given how many it sees.
    """

    def __init__(self, run: object, edits: Sequence[SpotEdits], index: Callable[[IntArray, int], IntArray]) -> None:
        self._run, self._index = run, index
        self._groups: dict[tuple[int, str, bool], list[SpotEdits]] = {}
        for each in edits:
            place = each.spot.place
            self._groups.setdefault((id(place.module), place.side, place.stream is None), []).append(each)
        self._called: set[tuple[int, str, bool]] = set()

    def register(self, stack: ExitStack) -> None:
        """Register the hooks, which the stack removes."""
        # sums last: their hooks check what the next module reads, after all other edits
        for key, group in sorted(self._groups.items(), key=lambda each: not each[0][2]):
            stack.callback(hook(replace(group[0].spot.place, columns=None, groups=1), self._hook(key, group)).remove)

    def check(self) -> None:
        """Raise NotPackableError if a module was not called."""
        for key, group in self._groups.items():
            if key not in self._called:
                raise NotPackableError(f"{group[0].spot.site} was not computed")

    def _hook(self, key: tuple[int, str, bool], group: list[SpotEdits]) -> Callable[[Tensor], Tensor]:
        def edit(hidden: Tensor) -> Tensor:
            if active() is not self._run:
                return hidden
            self._called.add(key)
            flat = hidden.reshape(-1, hidden.shape[-1]).clone()
            for each in group:
                rows = torch.as_tensor(self._index(each.rows, len(flat)), device=flat.device)
                flat = self._edited(flat, rows, each)
            return flat.view(hidden.shape)

        return edit

    def _edited(self, flat: Tensor, rows: Tensor, each: SpotEdits) -> Tensor:
        place: Place = each.spot.place
        whole = flat.index_select(0, rows)
        base = own_columns(place, whole)
        new = each.edit(base, each.numbers)
        if new.shape != base.shape:
            raise ShapeError(f"{each.spot.site}: the edit of {tuple(base.shape)} gives {tuple(new.shape)}")
        new = with_columns(place, whole, new.to(flat.dtype))
        return (
            flat.index_copy(0, rows, new) if flat.requires_grad or new.requires_grad else flat.index_copy_(0, rows, new)
        )
