"""`GridRun`: runs or estimates the cells of a grid, groups of pairs at a time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from featurizers import Anatomy
from featurizers.errors import UsageError
from torch import Tensor

from featurizers_patching.engine.cells import IntArray
from featurizers_patching.engine.receiving import Receiving, Senders
from featurizers_patching.engine.scope import NotPackableError
from featurizers_patching.engine.sweep import Report, Sweep
from featurizers_patching.estimates import check_estimable, estimated
from featurizers_patching.group import Group
from featurizers_patching.request import Request


@dataclass
class Results:
    """Values of a grid, and how they were computed.

    Attributes:
        values: metrics after each edit, ``(metrics, sites, pairs, positions)``.
        baselines: metrics of base and source without edits, ``(2, metrics, pairs)``.
        exact: which cells were run, ``(sites, positions)``.
        estimate: estimates of `values`; None if nothing was estimated.
        report: how the cells were run.
    """

    values: Tensor
    baselines: Tensor
    exact: Tensor
    estimate: Tensor | None
    report: Report

    def by_metric(self, names: Iterable[str]) -> dict[str, Results]:
        """Return the results of each metric, given their names."""
        found = {}
        for m, name in enumerate(names):
            estimate = None if self.estimate is None else self.estimate[m : m + 1]
            one = replace(
                self, values=self.values[m : m + 1], baselines=self.baselines[:, m : m + 1], estimate=estimate
            )
            found[name] = one
        return found

    @classmethod
    def of(cls, parts: Sequence[Results]) -> Results:
        """Return the results of several metrics as one, with the report of all their runs."""
        reports = list({id(part.report): part.report for part in parts}.values())
        estimates = [part.estimate for part in parts if part.estimate is not None]
        report = Report(
            packed=all(each.packed for each in reports),
            reason=next((each.reason for each in reports if each.reason), ""),
            batch_rows=min(each.batch_rows for each in reports),
            verified=sum(each.verified for each in reports),
            difference=max(each.difference for each in reports),
        )
        return cls(
            values=torch.cat([part.values for part in parts]),
            baselines=torch.cat([part.baselines for part in parts], dim=1),
            exact=parts[0].exact,
            estimate=torch.cat(estimates) if estimates else None,
            report=report,
        )


class GridRun:
    """Runs one call of `patch`.

    Args:
        request: the call.

    Attributes:
        results: are filled in.

    Raises:
        UsageError: the effects cannot be estimated by the method that is asked for.
    """

    def __init__(self, request: Request) -> None:
        check_estimable(request)
        self.request = request
        shape = len(request.metrics), len(request.sites), len(request.pairs), len(request.columns)
        self.results = Results(
            values=torch.full(shape, math.nan, dtype=torch.float64),
            baselines=torch.zeros(2, shape[0], shape[2], dtype=torch.float64),
            exact=torch.ones(shape[1], shape[3], dtype=torch.bool),
            estimate=None,
            report=Report(batch_rows=request.batch_rows),
        )

    def run(self) -> Results:
        """Estimate all cells, if that is asked for, and run the cells that are to be exact."""
        method, results = self.request.method, self.results
        if method.name != "exact":
            self._estimate()
            results.exact[:] = False
            if method.screen is not None:
                results.exact = self._largest(method.screen)
        if results.exact.any():
            groups = list(self._groups())
            for number, group in enumerate(groups):
                share = 0 if not self.request.verify else max(1, self.request.verify // len(groups))
                self._run_group(Group(self.request, group), share, number, len(groups))
        else:
            self.request.progress(1.0)
        return results

    def _groups(self) -> Iterator[list[int]]:
        """Yield numbers of pairs that share a clean run, those of like length together."""
        pairs, group = self.request.pairs, list[int]()
        for number in sorted(range(len(pairs)), key=lambda i: len(pairs[i].base)):
            length = max(len(pairs[number].base), len(pairs[number].source))
            if group and (len(group) + 1) * length > self.request.batch_rows:
                yield group
                group = []
            group.append(number)
        yield group

    # ------------------------------------------------------------------ estimates

    def _estimate(self) -> None:
        results = self.results
        for numbers in self._groups():
            group = Group(self.request, numbers)
            changes, clean = estimated(group)
            self._measure_baselines(group, clean)
            cells = np.arange(len(group.cells))
            site, column = group.place(cells)
            pair = group.of_pair[torch.from_numpy(group.cells.pair)]
            for m, found in enumerate(changes):
                results.values[m, site, pair, column] = results.baselines[0, m, pair] + found
        results.estimate = results.values.clone()

    def _largest(self, count: int) -> Tensor:
        """Return the cells with the largest estimates of the first metric, over the pairs, ``(sites, positions)``."""
        results = self.results
        base, source = (each[0, None, :, None] for each in results.baselines)
        scale = (source - base).abs() if self.request.normalize else torch.ones_like(base)
        effects = (results.values[0] - base) / torch.where(scale > 0, scale, torch.nan)
        means = effects.nanmean(dim=1).abs().nan_to_num(-1.0)
        chosen = torch.zeros(means.numel(), dtype=torch.bool)
        chosen[means.flatten().argsort(descending=True, stable=True)[:count]] = True
        return chosen.view(means.shape)

    # ------------------------------------------------------------------ exact runs

    def _run_group(self, group: Group, verify: int, number: int, count: int) -> None:
        request, values = self.request, self.results.values
        sites, columns = group.place(np.arange(len(group.cells)))
        chosen = np.flatnonzero(self.results.exact[sites, columns].numpy())
        if not len(chosen):
            return
        cells = group.cells.take(chosen)

        def consume(numbers: IntArray, logits: Tensor, clean: Tensor) -> None:
            scored = group.scored(logits, clean, cells.pair[numbers])
            site, column = group.place(chosen[numbers])
            for m, found in enumerate(group.measured(scored, "after an edit")):
                values[m, site, scored.pairs, column] = found

        equal = group.equal[cells.number]
        sweep = Sweep(
            model=request.model,
            prompts=group.prompts,
            cells=cells,
            equal=equal if request.skip_equal and request.options.keeps_equal else np.zeros_like(equal),
            sites=request.sites,
            edits=[group.edit(site) for site in range(len(request.sites))],
            freeze=request.freeze,
            columns=group.columns,
            verify=verify,
            progress=lambda share: request.progress((number + share) / count),
        )
        if request.receivers:
            sweep = self._of_receivers(sweep)
        self._measure_baselines(group, sweep.run(consume, self.results.report))

    def _of_receivers(self, sweep: Sweep) -> Sweep:
        """Run the senders, and return a sweep that gives the receivers what they read then."""
        report = self.results.report
        was_packed = report.packed
        receiving = self._received(sweep)
        if was_packed and not report.packed:
            receiving = self._received(sweep)
        cells, edits = receiving.giving()
        equal = np.zeros(len(cells.cell), dtype=bool)
        return replace(sweep, cells=cells, equal=equal, sites=self.request.receivers, edits=edits, freeze=())

    def _received(self, sweep: Sweep) -> Receiving:
        """Run the senders."""
        report = self.results.report
        senders = Senders(sweep.cells, sweep.sites, sweep.equal, sweep.prompts.at.max(axis=1))
        try:
            receiving = Receiving(Anatomy(self.request.model), senders, self.request.receivers, report)
        except NotPackableError as error:
            raise UsageError(f"paths cannot be patched: {error}") from error
        replace(
            sweep,
            cells=receiving.cells,
            equal=receiving.equal,
            sites=receiving.sites,
            edits=[*sweep.edits, *receiving.reading()],
            progress=lambda _: None,
            reads=receiving.reads,
        ).run(lambda *_: None, report)
        return receiving

    def _measure_baselines(self, group: Group, clean: Tensor) -> None:
        every = np.arange(len(group.prompts))
        for side, logits in enumerate((clean, group.narrowed(group.read.logits))):
            scored = group.scored(logits, clean, every)
            for m, found in enumerate(group.measured(scored, ("of the base", "of the source")[side])):
                self.results.baselines[side, m, group.of_pair] = found
