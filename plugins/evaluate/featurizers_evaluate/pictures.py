"""Pictures: sparsity against reconstruction, and densities of features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from featurizers.errors import MissingDependencyError, printable

from featurizers_evaluate.result import Evaluation, Histogram


def trade_off(
    labels: Sequence[str], evaluations: Sequence[Evaluation], x: str, y: str, *, ax: Any = None, joined: bool = False
) -> Any:
    """Draw one metric against another; see `Comparison.plot`.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        UsageError: the vertical metric was not measured.
    """
    ax = _axes(5.5, 4.0) if ax is None else ax
    columns = [_across(each, x) for each in evaluations]
    heights = [each[y] for each in evaluations]
    if joined:
        ax.plot(columns, heights, color="grey", linewidth=1, zorder=1)
    for label, column, each, height in zip(labels, columns, evaluations, heights, strict=True):
        bounds = each.metrics[y].interval
        error = None if bounds is None else [[max(0.0, height - bounds[0])], [max(0.0, bounds[1] - height)]]
        ax.errorbar([column], [height], yerr=error, fmt="o", capsize=2)
        text = printable(label, 40).replace("$", r"\$")
        ax.annotate(text, (column, height), xytext=(4, 4), textcoords="offset points", fontsize="small")
    if min(columns) > 0 and max(columns) > 20 * min(columns):
        ax.set_xscale("log")
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    return ax


def densities(histogram: Histogram, *, ax: Any = None) -> Any:
    """Draw the numbers of features by density, dead ones in a bar of their own; return matplotlib's axes.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    ax = _axes(5.5, 3.0) if ax is None else ax
    width = histogram.edges[1] - histogram.edges[0]
    ax.bar(histogram.edges[:-1], histogram.counts, width=width, align="edge")
    ax.bar([histogram.edges[0] - 2 * width], [histogram.dead], width=width, align="edge", color="grey", label="dead")
    ax.set_xlabel("density, log10 of the share of tokens")
    ax.set_ylabel("features")
    ax.legend()
    return ax


def _across(evaluation: Evaluation, name: str) -> float:
    metric = evaluation.metrics.get(name)
    if metric is not None and metric.value is not None:
        return metric.value
    return float(evaluation.about.get("n_features") or 0)


def _axes(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError("a picture", "matplotlib", "pip install 'featurizers-evaluate[plots]'") from error
    return Figure(figsize=(width, height), layout="constrained").add_subplot()
