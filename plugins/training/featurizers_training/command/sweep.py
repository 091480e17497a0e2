"""Command ``featurizers sweep``."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated

import typer
from featurizers import Site
from featurizers.cli import layer_numbers, print_json, write_results
from featurizers.errors import UsageError
from featurizers.files import refuse_full

from featurizers_training.command import options


def sweep_command(
    model: options.ModelOption,
    pairs: options.PairsOption,
    out: options.Out,
    layers: Annotated[str | None, typer.Option(help="Such as 4,8,12 or 0-29; all if not given.")] = None,
    site_kind: Annotated[str, typer.Option(help="Kind of the sites, such as resid.post or mlp.out.")] = "resid.post",
    positions: Annotated[str, typer.Option(help="Tokens or names of the records, such as -1,subject or 0+1.")] = "-1",
    methods: Annotated[
        str, typer.Option(help="Some of das, dbm, das+dbm, boundless, full-vector, random, pca.")
    ] = "das,full-vector,pca,random",
    features: options.Features = None,
    controls: Annotated[str | None, typer.Option(help="Some of shuffled-labels,random-model.")] = None,
    test: options.Test = "0.2",
    objective: options.ObjectiveOption = "cross-entropy",
    epochs: options.Epochs = 5,
    batch_size: options.BatchSize = 32,
    micro_batch: options.MicroBatch = None,
    lr: options.Lr = None,
    gate_lr: options.GateLr = None,
    sparsity: options.Sparsity = None,
    temperature: options.Temperature = None,
    precision: options.Precision = "fp32",
    seed: options.Seed = 0,
    device: options.Device = None,
    dtype: options.Dtype = "float32",
    as_json: options.Json = False,
) -> None:
    """Search layers × positions by several methods, beside baselines and controls; write a table and a heat map."""
    from accelerate import PartialState
    from featurizers.models import Anatomy
    from rich.console import Console

    from featurizers_training.search.settings import Settings
    from featurizers_training.sweeps.report import tables
    from featurizers_training.sweeps.sweeping import sweep

    chosen = options.make_methods(options.words(methods), features, lr, gate_lr, sparsity, temperature, baselines=True)
    settings = Settings(
        epochs=epochs,
        batch_size=batch_size,
        micro_batch=micro_batch,
        seed=seed,
        precision=precision,  # type: ignore[arg-type]  # Settings checks it
    )
    at = [options.position(word) for word in options.words(positions)]
    refuse_full(out.expanduser())
    main = PartialState().is_main_process
    loaded = options.load(model, device, dtype)
    n_layers = Anatomy(loaded.model).n_layers
    numbers = range(n_layers) if layers is None else layer_numbers(layers, n_layers)
    read = functools.partial(options.read_pairs, tokenizer=loaded.tokenizer, positions=at[:1])
    kept, held_out = options.hold_out(read(pairs), test, seed, read, "test")
    if held_out is None:
        raise UsageError("a sweep measures on held-out pairs: give --test a file or a share")
    result = sweep(
        loaded.model,
        kept,
        held_out,
        [Site(site_kind, number) for number in numbers],
        at,
        chosen,
        controls=options.words(controls),
        objective=objective,
        settings=settings,
        progress=main and not as_json,
    )
    if not main:
        return
    cell, found = result.best()

    def write(folder: Path) -> None:
        result.write(folder)
        found.save(folder / "best")

    folder = write_results(out, write)
    artefact, best = folder / "best", cell.record()
    if as_json:
        print_json({"folder": str(folder), "artefact": str(artefact), "best": best, "cells": result.rows()})
        return
    for table in tables(result.rows(), str(result.about["title"])):
        Console(emoji=False).print(table)
    print(f"Tables and picture: {folder}/table.csv, table.json, heatmap.png")
    word = "Best search" if found.history else "Best"
    print(f"{word}: {best['method']} at {best['site']}, position {best['position']}: {cell.held_out}; in {artefact}")
