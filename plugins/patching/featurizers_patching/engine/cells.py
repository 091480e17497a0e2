"""`Cells`: a table of edits and results. A cell is a set of edits of one prompt, whose logits are one result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from torch import Tensor

from featurizers_patching.engine.spots import Spot

IntArray: TypeAlias = npt.NDArray[np.int64]
BoolArray: TypeAlias = npt.NDArray[np.bool_]

Edit: TypeAlias = Callable[[Tensor, IntArray], Tensor]
"""Maps activations ``(k, width)`` and the numbers of k edits to the activations to go on with, ``(k, width)``."""


@dataclass(frozen=True)
class Cells:
    """Cells and their edits.

    The edits of one cell are at different tokens or sites.

    Attributes:
        pair: number of each cell's prompt, ``(cells,)``.
        cell: cell of each edit, ``(edits,)``.
        spot: number of the site of each edit, among those of the sweep.
        token: token of the prompt that it changes.
        number: of each edit in the whole sweep, by which an `Edit` knows what to put there.
    """

    pair: IntArray
    cell: IntArray
    spot: IntArray
    token: IntArray
    number: IntArray

    @classmethod
    def of(cls, pair: Any, cell: Any, spot: Any, token: Any) -> Cells:
        """Make a table from arrays or lists."""
        pair, cell, spot, token = (np.asarray(each, dtype=np.int64) for each in (pair, cell, spot, token))
        return cls(pair, cell, spot, token, np.arange(len(cell)))

    def __len__(self) -> int:
        """Return the number of cells."""
        return len(self.pair)

    def take(self, chosen: IntArray) -> Cells:
        """Return some cells, in the order given, with their edits."""
        new = np.full(len(self), -1)
        new[chosen] = np.arange(len(chosen))
        kept = np.flatnonzero(new[self.cell] >= 0)
        kept = kept[np.argsort(new[self.cell[kept]], kind="stable")]
        return Cells(self.pair[chosen], new[self.cell[kept]], self.spot[kept], self.token[kept], self.number[kept])

    def keep(self, edits: BoolArray) -> Cells:
        """Return the same cells with some of their edits."""
        return Cells(self.pair, self.cell[edits], self.spot[edits], self.token[edits], self.number[edits])

    def first_token(self, otherwise: IntArray) -> IntArray:
        """Return the first token that each cell edits, ``(cells,)``.

        Args:
            otherwise: for a cell without edits, ``(cells,)``; larger than every token that is edited.
        """
        first = otherwise.copy()
        np.minimum.at(first, self.cell, self.token)
        return first


def with_effect(cells: Cells, spots: Sequence[Spot], at: IntArray, n_blocks: int, *, attends: bool) -> BoolArray:
    """Return for each edit whether it can change the logits that are read, by causality alone.

    Args:
        cells: of the sweep.
        spots: its sites.
        at: tokens whose logits are read, ``(prompts, n)``.
        n_blocks: of the model.
        attends: whether attention moves what was edited, rather than being frozen.
    """
    attends = attends or any(spot.reads for spot in spots)  # what is read may be used where nothing is frozen
    pair = cells.pair[cells.cell]
    is_read = (at[pair] == cells.token[:, None]).any(axis=1)
    block = np.array([spot.block for spot in spots])[cells.spot]
    mixes = np.array([spot.mixes for spot in spots])[cells.spot]
    own = np.array([spot.part == "attn.out" and spot.mixes for spot in spots])[
        cells.spot
    ]  # its attention is not frozen
    within = own if not attends else (block < n_blocks - 1) | (mixes & (block == n_blocks - 1))
    effect: BoolArray = is_read | (within & (cells.token <= at.max(axis=1)[pair]))
    return effect
