"""Cost of a DAS training step by its sizes: ``python benchmarks/plots.py`` draws docs/benchmarks-growth.png.

Curves are in CPU seconds. They are not ratios, in which the load of the machine would cancel, and CPU time depends on
that load less than wall time does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import das
import report
import timing
import torch
import typer
from matplotlib import pyplot
from matplotlib.axes import Axes
from pydantic import BaseModel
from rich.console import Console

WIDTHS = (512, 1024, 2048, 4096, 8192)
COUNTS = (16, 32, 64, 128, 256)
WIDTH, COUNT = 4096, 64

HERE = Path(__file__).resolve().parent
PICTURE = HERE.parent / "docs" / "benchmarks-growth.png"


class Point(BaseModel):
    """CPU seconds of one step at one size; None if the peer would take too long."""

    d_in: int
    n_features: int
    ours: float
    theirs: float | None


class Growth(BaseModel):
    """Points of both curves, and the machine that they were measured on."""

    machine: report.Machine
    by_count: list[Point]
    by_width: list[Point]


def main(
    json: Annotated[Path, typer.Option(help="File of the numbers.")] = HERE / "results" / "growth.json",
    draw_only: Annotated[bool, typer.Option(help="Draw the numbers in that file; measure nothing.")] = False,
    quick: Annotated[bool, typer.Option(help="Small sizes; write no files.")] = False,
    limit: Annotated[float, typer.Option(help="The peer's curve ends after a step of more CPU seconds.")] = 10.0,
    threads: Annotated[int, typer.Option(help="Threads of torch.", min=1)] = 1,
) -> None:
    """Measure both curves, write the numbers to a file and draw them."""
    if draw_only:
        draw(Growth.model_validate_json(json.read_text()), PICTURE)
        return
    torch.set_num_threads(threads)
    settings = timing.Settings(torch.device("cpu"), quick=quick, sample=0.01 if quick else 0.05)
    scale = 16 if quick else 1
    counts = [(WIDTH // scale, k // scale) for k in COUNTS]
    widths = [(d // scale, COUNT // scale) for d in WIDTHS]
    growth = Growth(
        machine=report.Machine.here(settings),
        by_count=_curve(counts, settings, limit),
        by_width=_curve(widths, settings, limit),
    )
    if not quick:
        json.parent.mkdir(parents=True, exist_ok=True)
        json.write_text(growth.model_dump_json(indent=2) + "\n")
        draw(growth, PICTURE)


def _curve(sizes: list[tuple[int, int]], settings: timing.Settings, limit: float) -> list[Point]:
    console = Console()
    points: list[Point] = []
    for d_in, n_features in sizes:
        ours = das.subspace(settings, d_in, n_features)
        point = Point(
            d_in=d_in,
            n_features=n_features,
            ours=timing.cpu_seconds(das.training_step(ours, ours.interchange, settings, d_in), settings),
            theirs=None,
        )
        before = [p.theirs for p in points]
        if all(seconds is not None and seconds < limit for seconds in before):
            point.theirs = _their_step(settings, d_in, n_features)
        points.append(point)
        console.print(point, highlight=False)
    return points


def _their_step(settings: timing.Settings, d_in: int, n_features: int) -> float | None:
    """Return the median of three samples after a warm-up; None if the peer is missing."""
    try:
        theirs = das.parametrized(settings, d_in, n_features)
    except timing.Skipped:
        return None
    step = das.training_step(theirs, theirs.interchange, settings, d_in)
    return timing.cpu_seconds(step, settings, samples=3)


def draw(growth: Growth, path: Path) -> None:
    """Draw two panels on logarithmic axes."""
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    _panel(axes[0], growth.by_count, "n_features", f"features k, at width d = {WIDTH}")
    _panel(axes[1], growth.by_width, "d_in", f"width d, at k = {COUNT} features")
    axes[0].set_ylabel("CPU seconds of a DAS training step")
    axes[0].legend(frameon=False)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=100, metadata={"Software": None})
    pyplot.close(figure)


def _panel(axis: Axes, points: list[Point], size: str, label: str) -> None:
    theirs = [point for point in points if point.theirs is not None]
    sizes = [getattr(point, size) for point in points]
    peer = {"color": "0.45", "label": "parametrized rotation"}
    axis.loglog(sizes[: len(theirs)], [point.theirs for point in theirs], "s--", **peer)
    axis.loglog(sizes, [point.ours for point in points], "o-", color="C0", label="featurizers")
    axis.set_xlabel(label)
    axis.set_xticks(sizes, [str(number) for number in sizes])
    axis.minorticks_off()
    axis.grid(True, alpha=0.25)


if __name__ == "__main__":
    typer.run(main)
