"""A sweep of cells in chunks of bounded memory, verified against whole runs, which it falls back to."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import numpy as np
import torch
from featurizers import Anatomy, Site
from featurizers.errors import FeaturizerError, one_line
from featurizers.models import unedited
from torch import Tensor, nn

from featurizers_patching.engine.advance import advance
from featurizers_patching.engine.cells import BoolArray, Cells, Edit, IntArray, with_effect
from featurizers_patching.engine.clean import CleanRun, Prompts
from featurizers_patching.engine.ending import takes_columns
from featurizers_patching.engine.reference import whole_runs
from featurizers_patching.engine.scope import NotPackableError
from featurizers_patching.engine.spots import Spot, spot_of

Consume: TypeAlias = Callable[[IntArray, Tensor, Tensor], None]
"""Takes numbers of cells, their logits ``(cells, n, k)``, and the clean logits of all prompts ``(prompts, n, k)``. A
later call for the same cells replaces an earlier one."""

MOST_NUMBERS = 2**26
"""Numbers of logits, and of keys and values, that a chunk may hold: a bound of its memory where a metric reads the
whole vocabulary, and where many cells run few tokens of long prompts."""
FAILURES = (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError, NotPackableError)
"""What a block that does not take packed rows may raise."""


@dataclass
class Report:
    """How cells were computed.

    Attributes:
        packed: whether on packed rows; else by whole runs of the model.
        reason: why not on packed rows.
        batch_rows: rows that ran together at most; smaller than asked for if memory ran out.
        verified: number of cells that were compared with whole runs.
        difference: largest difference of their logits, in standard deviations of the clean logits.
    """

    packed: bool = True
    reason: str = ""
    batch_rows: int = 0
    verified: int = 0
    difference: float = 0.0


@dataclass(frozen=True)
class Sweep:
    """Cells of some prompts, to run.

    Attributes:
        model: a decoder with its head, in evaluation mode.
        prompts: of the cells.
        cells: to run.
        equal: whether each edit is known to change nothing in a causal model, ``(edits,)``.
        sites: of the cells.
        edits: one for each site.
        freeze: see `advance`.
        columns: tokens whose logits are read; None for all.
        verify: number of cells to compare with whole runs.
        progress: is called with the share of the work that is done.
        reads: numbers of the sites whose edits change nothing and only read.
    """

    model: nn.Module
    prompts: Prompts
    cells: Cells
    equal: BoolArray
    sites: Sequence[Site]
    edits: Sequence[Edit]
    freeze: Sequence[str] = ()
    columns: Tensor | None = None
    verify: int = 4
    progress: Callable[[float], None] = field(default=lambda _: None)
    reads: frozenset[int] = frozenset()

    def run(self, consume: Consume, report: Report) -> Tensor:
        """Run the cells, hand their logits on, and return the clean logits ``(prompts, n, k)``.

        Args:
            consume: takes the logits of each chunk.
            report: of earlier sweeps of this model: one that fell back stays so. It is brought up to date.
        """
        with unedited():
            if report.packed:
                try:
                    return self._packed(consume, report)
                except torch.OutOfMemoryError:
                    raise
                except FeaturizerError:
                    raise
                except FAILURES as error:
                    known = isinstance(error, NotPackableError)
                    report.reason = str(error) if known else f"{type(error).__name__}: {one_line(error)}"
                report.packed = False
                warnings.warn(
                    f"a {type(self.model).__name__} cannot be patched on packed rows ({report.reason}); each cell is a "
                    "whole run of the model, which is slower",
                    stacklevel=3,
                )
            return self._whole(consume, report)

    # ------------------------------------------------------------------ packed rows

    def _packed(self, consume: Consume, report: Report) -> Tensor:
        anatomy = Anatomy(self.model)
        spots = [replace(spot_of(anatomy, site), reads=n in self.reads) for n, site in enumerate(self.sites)]
        clean = CleanRun(self.model, anatomy, self.prompts, self.freeze)
        columns = self.columns if takes_columns(self.model) else None
        attends = "attn.out" not in self.freeze
        moves = with_effect(self.cells, spots, self.prompts.at, anatomy.n_layers, attends=attends) & ~self.equal
        cells = self.cells.keep(moves)
        edited = np.zeros(len(cells), dtype=bool)
        edited[cells.cell] = True
        read = clean.logits if self.columns is None else clean.logits.index_select(-1, self.columns)
        still = np.flatnonzero(~edited)
        if len(still):
            consume(still, read[torch.as_tensor(cells.pair[still], device=read.device)], read)
        chosen = self._to_verify(np.flatnonzero(edited))
        kept: dict[int, Tensor] = {}
        sizes = self._sizes(cells)
        done, total = 0, int(sizes[edited].sum())
        for chunk in _chunks(self._order(cells, edited), sizes, lambda: self._most(report, read, clean)):
            logits = self._advanced(clean, cells, chunk, spots, columns, report)
            logits = logits if columns is not None or self.columns is None else logits.index_select(-1, self.columns)
            kept |= {int(cell): logits[i] for i, cell in enumerate(chunk) if cell in chosen}
            consume(chunk, logits, read)
            done += int(sizes[chunk].sum())
            self.progress(done / total)
        self._compare(kept, clean.logits, report)
        return read

    def _order(self, cells: Cells, edited: BoolArray) -> IntArray:
        """Return the cells to run, those of one prompt and token together."""
        chosen = np.flatnonzero(edited)
        first = cells.first_token(self._end(cells))
        order: IntArray = chosen[np.lexsort((first[chosen], cells.pair[chosen]))]
        return order

    def _sizes(self, cells: Cells) -> IntArray:
        """Return how many rows each cell has in its last block but one, which has the most."""
        end = self._end(cells)
        sizes: IntArray = np.maximum(end - cells.first_token(end), 1)
        return sizes

    def _end(self, cells: Cells) -> IntArray:
        """Return the token after the last one that is read of each cell's prompt."""
        end: IntArray = self.prompts.at.max(axis=1)[cells.pair] + 1
        return end

    def _most(self, report: Report, read: Tensor, clean: CleanRun | None = None) -> tuple[int, int]:
        """Return how many rows and how many cells run together."""
        of_cell = read.shape[1] * read.shape[2]
        if clean is not None:  # each cell has its own keys and values of the whole prompt
            of_cell = max(of_cell, *((block.keys[0].numel() + block.values[0].numel()) for block in clean.blocks))
        return report.batch_rows, max(1, MOST_NUMBERS // of_cell)

    def _advanced(
        self,
        clean: CleanRun,
        cells: Cells,
        chunk: IntArray,
        spots: Sequence[Spot],
        columns: Tensor | None,
        report: Report,
    ) -> Tensor:
        """Run a chunk; in halves, if memory runs out."""
        try:
            return advance(clean, cells.take(chunk), spots, self.edits, freeze=self.freeze, columns=columns)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not _is_memory(error) or len(chunk) == 1:
                raise
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        report.batch_rows = max(1, report.batch_rows // 2)
        halves = np.array_split(chunk, 2)
        return torch.cat([self._advanced(clean, cells, half, spots, columns, report) for half in halves])

    # ------------------------------------------------------------------ whole runs

    def _to_verify(self, candidates: IntArray) -> set[int]:
        """Return cells spread evenly over those that run."""
        count = 0 if "attn.pattern" in self.freeze else min(self.verify, len(candidates))
        return {int(candidates[i * (len(candidates) - 1) // max(1, count - 1)]) for i in range(count)}

    def _compare(self, kept: dict[int, Tensor], clean: Tensor, report: Report) -> None:
        """Raise NotPackableError if logits differ from those of whole runs."""
        if not kept:
            return
        numbers = np.array(sorted(kept))
        whole = self._runs(self.cells.take(numbers))
        whole = whole if self.columns is None else whole.index_select(-1, self.columns)
        packed = torch.stack([kept[int(number)] for number in numbers])
        scale = float(clean.float().std().clamp_min(1e-12))
        difference = float((packed.float() - whole.float()).abs().max()) / scale
        precise = clean.dtype in (torch.float32, torch.float64)
        if not difference <= (1e-3 if precise else 0.2):
            raise NotPackableError(
                f"its logits differ from those of whole runs by {difference:.2g} standard deviations"
            )
        report.verified += len(numbers)
        report.difference = max(report.difference, difference)

    def _runs(self, cells: Cells) -> Tensor:
        return whole_runs(self.model, self.prompts, cells, self.sites, self.edits, self.freeze, self.reads)

    def _whole(self, consume: Consume, report: Report) -> Tensor:
        nothing = Cells.of(np.arange(len(self.prompts)), [], [], [])
        read = whole_runs(self.model, self.prompts, nothing, self.sites, self.edits, ())
        read = read if self.columns is None else read.index_select(-1, self.columns)
        sizes = np.array([len(self.prompts.tokens[pair]) for pair in self.cells.pair])
        order, done = np.argsort(sizes, kind="stable"), 0
        for chunk in _chunks(order, sizes, lambda: self._most(report, read)):
            logits = self._runs(self.cells.take(chunk))
            consume(chunk, logits if self.columns is None else logits.index_select(-1, self.columns), read)
            done += int(sizes[chunk].sum())
            self.progress(done / int(sizes.sum()))
        return read


def _chunks(order: IntArray, sizes: IntArray, most: Callable[[], tuple[int, int]]) -> Iterator[IntArray]:
    """Yield cells in chunks of at most so many rows and so many cells; asks before each chunk how many."""
    start = 0
    while start < len(order):
        rows, cells = most()
        within = int(np.searchsorted(np.cumsum(sizes[order[start:]]), rows, side="right"))
        end = start + max(1, min(within, cells))
        yield order[start:end]
        start = end


def _is_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "not enough memory" in str(error)  # the latter on a CPU
