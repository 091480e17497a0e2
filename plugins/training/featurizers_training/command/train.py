"""Command ``featurizers train``."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import featurizers
import typer
from featurizers import Site
from featurizers.cli import commit_link, print_json, write_results
from featurizers.files import refuse_full

from featurizers_training.command import options

if TYPE_CHECKING:
    from torch import nn

    from featurizers_training.methods.base import Method
    from featurizers_training.pairs import Pairs
    from featurizers_training.search.found import Found


def train_command(
    method: Annotated[str, typer.Argument(metavar="METHOD", help="das, dbm, das+dbm or boundless.")],
    model: options.ModelOption,
    pairs: options.PairsOption,
    site: Annotated[list[str], typer.Option(help="SITE or SITE@POSITION; repeat it to search several at once.")],
    out: options.Out,
    features: options.Features = None,
    through: Annotated[
        str | None, typer.Option(help="Search in the features of this artefact, as SOURCE elsewhere.")
    ] = None,
    validation: Annotated[
        str | None, typer.Option(help="File of pairs to measure on after each epoch, or a share of the pairs.")
    ] = None,
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
    patience: Annotated[
        int | None, typer.Option(min=1, help="Stop after this many epochs without a better validation.")
    ] = None,
    seed: options.Seed = 0,
    checkpoints: Annotated[Path | None, typer.Option(help="Folder to save the state in, and to resume from.")] = None,
    control: Annotated[
        list[str] | None, typer.Option(help="Search once more with shuffled-labels, or in a random-model.")
    ] = None,
    device: options.Device = None,
    dtype: options.Dtype = "float32",
    push: Annotated[str | None, typer.Option(help="Repository of the Hub to upload to, owner/name.")] = None,
    as_json: options.Json = False,
) -> None:
    """Find the features of some sites whose interchange gives the counterfactual answers, and save them."""
    from accelerate import PartialState
    from rich.console import Console

    from featurizers_training.command.checks import Checks
    from featurizers_training.search.settings import Settings
    from featurizers_training.sweeps.controls import check_controls, controlled
    from featurizers_training.sweeps.report import summary

    (chosen,) = options.make_methods([method], features, lr, gate_lr, sparsity, temperature, baselines=False)
    settings = Settings(
        epochs=epochs,
        batch_size=batch_size,
        micro_batch=micro_batch,
        seed=seed,
        precision=precision,  # type: ignore[arg-type]  # Settings checks it
        patience=patience,
    )
    sites, positions = options.sites_and_positions(site)
    check_controls(control or [])
    refuse_full(out.expanduser())
    main = PartialState().is_main_process
    loaded = options.load(model, device, dtype)
    read = functools.partial(options.read_pairs, tokenizer=loaded.tokenizer, positions=positions)
    kept, held_out = options.hold_out(read(pairs), test, seed, read, "test")
    kept, watched = options.hold_out(kept, validation, seed, read, "validation")
    by_name = {"train": kept, "validation": watched, "test": held_out}
    parts = {name: part for name, part in by_name.items() if part is not None}
    search = functools.partial(
        _search,
        sites=sites,
        method=chosen,
        objective=objective,
        settings=settings,
        through=None if through is None else featurizers.load(through, device=options.device_of(device)),
        progress=main and not as_json,
    )
    found, row = search(method, None, loaded.model, parts, checkpoints=checkpoints)
    rows = [row]
    for name in control or []:
        folder = checkpoints and checkpoints.with_name(f"{checkpoints.name}-{name}")
        other, shuffled = controlled(name, loaded.model, parts, seed)
        rows.append(search(f"control: {name}", name, other, shuffled, checkpoints=folder)[1])
    part = "test" if "test" in parts else "train"
    checks = Checks.of(loaded.model, parts[part], part, sites, settings)
    if not main:
        return
    for warning in checks.warnings():
        print(f"warning: {warning}", file=sys.stderr)
    folder = write_results(out, found.save)
    url = None if push is None else featurizers.push(folder, push)
    link = None if url is None else commit_link(url)
    if as_json:
        records = [
            {**row, "accuracy": {name: measured.record() for name, measured in row["accuracy"].items()}} for row in rows
        ]
        result = {
            "artefact": str(folder),
            "sites": list(map(str, sites)),
            "checks": checks.record(),
            "rows": records,
        }
        print_json(result if link is None else {**result, "url": link})
        return
    Console(emoji=False).print(summary(rows))
    for line in checks.lines():
        print(line)
    print(f"Artefact: {folder}" + (f", {link}" if link is not None else ""))
    source = str(folder) if folder.is_absolute() else f"./{folder}"
    each = "" if len(sites) == 1 else ", subfolder=…"
    print(f"Load it:  featurizers.load({source!r}{each}).attach(model)")


def _search(
    name: str,
    control: str | None,
    model: nn.Module,
    parts: Mapping[str, Pairs],
    *,
    sites: list[Site],
    method: Method,
    **more: Any,
) -> tuple[Found, dict[str, Any]]:
    """Search, measure the result on the test pairs too, and return it with its row of the summary."""
    from featurizers_training.evaluation import evaluate
    from featurizers_training.search.training import train

    start = time.perf_counter()
    found = train(model, parts["train"], sites, method, validation=parts.get("validation"), **more)
    if "test" in parts:
        found = found.measured(test=evaluate(model, parts["test"], found.featurizers))
    row = {
        "name": name,
        "control": control,
        "accuracy": found.accuracy,
        "selected": found.selected,
        "seconds": round(time.perf_counter() - start, 3),
    }
    return found, row
