"""`Group`: pairs that share a clean run, with their cells, and the activations of their sources."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from featurizers.errors import UsageError
from torch import Tensor

from featurizers_patching.engine.cells import BoolArray, Cells, Edit, IntArray
from featurizers_patching.engine.clean import Prompts
from featurizers_patching.engine.reading import Read
from featurizers_patching.metrics import Metric, Scored
from featurizers_patching.request import Request


class Group:
    """Pairs that share a clean run.

    Args:
        request: the call.
        numbers: of the pairs.

    Attributes:
        prompts: the bases.
        sources: the sources.
        cells: of all sites, pairs and columns.
        equal: by the number of an edit, whether base and source share all tokens up to that of the edit.
        source_row: of each edit, by its number, among the activations of the sources.
        read: activations of the sources at the sites.
        columns: tokens whose logits all metrics read; None for the whole vocabulary.
        of_pair: number of each pair in the call.
    """

    def __init__(self, request: Request, numbers: list[int]) -> None:
        self.request = request
        pairs = [request.pairs[i] for i in numbers]
        self.prompts, self.sources = (
            Prompts([getattr(pair, part) for pair in pairs], np.array([request.at[i][side] for i in numbers]))
            for side, part in enumerate(("base", "source"))
        )
        self.of_pair = torch.tensor(numbers)
        self._table(numbers)
        self.read = Read(request.model, self.sources, request.sites)
        self.columns = columns_read(request.metrics, self.read.logits)

    def _table(self, group: list[int]) -> None:
        request, source_width = self.request, self.sources.width
        pair, column, cell, token, source, equal = ([] for _ in range(6))  # type: ignore[var-annotated]
        for local, number in enumerate(group):
            n_equal = request.pairs[number].n_equal
            for c, each in enumerate(request.columns):
                base_tokens, source_tokens = each.base[number], each.source[number]
                if base_tokens is None or source_tokens is None:
                    continue
                for b, s in zip(base_tokens, source_tokens, strict=True):
                    cell.append(len(pair))
                    token.append(b)
                    source.append(local * source_width + s)
                    equal.append(b == s and b < n_equal)
                pair.append(local)
                column.append(c)
        n_sites, n_cells = len(request.sites), len(pair)
        self._column, self._n_cells = np.array(column), n_cells
        cells = np.arange(n_sites)[:, None] * n_cells + np.array(cell)
        spots = np.repeat(np.arange(n_sites), len(cell))
        table = Cells.of(np.tile(pair, n_sites), cells.ravel(), spots, np.tile(token, n_sites))
        self.source_row, self.equal = np.tile(source, n_sites), np.tile(equal, n_sites).astype(bool)
        self.cells = table.keep(self._not_special(group, table))

    def _not_special(self, group: list[int], table: Cells) -> BoolArray:
        """Return which edits are at tokens that the featurizer of their site edits."""
        kept = np.ones(len(table.cell), dtype=bool)
        for site, featurizer in enumerate(self.request.through):
            special = set(featurizer.special_tokens or ()) if featurizer is not None else set()
            for edit in np.flatnonzero(table.spot == site) if special else ():
                pair = self.request.pairs[group[int(table.pair[table.cell[edit]])]]
                kept[edit] = pair.base[int(table.token[edit])] not in special
        return kept

    def place(self, numbers: IntArray) -> tuple[Tensor, Tensor]:
        """Return the site and the column of cells."""
        site, rest = np.divmod(numbers, self._n_cells)
        return torch.from_numpy(site), torch.from_numpy(self._column[rest])

    def edit(self, site: int) -> Edit:
        """Return what edits do at a site."""
        change = self.request.options.through(self.request.through[site])

        def edit(base: Tensor, numbers: IntArray) -> Tensor:
            rows = torch.as_tensor(self.source_row[numbers], device=base.device)
            return change(base, self.read.rows(site, rows).to(base.device))

        return edit

    def scored(self, logits: Tensor, clean: Tensor, pair: IntArray) -> Scored:
        """Return what metrics measure, given the logits of some runs, those of all bases, and the run's pairs."""
        which = torch.from_numpy(pair)
        return Scored(logits, clean[which.to(clean.device)], self.of_pair[which], self.columns)

    def measured(self, scored: Scored, where: str) -> Iterator[Tensor]:
        """Yield each metric of some runs, ``(runs,)``, computed in float32 or better.

        Raises:
            UsageError: a metric is no finite number.
        """
        if scored.logits.dtype in (torch.float16, torch.bfloat16):
            scored = replace(scored, logits=scored.logits.float(), clean=scored.clean.float())
        for name, each in self.request.metrics.items():
            found = each(scored).to("cpu", torch.float64)
            if not bool(found.isfinite().all()):
                row = int((~found.isfinite()).nonzero()[0, 0])
                raise UsageError(
                    f"the metric {name!r} gives {float(found[row])} for the logits {where} of pair "
                    f"{int(scored.pairs[row])}; measure something that is a finite number"
                )
            yield found

    def narrowed(self, logits: Tensor) -> Tensor:
        """Return the logits of the tokens that all metrics read."""
        return logits if self.columns is None else logits.index_select(-1, self.columns)


def columns_read(metrics: dict[str, Metric], logits: Tensor) -> Tensor | None:
    """Return the tokens whose logits all metrics read; None for the whole vocabulary.

    Raises:
        UsageError: the model has no such token.
    """
    vocabulary = logits.shape[-1]
    largest = max((token for each in metrics.values() for token in each.named), default=0)
    if largest >= vocabulary:
        raise UsageError(f"there is no token {largest} to measure; the model has {vocabulary} logits")
    read: set[int] = set()
    for each in metrics.values():
        if each.reads is None:
            return None
        read |= each.reads
    return None if 8 * len(read) > vocabulary else torch.tensor(sorted(read), device=logits.device)
