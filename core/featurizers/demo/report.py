"""The table and the picture of a search."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from featurizers.demo.search import METHODS, Row


def table(title: str, rows: Sequence[Row], best: Row) -> Table:
    """Interchange accuracy by site and method; the best site is marked."""
    shown = Table(title=title, title_justify="left", caption_justify="left")
    shown.add_column("site")
    for name in METHODS:
        shown.add_column(name, justify="right")
    for row in rows:
        cells = [f"{row.accuracy[name]:.0%}" for name in METHODS]
        shown.add_row(str(row.site), *cells, style="bold" if row is best else None)
    shown.caption = "Share of held-out pairs answered as if the variable were the source's."
    return shown


def heat_map(title: str, rows: Sequence[Row], path: Path) -> None:
    """The same as a picture: methods down, sites across."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    values = [[row.accuracy[name] for row in rows] for name in METHODS]
    figure, axes = plt.subplots(figsize=(1.6 + 1.1 * len(rows), 3.2), layout="constrained")
    image = axes.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    axes.set_xticks(range(len(rows)), [str(row.site) for row in rows], rotation=30, ha="right")
    axes.set_yticks(range(len(METHODS)), METHODS)
    axes.set_title(title, fontsize=10, loc="left", wrap=True)
    for y, line in enumerate(values):
        for x, value in enumerate(line):
            axes.text(x, y, f"{value:.0%}", ha="center", va="center", color="white" if value < 0.6 else "black")
    figure.colorbar(image, ax=axes, label="interchange accuracy")
    figure.savefig(path, dpi=120)
    plt.close(figure)
