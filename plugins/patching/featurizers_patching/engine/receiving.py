"""Path patching: what receivers read after an edit at a sender, and cells that give it to the receivers alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from featurizers import Anatomy, Site
from torch import Tensor

from featurizers_patching.engine.cells import BoolArray, Cells, Edit, IntArray
from featurizers_patching.engine.scope import NotPackableError
from featurizers_patching.engine.spots import Spot, spot_of
from featurizers_patching.engine.sweep import Report

_WITHIN_BLOCK: Final = {"resid.pre": 0, "attn.q": 1, "attn.k": 1, "attn.v": 1, "mlp.in": 2, "resid.post": 3}
"""Kinds of receivers, in the order in which a block computes them."""


@dataclass(frozen=True)
class Senders:
    """Cells of senders.

    Attributes:
        cells: of a sweep.
        sites: of the cells.
        equal: whether each edit is known to change nothing, ``(edits,)``.
        last: last token that is read of each prompt, ``(prompts,)``.
    """

    cells: Cells
    sites: Sequence[Site]
    equal: BoolArray
    last: IntArray


class Receiving:
    """Two sweeps of the same cells: one that edits senders and reads receivers, and one that edits receivers.

    With attention frozen, an edit of a token changes the inputs of later modules at this token alone, and an edit of a
    key or a value the outputs of its own attention at later tokens too. In the second sweep receivers read at all
    tokens what they read in the first: also where that is clean, because receivers before them change the stream there.

    Args:
        anatomy: of the model.
        senders: what is edited in the first sweep.
        receivers: sites that are read in the first sweep and edited in the second.
        report: of the sweeps. Where it says that tokens meet outside of attention too, receivers are read at all later
            tokens.

    Attributes:
        cells: of the first sweep: the edits of the senders, and after them edits that read.
        sites: of the first sweep.
        reads: numbers of the sites that are only read.
        equal: of the first sweep.

    Raises:
        NotPackableError: it is not known where a sender is.
    """

    def __init__(self, anatomy: Anatomy, senders: Senders, receivers: Sequence[Site], report: Report) -> None:
        self._report, self._receivers = report, receivers
        given, n_sites = senders.cells, len(senders.sites)
        self._first = int(given.number.max(initial=-1)) + 1
        to = [spot_of(anatomy, site) for site in receivers]
        cells, spots, tokens = [], [], []
        for number, site in enumerate(senders.sites):
            spot = spot_of(anatomy, site)
            chosen = (given.spot == number) & ~senders.equal
            changed = given.cell[chosen], given.token[chosen]
            later = _until_last(senders, *changed)
            if not report.packed or (spot.mixes and spot.part == "attn.out"):
                changed = later
            after = [r for r, receiver in enumerate(to) if receiver.block >= spot.block]
            earliest = min((_order(to[r]) for r in after), default=None)
            for r in after:
                cell, token = changed if _order(to[r]) == earliest else later
                cells.append(cell)
                spots.append(np.full(len(cell), r))
                tokens.append(token)
        nothing = np.empty(0, dtype=np.int64)
        cell, spot_numbers, token = (np.concatenate([nothing, *each]) for each in (cells, spots, tokens))
        numbers = self._first + np.arange(len(cell))
        self._to_edit = Cells(given.pair, cell, spot_numbers, token, numbers)
        self.cells = Cells(
            given.pair,
            np.concatenate([given.cell, cell]),
            np.concatenate([given.spot, n_sites + spot_numbers]),
            np.concatenate([given.token, token]),
            np.concatenate([given.number, numbers]),
        )
        self.sites = [*senders.sites, *receivers]
        self.reads = frozenset(range(n_sites, len(self.sites)))
        self.equal = np.concatenate([senders.equal, np.zeros(len(cell), dtype=bool)])
        self._row = np.empty(len(cell), dtype=np.int64)  # of each reading edit, among those of its receiver
        for r in range(len(receivers)):
            of_receiver = np.flatnonzero(spot_numbers == r)
            self._row[of_receiver] = np.arange(len(of_receiver))
        self._found: list[Tensor | None] = [None] * len(receivers)
        self._seen = [np.zeros(int((spot_numbers == r).sum()), dtype=bool) for r in range(len(receivers))]

    def reading(self) -> list[Edit]:
        """Return edits for the first sweep, one for each receiver, that keep what they are given."""
        return [self._reader(r) for r in range(len(self._receivers))]

    def _reader(self, receiver: int) -> Edit:
        def read(base: Tensor, numbers: IntArray) -> Tensor:
            rows, seen = self._row[numbers - self._first], self._seen[receiver]
            found = self._found[receiver]
            if found is None:
                found = self._found[receiver] = base.new_zeros(len(seen), base.shape[-1])
            index = torch.as_tensor(rows, device=base.device)
            if self._report.packed and seen[rows].all():  # the whole runs that verify packed ones
                self._compare(receiver, found.index_select(0, index), base)
            else:
                found.index_copy_(0, index, base.detach())
                seen[rows] = True
            return base

        return read

    def _compare(self, receiver: int, packed: Tensor, whole: Tensor) -> None:
        scale = float(whole.float().std(unbiased=False).clamp_min(1e-6))
        difference = float((packed.float() - whole.float()).abs().max()) / scale
        if not difference <= (1e-3 if whole.dtype in (torch.float32, torch.float64) else 0.2):
            raise NotPackableError(
                f"{self._receivers[receiver]} differs from that of whole runs by {difference:.2g} standard deviations"
            )

    def giving(self) -> tuple[Cells, list[Edit]]:
        """Return the cells and the edits of the second sweep, whose sites are the receivers."""
        return self._to_edit, [self._giver(r) for r in range(len(self._receivers))]

    def _giver(self, receiver: int) -> Edit:
        def give(_: Tensor, numbers: IntArray) -> Tensor:
            found = self._found[receiver]
            if found is None:
                raise NotPackableError(f"{self._receivers[receiver]} was not read")
            return found.index_select(0, torch.as_tensor(self._row[numbers - self._first], device=found.device))

        return give


def _order(spot: Spot) -> tuple[int, int]:
    """Return a key that sorts receivers in the order in which a block computes them, queries, keys and values alike."""
    return spot.block, _WITHIN_BLOCK[spot.site.kind]


def _until_last(senders: Senders, cell: IntArray, token: IntArray) -> tuple[IntArray, IntArray]:
    """Return for each cell the tokens from its first edit to the last token that is read."""
    cells = senders.cells
    first = np.full(len(cells), np.iinfo(np.int64).max)
    np.minimum.at(first, cell, token)
    of = np.unique(cell)
    counts = np.maximum(senders.last[cells.pair[of]] + 1 - first[of], 0)
    steps = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.repeat(of, counts), np.repeat(first[of], counts) + steps
