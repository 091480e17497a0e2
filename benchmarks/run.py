"""Run the benchmarks: ``python benchmarks/run.py``; see docs/benchmarks.md."""

from __future__ import annotations

import os
import warnings
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import artefacts
import collecting
import das
import derived_scalars
import dictionaries
import evaluate
import graphs
import harvest
import hooks
import patching
import report
import reporting
import sharded
import site_maps
import swapping
import timing
import torch
import tracing
import training
import typer
from rich.console import Console

BENCHMARKS = {
    benchmark.name: benchmark
    for theme in (
        das,
        artefacts,
        collecting,
        swapping,
        dictionaries,
        hooks,
        patching,
        evaluate,
        reporting,
        tracing,
        training,
        derived_scalars,
        site_maps,
        graphs,
        harvest,
        sharded,
    )
    for benchmark in theme.BENCHMARKS
}


class Dtype(StrEnum):
    """Dtypes of activations."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def main(
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    dtype: Annotated[Dtype, typer.Option(help="Of activations and models; bases stay in float32.")] = Dtype.float32,
    only: Annotated[list[str] | None, typer.Option(help="Name or prefix of benchmarks; may be repeated.")] = None,
    quick: Annotated[bool, typer.Option(help="Small sizes, to check that everything runs.")] = False,
    pairs: Annotated[int, typer.Option(help="Number of samples of each side.", min=2)] = 15,
    threads: Annotated[int, typer.Option(help="Of torch on the CPU; more than one needs an idle machine.", min=1)] = 1,
    processor: Annotated[bool, typer.Option(help="Ratios in CPU time, on a machine that others use too.")] = False,
    json: Annotated[Path | None, typer.Option(help="Write the results to this file.")] = None,
    docs: Annotated[bool, typer.Option(help="Write the table into docs/benchmarks.md.")] = False,
    table: Annotated[
        str | None,
        typer.Option(help="Table of the document to write; default: that of the device."),
    ] = None,
) -> None:
    """Compare the library with its peers, in alternating samples."""
    console = Console()
    console.width = max(console.width, 120)  # without a terminal the width is 80, which cuts the table
    if device.startswith("cuda") and not torch.cuda.is_available():
        console.print("skipped: torch sees no CUDA device")
        raise typer.Exit
    if docs and (quick or (only and table is None)):
        raise typer.BadParameter("the document needs a full run, or --only with --table", param_hint="--docs")
    chosen = [b for name, b in BENCHMARKS.items() if not only or name.startswith(tuple(only))]
    if not chosen:
        raise typer.BadParameter(f"choose from {', '.join(BENCHMARKS)}", param_hint="--only")
    torch.set_num_threads(threads)
    warnings.filterwarnings("ignore", module=r"(pyvene|transformers)\..*")
    settings = timing.Settings(
        torch.device(device),
        getattr(torch, dtype.value),
        quick,
        pairs=min(pairs, 3) if quick else pairs,
        sample=0.01 if quick else 0.05,
        processor=processor,
    )
    before = os.getloadavg()[0]
    result = report.Report(
        device=settings.device.type,
        dtype=dtype.value,
        quick=quick,
        pairs=settings.pairs,
        machine=report.Machine.here(settings),
        load=(before, before),
        rows=[],
        table=table,
    )
    if json is not None:
        json.parent.mkdir(parents=True, exist_ok=True)
    for benchmark in chosen:
        row = timing.run(benchmark, settings)
        console.print(f"{row.name}: {row.skipped or f'{row.ratio:.3g}'}", style="dim", highlight=False)
        result.rows.append(row)
        result.load = before, os.getloadavg()[0]
        if json is not None:  # after each row, so that a run that is ended keeps the rows that it has
            json.write_text(result.model_dump_json(indent=2) + "\n")
    result.print(console)
    if docs:
        report.write_document(result)


if __name__ == "__main__":
    typer.run(main)
