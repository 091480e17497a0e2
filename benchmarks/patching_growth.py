"""Cost of a grid by its sizes: ``python benchmarks/patching_growth.py`` draws docs/benchmarks-patching.png.

Curves are in forward passes of the base, in CPU time, which other programs disturb less. One run for each cell costs as
many passes as the grid has cells.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import patching
import report
import timing
import torch
import typer
from matplotlib import pyplot
from matplotlib.axes import Axes
from models import gpt2, prompts
from pydantic import BaseModel
from rich.console import Console

TOKENS, LAYERS = (4, 8, 16, 32), (3, 6, 12)
LENGTH, DEPTH = 16, 12

HERE = Path(__file__).resolve().parent
PICTURE = HERE.parent / "docs" / "benchmarks-patching.png"


class Point(BaseModel):
    """Cost of one grid, ``layers × tokens`` cells of ``resid.pre``, in forward passes of the base."""

    layers: int
    tokens: int
    forwards: float
    forward: float
    """CPU seconds of a forward pass."""


class Growth(BaseModel):
    """Points of both curves, and the machine that they were measured on."""

    machine: report.Machine
    by_tokens: list[Point]
    by_layers: list[Point]


def main(
    json: Annotated[Path, typer.Option(help="File of the numbers.")] = HERE / "results" / "patching-growth.json",
    draw_only: Annotated[bool, typer.Option(help="Draw the numbers in that file; measure nothing.")] = False,
    quick: Annotated[bool, typer.Option(help="Small sizes; write no files.")] = False,
) -> None:
    """Measure both curves, write the numbers to a file after each point, and draw them."""
    if draw_only:
        draw(Growth.model_validate_json(json.read_text()), PICTURE)
        return
    torch.set_num_threads(1)
    settings = timing.Settings(torch.device("cpu"), quick=quick)
    growth = Growth(machine=report.Machine.here(settings), by_tokens=[], by_layers=[])
    for points, sizes in (
        (growth.by_tokens, [(DEPTH, tokens) for tokens in TOKENS]),
        (growth.by_layers, [(layers, LENGTH) for layers in LAYERS]),
    ):
        for layers, tokens in sizes:
            known = next((p for p in growth.by_tokens if (p.layers, p.tokens) == (layers, tokens)), None)
            points.append(known or _point(settings, layers, tokens))
            Console().print(points[-1], highlight=False)
            if not quick:
                json.write_text(growth.model_dump_json(indent=2) + "\n")
    if not quick:
        draw(growth, PICTURE)


def _point(settings: timing.Settings, layers: int, tokens: int) -> Point:
    width, vocabulary = settings.size(768, 32), settings.size(50257, 100)
    model = gpt2(settings, layers=layers, width=width, vocabulary=vocabulary, length=64).requires_grad_(False)
    base, source = (prompts(settings, 1, tokens, vocabulary, seed) for seed in range(2))
    sites = [f"resid.pre:{layer}" for layer in range(layers)]
    grid = patching.Grid(model, base, source, sites, range(tokens), None, None, "")
    forward = timing.cpu_seconds(grid.forward, settings)
    return Point(
        layers=layers,
        tokens=tokens,
        forwards=timing.cpu_seconds(grid.packed, settings, samples=3) / forward,
        forward=forward,
    )


def draw(growth: Growth, path: Path) -> None:
    """Draw two panels on logarithmic axes."""
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    _panel(axes[0], growth.by_tokens, "tokens", f"tokens, in {DEPTH} layers")
    _panel(axes[1], growth.by_layers, "layers", f"layers, {LENGTH} tokens")
    axes[0].set_ylabel("forward passes of a grid, CPU time")
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=100, metadata={"Software": None})
    pyplot.close(figure)


def _panel(axis: Axes, points: list[Point], size: str, label: str) -> None:
    sizes = [getattr(point, size) for point in points]
    cells = [point.layers * point.tokens for point in points]
    axis.loglog(sizes, cells, "s--", color="0.45", label="one run for each cell")
    axis.loglog(sizes, [point.forwards for point in points], "o-", color="C0", label="featurizers.patch")
    axis.set_xlabel(label)
    axis.set_xticks(sizes, [str(number) for number in sizes])
    axis.minorticks_off()
    axis.grid(True, alpha=0.25)


if __name__ == "__main__":
    typer.run(main)
