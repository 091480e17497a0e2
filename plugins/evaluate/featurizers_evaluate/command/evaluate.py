"""Command ``featurizers evaluate``."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import featurizers
import typer
from featurizers.cli import print_json
from featurizers.errors import MissingDependencyError, UsageError, printable
from featurizers.files import filling
from featurizers.registry import host

from featurizers_evaluate.command import options
from featurizers_evaluate.processes import is_first, torchrun_group

if TYPE_CHECKING:
    from featurizers_evaluate.result import Evaluation


def evaluate_command(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="owner/name, owner/name@revision, ./folder or hub:owner/name.")
    ],
    model: options.Model = None,
    data: options.Data = None,
    harvest: options.Harvest = None,
    pairs: Annotated[
        str | None, typer.Option(help="File of JSON lines, one counterfactual pair each, to measure accuracy on.")
    ] = None,
    key: options.Key = None,
    split: options.Split = None,
    metrics: options.Metrics = None,
    ablations: options.Ablations = None,
    tokens: options.Tokens = None,
    context: options.Context = None,
    batch_size: options.BatchSize = None,
    exclude_special: options.ExcludeSpecial = False,
    mask_first: options.MaskFirst = None,
    sweep_over: Annotated[
        str | None, typer.Option("--sweep", help="k=1,2,4: keep so many features; or threshold=0.1,1.")
    ] = None,
    seed: options.Seed = None,
    out: options.Out = None,
    site: Annotated[
        list[str] | None,
        typer.Option(help="To measure at, instead of the artefact's own; with --pairs SITE@POSITION."),
    ] = None,
    subfolder: Annotated[
        str | None, typer.Option(help="One artefact of a collection; with --pairs all at once.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit.")] = None,
    cluster: Annotated[
        str | None,
        typer.Option(help="With --pairs: label, base or source, an interval for pairs that share it."),
    ] = None,
    any_model: options.AnyModel = False,
    device: options.Device = None,
    dtype: options.Dtype = "float32",
    as_json: options.Json = False,
) -> None:
    """Measure an artefact on documents: reconstruction, sparsity, effect on the model; or its accuracy on pairs."""
    of_data = {
        "--key": key,
        "--split": split,
        "--metrics": metrics,
        "--ablations": ablations,
        "--tokens": tokens,
        "--context": context,
        "--batch-size": batch_size,
        "--exclude-special": exclude_special or None,
        "--mask-first": mask_first,
        "--sweep": sweep_over,
        "--seed": seed,
        "--out": out,
    }
    if harvest is not None:
        options.refuse_torchrun("--harvest")
        of_model = {"--model": model, "--data": data, "--pairs": pairs, "--cluster": cluster, "--device": device}
        unfit = ("--key", "--split", "--ablations", "--context", "--exclude-special")
        options.refuse_given({**of_model, **{name: of_data[name] for name in unfit}}, options.OF_HARVEST)
        own = _one_site(site)
        arguments = options.of_harvest(
            metrics=metrics,
            tokens=tokens,
            batch_size=batch_size,
            mask_first=mask_first,
            seed=seed,
            any_model=any_model,
            as_json=as_json,
            harvest=harvest,
        )
        _measure(source, subfolder, revision, (), own, sweep_over, arguments, out, as_json)
        return
    if model is None:
        raise UsageError("give --model and --data, or --harvest with the folder of a harvest")
    if pairs is not None and data is None:
        if given := [name for name, value in of_data.items() if value is not None]:
            raise UsageError(f"{given[0]} is for documents, --data, not for --pairs")
        options.refuse_torchrun("--pairs")
        _on_pairs(source, model, pairs, site, subfolder, revision, any_model, cluster, device, dtype, as_json)
        return
    if data is None or pairs is not None:
        raise UsageError("give --data with documents, or --pairs with a file of counterfactual pairs")
    if cluster is not None:
        raise UsageError("--cluster is for --pairs; intervals on documents are of whole documents")
    own = _one_site(site)
    options.check_out(out)
    if sweep_over is not None:
        options.numbers(sweep_over)
    language_model = options.loaded(model, device, dtype)
    with torchrun_group() as group:
        documents, arguments = options.arguments(
            language_model,
            data,
            key=key,
            split=split,
            metrics=metrics,
            ablations=ablations,
            tokens=tokens,
            context=context,
            batch_size=batch_size,
            exclude_special=exclude_special,
            mask_first=mask_first,
            seed=seed,
            any_model=any_model,
            as_json=as_json,
            group=group,
        )
        run = (language_model.model, documents)
        _measure(source, subfolder, revision, run, own, sweep_over, arguments, out, as_json)


def _one_site(site: list[str] | None) -> str | None:
    if site is not None and len(site) > 1:
        raise UsageError("give --site once: documents are measured at one site")
    return None if site is None else site[0]


def _measure(
    source: str,
    subfolder: str | None,
    revision: str | None,
    run: tuple[Any, ...],
    site: str | None,
    sweep_over: str | None,
    arguments: dict[str, Any],
    out: Path | None,
    as_json: bool,
) -> None:
    """Measure an artefact with all its features or with fewer, and show the result.

    Args:
        source: of the artefact, with the next two.
        subfolder: as in `featurizers.load`.
        revision: as there.
        run: model and documents; empty for a harvest, which the arguments have.
        site: to measure at.
        sweep_over: as the option ``--sweep``.
        arguments: of `evaluate`.
        out: folder to write to.
        as_json: whether to print JSON.
    """
    from featurizers_evaluate.evaluating import evaluate, sweep

    options.check_out(out)
    limits = None if sweep_over is None else options.numbers(sweep_over)
    device = next(run[0].parameters()).device if run else "cpu"
    f = featurizers.load(source, subfolder=subfolder, revision=revision, device=device)
    if limits is not None:
        found = sweep(f, *run, k=limits[0], threshold=limits[1], site=site, **arguments)
        if is_first():
            options.show(found, out, joined=True, as_json=as_json)
        return
    result = evaluate(f, *run, site=site, **arguments)
    if is_first():
        _show(result, out, as_json)


def _show(result: Evaluation, out: Path | None, as_json: bool) -> None:
    from rich.console import Console

    from featurizers_evaluate.pictures import densities

    if as_json:
        print_json(result.to_dict())
    else:
        Console(emoji=False, highlight=False).print(*result.tables())
    if out is None:
        return
    drawn = result.histogram is not None and find_spec("matplotlib") is not None
    with filling(out.expanduser()) as new:
        result.save(new / "evaluation.json")
        if drawn and result.histogram is not None:
            densities(result.histogram).figure.savefig(new / "densities.png", dpi=150)
    if not as_json:
        print(f"Written: {printable(str(out), 500)}/evaluation.json{', densities.png' if drawn else ''}")


def _on_pairs(
    source: str,
    model: str,
    pairs: str,
    site: list[str] | None,
    subfolder: str | None,
    revision: str | None,
    any_model: bool,
    cluster: str | None,
    device: str | None,
    dtype: str,
    as_json: bool,
) -> None:
    """Measure interchange-intervention accuracy by featurizers-training.

    Raises:
        MissingDependencyError: it is not installed.
    """
    if "training" not in host().names():
        raise MissingDependencyError("--pairs", "featurizers-training", "pip install 'featurizers[training]'")
    training: Any = host().module("training")
    training.evaluate_command(
        source=source,
        model=model,
        pairs=pairs,
        site=site,
        subfolder=subfolder,
        revision=revision,
        any_model=any_model,
        cluster=cluster,
        device=device,
        dtype=dtype,
        as_json=as_json,
    )
