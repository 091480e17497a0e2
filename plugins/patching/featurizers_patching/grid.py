"""`Grid`: the result of patching, values by metric, site, pair and position."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from featurizers import Site
from featurizers.errors import MissingDependencyError, UsageError, did_you_mean, printable, shown
from torch import Tensor

from featurizers_patching.grid_files import read_grid, write_grid
from featurizers_patching.pictures import heat_map


class GridCell(NamedTuple):
    """One cell of a grid, over its pairs.

    Attributes:
        site: where.
        position: label of the column.
        token: text or id of the token there, if it is known.
        value: mean over the pairs.
        stderr: standard error of the mean; NaN for one pair.
        n: number of pairs that have the position.
        exact: whether the cell was run; else its value is an estimate.
    """

    site: Site
    position: str
    token: str
    value: float
    stderr: float
    n: int
    exact: bool = True


@dataclass(frozen=True, eq=False)
class Grid:
    """Effects of patching.

    Attributes:
        raw: metric after each edit, ``(metrics, sites, pairs, positions)``; NaN where a prompt has no such token.
        base: metric of each base without edits, ``(metrics, pairs)``.
        source: metric of each source, ``(metrics, pairs)``.
        metrics: names of the first axis.
        sites: second axis.
        positions: labels of the last axis.
        labels: what to write under each position: its token, where there is one pair.
        prompts: base and source of each pair, as token ids.
        normalized: whether `values` are 0 for the base and 1 for the source.
        exact: which cells were run, ``(sites, positions)``; the values of the others are estimates.
        estimate: estimates of `raw`, also of the cells that were run; None if nothing was estimated.
        about: the model, the operation and how the cells were computed, as JSON.
    """

    raw: Tensor
    base: Tensor
    source: Tensor
    metrics: tuple[str, ...]
    sites: tuple[Site, ...]
    positions: tuple[str, ...]
    labels: tuple[str, ...]
    prompts: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
    normalized: bool
    exact: Tensor
    estimate: Tensor | None = None
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def values(self) -> Tensor:
        """Effects ``(metrics, sites, pairs, positions)``: normalized, or `raw`; NaN where base and source are equal."""
        return self._values(self.raw)

    def _values(self, raw: Tensor) -> Tensor:
        if not self.normalized:
            return raw
        base, source = self.base[:, None, :, None], self.source[:, None, :, None]
        return torch.where(base == source, torch.nan, (raw - base) / (source - base))

    @property
    def axes(self) -> dict[str, tuple[Any, ...]]:
        """Names of each axis of `values`, in order."""
        pairs = tuple(range(self.raw.shape[2]))
        return {"metrics": self.metrics, "sites": self.sites, "pairs": pairs, "positions": self.positions}

    def mean(self) -> Tensor:
        """Return means over the pairs ``(metrics, sites, positions)``; NaN where no pair has the position."""
        return self.values.nanmean(dim=2)

    def stderr(self) -> Tensor:
        """Return standard errors of the means ``(metrics, sites, positions)``; NaN for fewer than two pairs."""
        n = self.counts()
        deviations = (self.values - self.mean().unsqueeze(2)).square().nansum(dim=2)
        return torch.where(n > 1, (deviations / (n - 1).clamp_min(1) / n.clamp_min(1)).sqrt(), torch.nan)

    def counts(self) -> Tensor:
        """Return how many pairs each mean is over, ``(metrics, sites, positions)``."""
        return (~self.values.isnan()).sum(dim=2)

    def errors(self) -> Tensor:
        """Return estimates minus exact values, in the unit of `values`; NaN where one of the two is not known."""
        if self.estimate is None:
            return torch.full_like(self.raw, torch.nan)
        return torch.where(self.exact.unsqueeze(1), self._values(self.estimate) - self.values, torch.nan)

    def relative_error(self, metric: str | None = None) -> float:
        """Return the norm of `errors` over that of the exact effects in the same cells; NaN where none is known.

        Args:
            metric: name; None for the first.

        Raises:
            UsageError: there is no such metric.
        """
        number = self._metric(metric)
        effects = self.values[number] - (0.0 if self.normalized else self.base[number][None, :, None])
        errors = self.errors()[number]
        known = ~errors.isnan()
        return float(errors[known].norm() / effects[known].norm()) if known.any() else torch.nan

    def top(self, k: int = 10, metric: str | None = None) -> list[GridCell]:
        """Return the cells with the largest absolute means.

        Args:
            k: how many.
            metric: name; None for the first.

        Raises:
            UsageError: there is no such metric.
        """
        number = self._metric(metric)
        means, errors, counts = self.mean()[number], self.stderr()[number], self.counts()[number]
        order = means.abs().nan_to_num(-1.0).flatten().argsort(descending=True, stable=True)
        found = []
        for flat in order[:k].tolist():
            site, position = divmod(flat, len(self.positions))
            if counts[site, position]:
                numbers = float(means[site, position]), float(errors[site, position]), int(counts[site, position])
                names = self.sites[site], self.positions[position], self.labels[position]
                found.append(GridCell(*names, *numbers, exact=bool(self.exact[site, position])))
        return found

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield one mapping for each value that there is, in the long form of a table."""
        values = self.values
        for m, s, b, p in (~values.isnan()).nonzero().tolist():
            yield {
                "metric": self.metrics[m],
                "site": str(self.sites[s]),
                "pair": b,
                "position": self.positions[p],
                "value": float(values[m, s, b, p]),
                "raw": float(self.raw[m, s, b, p]),
                "base": float(self.base[m, b]),
                "source": float(self.source[m, b]),
                "exact": bool(self.exact[s, p]),
            }

    def to_pandas(self) -> Any:
        """Return `rows` as a data frame.

        Raises:
            MissingDependencyError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise MissingDependencyError("Grid.to_pandas", "pandas", "pip install pandas") from error
        return pandas.DataFrame(list(self.rows()))

    def by_head(self, metric: str | None = None, position: str | None = None) -> tuple[Tensor, list[int]]:
        """Return the means of one position as ``(blocks, heads)``, NaN where the grid has no such head, and the blocks.

        Args:
            metric: name; None for the first.
            position: label; None for the only one.

        Raises:
            UsageError: there is no such metric or position, or the sites are not heads of one kind.
        """
        means = self.mean()[self._metric(metric)][:, self._column(position)]
        blocks, heads = zip(*((site.layer or 0, site.head) for site in self.sites), strict=True)
        if None in heads or len({site.kind for site in self.sites}) > 1:
            raise UsageError("the sites of this grid are not heads of one kind; patch with heads='all'")
        rows = sorted(set(blocks))
        found = torch.full((len(rows), max(heads) + 1), torch.nan, dtype=means.dtype)
        for block, head, value in zip(blocks, heads, means, strict=True):
            found[rows.index(block), head] = value
        return found, rows

    def plot(self, metric: str | None = None, ax: Any = None, *, position: str | None = None) -> Any:
        """Draw the means of a metric as a heat map, and return matplotlib's axes; estimates are marked with a dot.

        Rows are sites and columns positions. Heads at one position are drawn as blocks × heads.

        Args:
            metric: name; None for the first.
            ax: axes to draw on; None for new ones.
            position: label of the position whose heads are drawn; None for all positions.

        Raises:
            MissingDependencyError: matplotlib is not installed.
            UsageError: there is no such metric or position, or the sites are not heads of one kind.
        """
        are_heads = len({site.kind for site in self.sites}) == 1 and None not in {site.head for site in self.sites}
        if position is not None or (are_heads and len(self.positions) == 1):
            values, blocks = self.by_head(metric, position)
            label = self.positions[self._column(position)]
            title = f"{self.sites[0].kind}, position {label}; {self.title(metric)}"
            rows, columns = [str(block) for block in blocks], [str(head) for head in range(values.shape[1])]
            axes = heat_map(values, rows, columns, title, ax)
            axes.set_xlabel("head")
            axes.set_ylabel("block")
            return axes
        means = self.mean()[self._metric(metric)]
        estimated = None if self.exact.all() else ~self.exact
        return heat_map(means, list(map(str, self.sites)), self.labels, self.title(metric), ax, estimated)

    def save(self, path: str | Path) -> Path:
        """Write the grid to a safetensors file, which `load_grid` reads; return its path.

        Raises:
            ArtefactError: the file cannot be written.
        """
        path = Path(path).expanduser()
        record = {
            "metrics": list(self.metrics),
            "sites": [str(site) for site in self.sites],
            "positions": list(self.positions),
            "labels": list(self.labels),
            "normalized": self.normalized,
            "about": dict(self.about),
        }
        tensors = {"raw": self.raw, "base": self.base, "source": self.source, "exact": self.exact}
        if self.estimate is not None:
            tensors["estimate"] = self.estimate
        write_grid(path, tensors, self.prompts, record)
        return path

    def title(self, metric: str | None = None) -> str:
        """Return what was measured, with both baselines."""
        number = self._metric(metric)
        base, source = float(self.base[number].mean()), float(self.source[number].mean())
        what = f"{self.metrics[number]}: base {base:.4g}, source {source:.4g}"
        return f"{what}; 0 is the base, 1 the source" if self.normalized else what

    def __repr__(self) -> str:
        """Show the size and the largest cells."""
        sizes = f"{len(self.sites)} sites × {len(self.positions)} positions × {self.raw.shape[2]} pairs"
        lines = [f"Grid of {sizes}, {self.title()}", *([note] if (note := self.note_of_estimates()) else [])]
        for cell in self.top(5):
            error = "" if cell.n < 2 else f" ± {cell.stderr:.2g}"
            token = "" if cell.token == cell.position else f" {shown(cell.token, 20)}"
            value = f"{'' if cell.exact else '~'}{cell.value:+.4g}"
            lines.append(f"  {cell.site!s:14} {printable(cell.position, 20)}{token}: {value}{error}")
        return "\n".join(lines)

    def note_of_estimates(self, metric: str | None = None) -> str:
        """Return a sentence on which cells are estimates and how good these are; empty if all cells are exact."""
        if self.estimate is None:
            return ""
        n_exact = int(self.exact.sum())
        note = f"~ are estimates by {self.about.get('method', 'gradients')}; {n_exact} of {self.exact.numel()} cells"
        if not n_exact:
            return f"{note} were run."
        return (
            f"{note} were run, where the estimates are off by {self.relative_error(metric):.0%} of the effects' norm."
        )

    def _column(self, label: str | None) -> int:
        if label is None and len(self.positions) == 1:
            return 0
        if label is None or str(label) not in self.positions:
            near = did_you_mean(str(label), self.positions, f"The positions are {', '.join(self.positions[:20])}.")
            raise UsageError(f"name one position of the grid, not {shown(label)}. {near}")
        return self.positions.index(str(label))

    def _metric(self, name: str | None) -> int:
        if name is None:
            return 0
        if name not in self.metrics:
            raise UsageError(f"the grid has no metric {shown(name)}. {did_you_mean(name, self.metrics)}")
        return self.metrics.index(name)


def load_grid(path: str | Path) -> Grid:
    """Read a grid that `Grid.save` wrote.

    Raises:
        ArtefactError: the file is no grid, or is damaged.
    """
    tensors, prompts, sites, record = read_grid(Path(path).expanduser())
    return Grid(
        raw=tensors["raw"],
        base=tensors["base"],
        source=tensors["source"],
        exact=tensors["exact"],
        estimate=tensors.get("estimate"),
        metrics=record.metrics,
        sites=sites,
        positions=record.positions,
        labels=record.labels,
        prompts=prompts,
        normalized=record.normalized,
        about=record.about,
    )
