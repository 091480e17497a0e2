"""`GridRun`: runs the cells of a grid, groups of pairs at a time, and measures them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from featurizers import Featurizer, Site
from featurizers.errors import UsageError
from torch import Tensor, nn

from featurizers_patching.engine.cells import Cells, Edit, IntArray
from featurizers_patching.engine.clean import Prompts
from featurizers_patching.engine.reading import Read
from featurizers_patching.engine.sweep import Report, Sweep
from featurizers_patching.metrics import Metric, Scored
from featurizers_patching.operations import Options
from featurizers_patching.pairs import Pair
from featurizers_patching.positions import Column


@dataclass(frozen=True)
class GridRun:
    """One call of `patch`, its arguments checked; the attributes are those arguments."""

    model: nn.Module
    pairs: list[Pair]
    sites: list[Site]
    through: list[Featurizer[Any] | None]
    columns: list[Column]
    at: list[tuple[tuple[int, ...], tuple[int, ...]]]
    options: Options
    metrics: dict[str, Metric]
    freeze: tuple[str, ...]
    batch_rows: int
    skip_equal: bool
    verify: int
    progress: Callable[[float], None]

    def results(self) -> tuple[Tensor, Tensor, Report]:
        """Run all groups of pairs.

        Returns:
            Metrics after each edit ``(metrics, sites, pairs, positions)``, those of base and source without edits
            ``(2, metrics, pairs)``, and how they were computed.
        """
        shape = len(self.metrics), len(self.sites), len(self.pairs), len(self.columns)
        values = torch.full(shape, math.nan, dtype=torch.float64)
        baselines = torch.zeros(2, len(self.metrics), len(self.pairs), dtype=torch.float64)
        report = Report(batch_rows=self.batch_rows)
        groups = list(self._groups())
        for number, group in enumerate(groups):
            share = 0 if not self.verify else max(1, self.verify // len(groups))
            self._run_group(group, values, baselines, report, share, number, len(groups))
        return values, baselines, report

    def _groups(self) -> Iterator[list[int]]:
        """Yield numbers of pairs that share a clean run, those of like length together."""
        group: list[int] = []
        for number in sorted(range(len(self.pairs)), key=lambda i: len(self.pairs[i].base)):
            length = max(len(self.pairs[number].base), len(self.pairs[number].source))
            if group and (len(group) + 1) * length > self.batch_rows:
                yield group
                group = []
            group.append(number)
        yield group

    def _run_group(
        self, group: list[int], values: Tensor, baselines: Tensor, report: Report, verify: int, number: int, count: int
    ) -> None:
        pairs = [self.pairs[i] for i in group]
        prompts, sources = (
            Prompts([getattr(pair, part) for pair in pairs], np.array([self.at[i][side] for i in group]))
            for side, part in enumerate(("base", "source"))
        )
        device = next(self.model.parameters()).device
        cells = _GroupCells(self, group, prompts.width, sources.width)
        read = Read(self.model, sources, self.sites)
        columns = self._columns(device, read.logits.shape[-1])
        of_pair = torch.tensor(group)

        def consume(numbers: IntArray, logits: Tensor, clean: Tensor) -> None:
            which = torch.from_numpy(cells.table.pair[numbers])
            scored = Scored(logits, clean[which.to(clean.device)], of_pair[which], columns)
            site, column = cells.place(numbers)
            for m, found in enumerate(self._measured(scored, "after an edit")):
                values[m, site, of_pair[which], column] = found

        edits = [self._edit(s, read, cells) for s in range(len(self.sites))]
        sweep = Sweep(
            model=self.model,
            prompts=prompts,
            cells=cells.table,
            equal=cells.equal if self.skip_equal and self.options.keeps_equal else np.zeros_like(cells.equal),
            sites=self.sites,
            edits=edits,
            freeze=self.freeze,
            columns=columns,
            verify=verify,
            progress=lambda share: self.progress((number + share) / count),
        )
        clean = sweep.run(consume, report)
        of_source = read.logits if columns is None else read.logits.index_select(-1, columns)
        for side, logits in enumerate((clean, of_source)):
            scored = Scored(logits, clean, of_pair, columns)
            for m, found in enumerate(self._measured(scored, ("of the base", "of the source")[side])):
                baselines[side, m, of_pair] = found

    def _columns(self, device: torch.device, vocabulary: int) -> Tensor | None:
        """Return the tokens whose logits all metrics read; None for the whole vocabulary."""
        read: set[int] = set()
        for each in self.metrics.values():
            if each.reads is None:
                return None
            read |= each.reads
        if read and max(read) >= vocabulary:
            raise UsageError(f"there is no token {max(read)} to measure; the model has {vocabulary} logits")
        return None if 8 * len(read) > vocabulary else torch.tensor(sorted(read), device=device)

    def _measured(self, scored: Scored, where: str) -> Iterator[Tensor]:
        """Yield each metric of some runs, ``(runs,)``, computed in float32 or better.

        Raises:
            UsageError: a metric is no finite number.
        """
        if scored.logits.dtype in (torch.float16, torch.bfloat16):
            scored = replace(scored, logits=scored.logits.float(), clean=scored.clean.float())
        for name, each in self.metrics.items():
            found = each(scored).to("cpu", torch.float64)
            if not bool(found.isfinite().all()):
                row = int((~found.isfinite()).nonzero()[0, 0])
                raise UsageError(
                    f"the metric {name!r} gives {float(found[row])} for the logits {where} of pair "
                    f"{int(scored.pairs[row])}; measure something that is a finite number"
                )
            yield found

    def _edit(self, site: int, read: Read, cells: _GroupCells) -> Edit:
        change = self.options.through(self.through[site])

        def edit(base: Tensor, numbers: IntArray) -> Tensor:
            rows = torch.as_tensor(cells.source_row[numbers], device=base.device)
            return change(base, read.rows(site, rows).to(base.device))

        return edit


class _GroupCells:
    """Cells of the pairs that share a clean run.

    Attributes:
        table: the cells.
        equal: whether base and source share all tokens up to that of each edit.
        source_row: of each edit, among the activations of the sources.
    """

    def __init__(self, run: GridRun, group: list[int], base_width: int, source_width: int) -> None:
        pair, column, cell, token, source, equal = ([] for _ in range(6))  # type: ignore[var-annotated]
        for local, number in enumerate(group):
            n_equal = run.pairs[number].n_equal
            for c, each in enumerate(run.columns):
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
        n_sites, n_cells = len(run.sites), len(pair)
        self._column, self._n_cells = np.array(column), n_cells
        cells = np.arange(n_sites)[:, None] * n_cells + np.array(cell)
        spots = np.repeat(np.arange(n_sites), len(cell))
        table = Cells.of(np.tile(pair, n_sites), cells.ravel(), spots, np.tile(token, n_sites))
        self.source_row, self.equal = np.tile(source, n_sites), np.tile(equal, n_sites).astype(bool)
        kept = self._not_special(run, group, table)
        self.table, self.equal = table.keep(kept), self.equal[kept]

    @staticmethod
    def _not_special(run: GridRun, group: list[int], table: Cells) -> Any:
        """Return which edits are at tokens that the featurizer of their site edits."""
        kept = np.ones(len(table.cell), dtype=bool)
        for site, featurizer in enumerate(run.through):
            special = set(featurizer.special_tokens or ()) if featurizer is not None else set()
            for edit in np.flatnonzero(table.spot == site) if special else ():
                pair = run.pairs[group[int(table.pair[table.cell[edit]])]]
                kept[edit] = pair.base[int(table.token[edit])] not in special
        return kept

    def place(self, numbers: IntArray) -> tuple[Tensor, Tensor]:
        """Return the site and the column of cells."""
        site, rest = np.divmod(numbers, self._n_cells)
        return torch.from_numpy(site), torch.from_numpy(self._column[rest])
