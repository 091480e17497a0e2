"""The commands ``train``, ``evaluate`` and ``sweep``."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import featurizers
import typer
from accelerate import PartialState
from featurizers import Featurizer, Site
from featurizers.cli import dtype_named, layer_numbers
from featurizers.errors import UsageError
from featurizers.files import refuse_full
from featurizers.models import Anatomy, LanguageModel, load_model, site_of
from rich.console import Console
from torch import nn

from featurizers_training import options, report
from featurizers_training.controls import check_controls, controlled
from featurizers_training.evaluation import Accuracy, evaluate
from featurizers_training.found import Found
from featurizers_training.methods import Method
from featurizers_training.pairs import Pairs, Position
from featurizers_training.search import Settings, train
from featurizers_training.sweep import sweep

ModelOption = Annotated[str, typer.Option("--model", help="Hub id, folder or .gguf file of a language model.")]
PairsOption = Annotated[str, typer.Option("--pairs", help="JSON lines, one counterfactual pair each.")]
Out = Annotated[Path, typer.Option(help="A new folder.")]
Features = Annotated[int | None, typer.Option(min=1, help="Dimensions of the subspace.")]
Held = Annotated[str, typer.Option("--test", help="File of held-out pairs, or the share of the pairs to hold out.")]
ObjectiveOption = Annotated[str, typer.Option("--objective", help="cross-entropy or logit-difference.")]
Epochs = Annotated[int, typer.Option(min=1, help="Passes over the pairs.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Pairs an optimizer step.")]
MicroBatch = Annotated[int | None, typer.Option(min=1, help="Pairs a forward pass, if fewer.")]
Lr = Annotated[float | None, typer.Option(help="Learning rate of the subspace.")]
GateLr = Annotated[float | None, typer.Option(help="Learning rate of the gate.")]
Sparsity = Annotated[float | None, typer.Option(help="Added to the loss for the features that are taken.")]
Temperature = Annotated[str | None, typer.Option(help="Of the gate, first and last, such as 1,0.01.")]
Precision = Annotated[str, typer.Option(help="fp32 (as the model is), bf16 or fp16.")]
Seed = Annotated[int, typer.Option(min=0, help="Of everything random.")]
Device = Annotated[str | None, typer.Option(help="Such as cpu or cuda:0; an accelerator if there is one.")]
Dtype = Annotated[str, typer.Option(help="Of the model: float32, bfloat16, float16 or auto.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]


def train_command(
    method: Annotated[str, typer.Argument(metavar="METHOD", help="das, dbm, das+dbm or boundless.")],
    model: ModelOption,
    pairs: PairsOption,
    site: Annotated[list[str], typer.Option(help="SITE or SITE@POSITION; repeat it to search several at once.")],
    out: Out,
    features: Features = None,
    through: Annotated[
        str | None, typer.Option(help="Search in the features of this artefact, as SOURCE elsewhere.")
    ] = None,
    validation: Annotated[
        str | None, typer.Option(help="File of pairs to measure on after each epoch, or a share of the pairs.")
    ] = None,
    test: Held = "0.2",
    objective: ObjectiveOption = "cross-entropy",
    epochs: Epochs = Settings.epochs,
    batch_size: BatchSize = Settings.batch_size,
    micro_batch: MicroBatch = None,
    lr: Lr = None,
    gate_lr: GateLr = None,
    sparsity: Sparsity = None,
    temperature: Temperature = None,
    precision: Precision = Settings.precision,
    patience: Annotated[
        int | None, typer.Option(min=1, help="Stop after so many epochs without a better validation.")
    ] = None,
    seed: Seed = Settings.seed,
    checkpoints: Annotated[Path | None, typer.Option(help="Folder to save the state in, and to go on from.")] = None,
    control: Annotated[
        list[str] | None, typer.Option(help="Search once more with shuffled-labels, or in a random-model.")
    ] = None,
    device: Device = None,
    dtype: Dtype = "float32",
    push: Annotated[str | None, typer.Option(help="Repository of the Hub to upload to, owner/name.")] = None,
    as_json: Json = False,
) -> None:
    """Find the features of some sites whose interchange gives the counterfactual answers, and save them."""
    (chosen,) = options.make_methods(
        [method], _method_options(features, lr, gate_lr, sparsity, temperature), baselines=False
    )
    settings = Settings(
        epochs=epochs,
        batch_size=batch_size,
        micro_batch=micro_batch,
        seed=seed,
        precision=precision,  # type: ignore[arg-type]  # which they check
        patience=patience,
    )
    sites, positions = options.sites_and_positions(site)
    check_controls(control or [])
    refuse_full(out.expanduser())
    main = PartialState().is_main_process
    loaded = _load(model, device, dtype)
    read = functools.partial(_read, tokenizer=loaded.tokenizer, positions=positions)
    kept, held_out = options.hold_out(read(pairs), test, seed, read, "test")
    kept, watched = options.hold_out(kept, validation, seed, read, "validation")
    given = {"train": kept, "validation": watched, "test": held_out}
    parts = {name: part for name, part in given.items() if part is not None}
    search = functools.partial(
        _search,
        sites=sites,
        method=chosen,
        objective=objective,
        settings=settings,
        through=None if through is None else featurizers.load(through, device=_device(device)),
        progress=main and not as_json,
    )
    found, seconds = search(loaded.model, parts, checkpoints=checkpoints)
    rows = [_row(method, None, found, seconds)]
    for name in control or []:
        folder = checkpoints and checkpoints.with_name(f"{checkpoints.name}-{name}")
        other, shuffled = controlled(name, loaded.model, parts, seed)
        rows.append(_row(f"control: {name}", name, *search(other, shuffled, checkpoints=folder)))
    if not main:
        return
    folder = found.save(out)
    result = {"artefact": str(folder), "sites": list(map(str, sites)), "rows": list(map(_as_json, rows))}
    url = None if push is None else featurizers.push(folder, push)
    if url is not None:
        result["url"] = url.pr_url or url.commit_url
    if as_json:
        _print_json(result)
        return
    Console().print(report.summary(rows))
    print(f"Artefact: {folder}" + (f", {result['url']}" if url is not None else ""))
    source = str(folder) if folder.is_absolute() else f"./{folder}"
    each = "" if len(sites) == 1 else ", subfolder=…"
    print(f"Load it:  featurizers.load({source!r}{each}).attach(model)")


def evaluate_command(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="owner/name, owner/name@revision, ./folder or hub:owner/name.")
    ],
    model: ModelOption,
    pairs: PairsOption,
    site: Annotated[
        list[str] | None, typer.Option(help="SITE@POSITION to measure at, instead of the artefact's own.")
    ] = None,
    subfolder: Annotated[
        str | None, typer.Option(help="One artefact of a collection; all at once if not given.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit.")] = None,
    any_model: Annotated[bool, typer.Option("--any-model", help="Take another model than the artefact names.")] = False,
    device: Device = None,
    dtype: Dtype = "float32",
    as_json: Json = False,
) -> None:
    """Measure the interchange-intervention accuracy of an artefact, or of a whole collection at once, on pairs."""
    wanted = _load_all(source, subfolder, revision, device)
    positions: list[Position] = []
    if site:
        sites, positions = options.sites_and_positions(site)
        if len(sites) != len(wanted):
            raise UsageError(f"there are {len(wanted)} featurizers; give --site so many times or not")
        for featurizer, place in zip(wanted, sites, strict=True):
            old = site_of(featurizer) if featurizer.site else place
            featurizer.site = place.at(position=old.position, model=old.model, model_revision=old.model_revision)
    loaded = _load(model, device, dtype)
    featurizers.attach(loaded.model, wanted, any_model=any_model)
    found_at = [site_of(featurizer).position for featurizer in wanted]
    own: list[Position] = [list(position) for position in found_at if position]
    if positions or len(own) < len(wanted):
        on = _read(pairs, tokenizer=loaded.tokenizer, positions=positions)
    else:  # names are of no use here, and so the records are read at any token first
        on = _read(pairs, tokenizer=loaded.tokenizer, positions=[-1])
        on = on.at() if any(map(_says_where, on.records)) else on.at(*own)
    measured = evaluate(loaded.model, on, wanted)
    if not PartialState().is_main_process:
        return
    rows = [{"id": f.id, "site": str(f.site), "position": on.common_position(j)} for j, f in enumerate(wanted)]
    if as_json:
        _print_json({**measured.record(), "featurizers": rows})
        return
    for row in rows:
        tokens = "of each pair" if row["position"] is None else ", ".join(map(str, row["position"]))
        print(f"{row['id']} ({row['site']}, tokens {tokens})")
    print(f"Interchange-intervention accuracy: {measured}, {measured.n} pairs")


def sweep_command(
    model: ModelOption,
    pairs: PairsOption,
    out: Out,
    layers: Annotated[str | None, typer.Option(help="Such as 4,8,12 or 0-29; all if not given.")] = None,
    site_kind: Annotated[str, typer.Option(help="Kind of the sites, such as resid.post or mlp.out.")] = "resid.post",
    positions: Annotated[str, typer.Option(help="Tokens or names of the records, such as -1,subject or 0+1.")] = "-1",
    methods: Annotated[
        str, typer.Option(help="Some of das, dbm, das+dbm, boundless, full-vector, random, pca.")
    ] = "das,full-vector,pca,random",
    features: Features = None,
    controls: Annotated[str | None, typer.Option(help="Some of shuffled-labels,random-model.")] = None,
    test: Held = "0.2",
    objective: ObjectiveOption = "cross-entropy",
    epochs: Epochs = Settings.epochs,
    batch_size: BatchSize = Settings.batch_size,
    micro_batch: MicroBatch = None,
    lr: Lr = None,
    gate_lr: GateLr = None,
    sparsity: Sparsity = None,
    temperature: Temperature = None,
    precision: Precision = Settings.precision,
    seed: Seed = Settings.seed,
    device: Device = None,
    dtype: Dtype = "float32",
    as_json: Json = False,
) -> None:
    """Search layers × positions by several methods, beside baselines and controls; writes a table and a heat map."""
    chosen = options.make_methods(
        options.words(methods), _method_options(features, lr, gate_lr, sparsity, temperature), baselines=True
    )
    settings = Settings(
        epochs=epochs,
        batch_size=batch_size,
        micro_batch=micro_batch,
        seed=seed,
        precision=precision,  # type: ignore[arg-type]  # which they check
    )
    at = [options.position(word) for word in options.words(positions)]
    refuse_full(out.expanduser())
    main = PartialState().is_main_process
    loaded = _load(model, device, dtype)
    n_layers = Anatomy(loaded.model).n_layers
    numbers = range(n_layers) if layers is None else layer_numbers(layers, n_layers)
    read = functools.partial(_read, tokenizer=loaded.tokenizer, positions=at[:1])
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
    folder = result.write(out)
    cell, found = result.best()
    artefact = found.save(folder / "best")
    if as_json:
        _print_json({"folder": str(folder), "artefact": str(artefact), "best": cell.record(), "cells": result.rows()})
        return
    for table in report.tables(result.rows(), str(result.about["title"])):
        Console().print(table)
    best = cell.record()
    print(f"Tables and picture: {folder}/table.csv, table.json, heatmap.png")
    word = "Best search" if found.history else "Best"
    print(f"{word}: {best['method']} at {best['site']}, position {best['position']}: {cell.held_out}; in {artefact}")


def _method_options(
    features: int | None, lr: float | None, gate_lr: float | None, sparsity: float | None, temperature: str | None
) -> dict[str, Any]:
    return {
        "n_features": features,
        "lr": lr,
        "gate_lr": gate_lr,
        "sparsity": sparsity,
        "temperature": options.temperatures(temperature),
    }


def _load(name: str, device: str | None, dtype: str) -> LanguageModel:
    return load_model(name, device=_device(device), dtype=dtype_named(dtype))


def _device(device: str | None) -> Any:
    """The device that was asked for, or that of this process."""
    return PartialState().device if device is None else device


def _says_where(record: Mapping[str, Any]) -> bool:
    """Whether a record says its tokens, and not names to choose from."""
    return not isinstance(record.get("base_position", {}), Mapping)


def _read(path: str, tokenizer: Any, positions: Sequence[Position]) -> Pairs:
    """Pairs of a file, at a position for each site or at their own."""
    pairs = Pairs.read(path, tokenizer, position=positions[0] if positions else None)
    return pairs.at(*positions) if len(positions) > 1 else pairs


def _search(
    model: nn.Module, parts: Mapping[str, Pairs], *, sites: list[Site], method: Method, **settings: Any
) -> tuple[Found, float]:
    """What a search finds, measured on the test too, and the seconds that it took."""
    start = time.perf_counter()
    found = train(model, parts["train"], sites, method, validation=parts.get("validation"), **settings)
    if "test" in parts:
        found = found.measured(test=evaluate(model, parts["test"], found.featurizers))
    return found, time.perf_counter() - start


def _row(name: str, control: str | None, found: Found, seconds: float) -> dict[str, Any]:
    return {
        "name": name,
        "control": control,
        "accuracy": found.accuracy,
        "selected": found.selected,
        "seconds": round(seconds, 3),
    }


def _as_json(row: Mapping[str, Any]) -> dict[str, Any]:
    measured: Mapping[str, Accuracy] = row["accuracy"]
    return {**row, "accuracy": {name: one.record() for name, one in measured.items()}}


def _load_all(source: str, subfolder: str | None, revision: str | None, device: str | None) -> list[Featurizer[Any]]:
    """The featurizers of an artefact or of a collection, in the order of the search that found them."""
    names = [subfolder] if subfolder else list(featurizers.list_artefacts(source, revision=revision))
    found = [
        featurizers.load(source, subfolder=name or None, revision=revision, device=_device(device)) for name in names
    ]
    order = found[0].metadata.get("training", {}).get("sites", [])
    return sorted(found, key=lambda f: order.index(str(f.site)) if str(f.site) in order else len(order))


def _print_json(data: Any) -> None:
    print(json.dumps(data, indent=2, ensure_ascii=True))
