"""`Evaluation`: named metrics with their intervals and definitions, as a table, as JSON and in a file."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from featurizers.errors import ArtefactError, MissingDependencyError, UsageError, did_you_mean, printable, shown
from featurizers.format import read_json, write_json
from pydantic import BaseModel, ConfigDict, JsonValue
from torch import Tensor

from featurizers_evaluate.definitions import DEFINITIONS, GROUPS

FORMAT: Final = "featurizers-evaluate"
VERSION: Final = 1
SHOWN: Final = ("featurizer", "site", "model", "data", "tokens", "documents")
"""What a table says of a measurement."""


@dataclass(frozen=True)
class Metric:
    """A measured number.

    Attributes:
        name: a key of `DEFINITIONS`.
        value: the number; None if it is not defined.
        interval: 95 % interval; None if there is none.
        why: reason why there is no value, or why a value has no interval; empty if there are both.
    """

    name: str
    value: float | None
    interval: tuple[float, float] | None = None
    why: str = ""

    @property
    def unit(self) -> str:
        """Unit of the value."""
        return DEFINITIONS[self.name].unit

    @property
    def definition(self) -> str:
        """Formula in words."""
        return DEFINITIONS[self.name].text

    @property
    def sae_lens(self) -> str | None:
        """Key in the results of SAELens; None if it has no such metric."""
        return DEFINITIONS[self.name].sae_lens

    def __str__(self) -> str:
        """Return the value as text, or that it is not defined."""
        return f"not defined, because {self.why}" if self.value is None else f"{self.value:.4g}"

    def record(self) -> dict[str, Any]:
        """Return JSON data."""
        return {
            "value": self.value,
            "interval_95": None if self.interval is None else list(self.interval),
            "unit": self.unit,
            "definition": self.definition,
            **({"why": self.why} if self.why else {}),
            **({"sae_lens": self.sae_lens} if self.sae_lens else {}),
        }


@dataclass(frozen=True)
class Histogram:
    """Numbers of features by the logarithm (to base 10) of their density.

    Attributes:
        edges: of the bars, one more than there are bars.
        counts: features in each bar.
        dead: features that are 0 at every token, which have no logarithm.
    """

    edges: tuple[float, ...]
    counts: tuple[int, ...]
    dead: int


@dataclass(frozen=True)
class Evaluation:
    """Result of `featurizers.evaluate`.

    Attributes:
        metrics: by name, in the order of `DEFINITIONS`.
        about: what was measured on what: featurizer, model, data, tokens, documents, excluded tokens, versions, seed.
        histogram: densities of the features; None for features that are dense, or were not measured.
        density: share of the tokens at which each feature is not 0, ``(n_features,)`` float64; None as for
            ``histogram``, and for an evaluation that was read from a file.
        writes: of a map that writes several sites, the metrics of the reconstruction at each, by the site's name.
    """

    metrics: Mapping[str, Metric]
    about: Mapping[str, Any]
    histogram: Histogram | None = None
    density: Tensor | None = field(default=None, compare=False, repr=False)
    writes: Mapping[str, Mapping[str, Metric]] = field(default_factory=dict)

    def __getitem__(self, name: str) -> float:
        """Return the value of a metric.

        Raises:
            UsageError: it was not measured, or is not defined.
        """
        if name not in self.metrics:
            raise UsageError(f"the metric {shown(name)} was not measured. {did_you_mean(name, self.metrics)}")
        metric = self.metrics[name]
        if metric.value is None:
            raise UsageError(f"the metric {name!r} is {metric}")
        return metric.value

    def __repr__(self) -> str:
        """Return a table of the metrics with their intervals."""
        from rich.console import Console

        buffer = io.StringIO()
        Console(file=buffer, width=100, emoji=False, highlight=False).print(*self.tables())
        return buffer.getvalue().rstrip("\n")

    def title(self) -> str:
        """Return what was measured on what, in one line."""
        about = {name: self.about[name] for name in SHOWN if self.about.get(name) is not None}
        return printable(", ".join(f"{name} {value}" for name, value in about.items()), 300)

    def tables(self) -> list[Any]:
        """Return tables of `rich`: the metrics, and those of each write if there are several."""
        return [table_of([self], [""]), *([table_of_writes(self.writes)] if self.writes else [])]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON data: ``about``, ``metrics`` with values, intervals and definitions, and the histogram."""
        bars = self.histogram
        return {
            "about": dict(self.about),
            "metrics": _records(self.metrics),
            **({"writes": {site: _records(metrics) for site, metrics in self.writes.items()}} if self.writes else {}),
            "density_histogram": None
            if bars is None
            else {"log10_edges": list(bars.edges), "features": list(bars.counts), "dead": bars.dead},
        }

    def to_pandas(self) -> Any:
        """Return a data frame with a row for each metric, of all writes (``site`` is empty) and of each.

        Raises:
            MissingDependencyError: pandas is not installed.
        """
        return frame_of([self], [""])

    def save(self, path: str | Path) -> Path:
        """Write a JSON file, replacing it as a whole, and return its path.

        Raises:
            ArtefactError: it cannot be written.
        """
        path = Path(path).expanduser()
        write_json(path, self.to_dict(), format=FORMAT, version=VERSION)
        return path


class _MetricRecord(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)

    value: float | int | None
    interval_95: list[float] | None = None
    why: str = ""


class _HistogramRecord(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    log10_edges: list[float]
    features: list[int]
    dead: int


class _Record(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    about: dict[str, JsonValue]
    metrics: dict[str, _MetricRecord]
    writes: dict[str, dict[str, _MetricRecord]] = {}
    density_histogram: _HistogramRecord | None = None


def load_evaluation(path: str | Path) -> Evaluation:
    """Read what `Evaluation.save` wrote. Metrics that this version does not define are left out.

    Raises:
        ArtefactError: the file is not one, is damaged, or is of another version.
    """
    path = Path(path).expanduser()
    record = read_json(path, format=FORMAT, version=VERSION, schema=_Record, expected="an evaluation of a featurizer")
    bars = record.density_histogram
    if bars is not None and len(bars.log10_edges) != len(bars.features) + 1:
        raise ArtefactError(str(path), "the histogram has another number of edges than its bars have")
    histogram = None if bars is None else Histogram(tuple(bars.log10_edges), tuple(bars.features), bars.dead)
    writes = {site: _metrics(path, metrics) for site, metrics in record.writes.items()}
    return Evaluation(_metrics(path, record.metrics), record.about, histogram, writes=writes)


def _records(metrics: Mapping[str, Metric]) -> dict[str, Any]:
    return {name: metric.record() for name, metric in metrics.items()}


def _metrics(path: Path, records: Mapping[str, _MetricRecord]) -> dict[str, Metric]:
    metrics = {}
    for name, each in records.items():
        if name not in DEFINITIONS:
            continue
        bounds = each.interval_95
        if bounds is not None and len(bounds) != 2:
            raise ArtefactError(str(path), f"the interval of {name!r} is not two numbers")
        value = None if each.value is None else float(each.value)
        metrics[name] = Metric(name, value, None if bounds is None else (bounds[0], bounds[1]), each.why)
    return metrics


def table_of(evaluations: list[Evaluation], labels: list[str]) -> Any:
    """Return a table of `rich` with a row for each metric and a column for each evaluation."""
    from rich.markup import escape
    from rich.table import Table

    alone = len(evaluations) == 1
    names = [name for name in DEFINITIONS if any(name in each.metrics for each in evaluations)]
    title = evaluations[0].title() if alone else ""
    missing = {name: why for each in evaluations for name, why in (each.about.get("not_measured") or {}).items()}
    missing = {name: why for name, why in missing.items() if name in GROUPS}
    caption = "\n".join(f"not measured: {name}, because {printable(str(why), 300)}" for name, why in missing.items())
    table = Table(title=escape(title) or None, title_justify="left", caption=escape(caption) or None)
    table.caption_justify = "left"
    table.add_column("metric", overflow="fold")
    for label in labels:
        table.add_column(escape(printable(label, 60)) if label else "value", overflow="fold")
    if alone:
        table.add_column("95 % interval")
    for name in names:
        cells = [str(each.metrics[name]) if name in each.metrics else "not measured" for each in evaluations]
        bounds = evaluations[0].metrics[name].interval if alone else None
        table.add_row(
            name, *map(escape, cells), *([f"{bounds[0]:.4g} to {bounds[1]:.4g}" if bounds else ""] if alone else [])
        )
    return table


def table_of_writes(writes: Mapping[str, Mapping[str, Metric]]) -> Any:
    """Return a table of `rich` with a row for each write and a column for each of its metrics."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title="at each write", title_justify="left")
    names = list(next(iter(writes.values())))
    for name in ("write", *names):
        table.add_column(name, overflow="fold")
    for site, metrics in writes.items():
        table.add_row(escape(printable(site, 60)), *(escape(str(metrics[name])) for name in names))
    return table


def frame_of(evaluations: list[Evaluation], labels: list[str]) -> Any:
    """Return a data frame with a row for each metric of each evaluation.

    Raises:
        MissingDependencyError: pandas is not installed.
    """
    try:
        import pandas
    except ImportError as error:
        raise MissingDependencyError("a data frame", "pandas", "pip install pandas") from error
    rows = rows_of(evaluations, labels)
    return pandas.DataFrame(rows if any(labels) else [{k: v for k, v in row.items() if k != "label"} for row in rows])


def rows_of(evaluations: list[Evaluation], labels: list[str]) -> list[dict[str, Any]]:
    """Return a row for each metric of each evaluation."""
    return [
        {
            "label": label,
            "site": site,
            "metric": name,
            "value": metric.value,
            "low": None if metric.interval is None else metric.interval[0],
            "high": None if metric.interval is None else metric.interval[1],
            "unit": metric.unit,
            "why": metric.why,
        }
        for each, label in zip(evaluations, labels, strict=True)
        for site, metrics in {"": each.metrics, **each.writes}.items()
        for name, metric in metrics.items()
    ]
