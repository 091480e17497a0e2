"""Tables and pictures of searches and sweeps."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featurizers.errors import MissingDependencyError
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = Mapping[str, Any]
"""A cell of a sweep, as `Cell.record` returns it."""


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """Write rows as comma-separated values, with their names in the first line."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def tables(rows: Sequence[Row], title: str) -> list[Table]:
    """Return one table of the searches and one of each control; sites and positions go down, methods across."""
    several = len({row["position"] for row in rows}) > 1
    made = []
    for control in dict.fromkeys(row["control"] for row in rows):
        part = [row for row in rows if row["control"] == control]
        table = Table(title=title if control is None else f"control: {control}", title_justify="left")
        if control is None:
            widest = max(row["high_95"] - row["low_95"] for row in rows) / 2
            table.caption = f"Accuracy on held-out pairs (95 %: ±{widest:.0%} at most) / on the pairs of the search."
            table.caption_justify = "left"
        table.add_column("site")
        if several:
            table.add_column("position")
        methods = list(dict.fromkeys(row["method"] for row in part))
        for method in methods:
            table.add_column(escape(method), justify="right")
        cells = {
            (row["site"], row["position"], row["method"]): f"{row['accuracy']:.0%} / {row['train_accuracy']:.0%}"
            for row in part
        }
        for site, position in dict.fromkeys((row["site"], row["position"]) for row in part):
            names = [escape(site), escape(position)] if several else [escape(site)]
            table.add_row(*names, *(cells[site, position, method] for method in methods))
        made.append(table)
    return made


def summary(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return a table of one search, with its controls below.

    Args:
        rows: each with a ``name``, an ``accuracy`` for each part that was measured, and ``selected`` at each site.
    """
    measured = list(rows[0]["accuracy"])
    table = Table("", *measured, "selected", caption_justify="left")
    table.caption = "Interchange-intervention accuracy, with its 95 % confidence interval."
    for row in rows:
        counts = ", ".join("all" if count is None else str(count) for count in row["selected"])
        accuracies = [str(row["accuracy"][name]) for name in measured]
        table.add_row(escape(row["name"]), *accuracies, counts)
    return table


def heat_map(rows: Sequence[Row], title: str) -> Figure:
    """Draw held-out accuracies: a panel for each method, positions down and sites across.

    With a single position there is one panel, methods down. Each control is drawn as a method. All panels share one
    colour scale.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError("a heat map", "matplotlib", "pip install 'featurizers-training[plots]'") from error
    panels = _panels(rows)
    sites = list(dict.fromkeys(row["site"] for row in rows))
    heights = [len(lines) + 0.6 for lines in panels.values()]
    figure = Figure(figsize=(3 + 0.6 * len(sites), 1.5 + 0.42 * sum(heights)), layout="constrained")
    all_axes = figure.subplots(len(panels), 1, squeeze=False, sharex=True, height_ratios=heights)[:, 0]
    for axes, (name, lines) in zip(all_axes, panels.items(), strict=True):
        values = [list(line.values()) for line in lines.values()]
        axes.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        axes.set_xticks(range(len(sites)), sites, rotation=30, ha="right")
        axes.set_yticks(range(len(lines)), list(lines))
        if name:
            axes.set_title(name, fontsize=10, loc="left")
        for y, line in enumerate(values):
            for x, value in enumerate(line):
                color = "white" if value < 0.6 else "black"
                axes.text(x, y, f"{value:.0%}", ha="center", va="center", color=color, fontsize=8)
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    figure.colorbar(all_axes[0].images[0], ax=list(all_axes), label="accuracy on held-out pairs", aspect=30)
    return figure


def _panels(rows: Sequence[Row]) -> dict[str, dict[str, dict[str, float]]]:
    """Return accuracies by panel, line and site."""
    several = len({row["position"] for row in rows}) > 1
    panels: dict[str, dict[str, dict[str, float]]] = {}
    for row in rows:
        name = row["method"] if row["control"] is None else f"{row['method']}, {row['control']}"
        panel, line = (name, row["position"]) if several else ("", name)
        panels.setdefault(panel, {}).setdefault(line, {})[row["site"]] = row["accuracy"]
    return panels
