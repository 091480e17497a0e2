"""Options that the commands share, and what they stand for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from featurizers.cli import dtype_named, print_json
from featurizers.errors import UsageError, printable
from featurizers.files import filling, refuse_full

from featurizers_evaluate.definitions import ABLATIONS, GROUPS
from featurizers_evaluate.processes import launched

if TYPE_CHECKING:
    from featurizers.models import LanguageModel

    from featurizers_evaluate.comparison import Comparison

Model = Annotated[str | None, typer.Option("--model", help="Hub id, folder or .gguf file of a language model.")]
Harvest = Annotated[
    str | None, typer.Option(metavar="FOLDER", help="A finished harvest, in the place of documents and of the model.")
]
OF_HARVEST: Final = "is for a run of the model, --model and --data, and not for --harvest, whose rows are as they are"
Data = Annotated[
    str | None, typer.Option(help="Documents: a .jsonl, .parquet or text file, or the id of a data set of the Hub.")
]
Key = Annotated[str | None, typer.Option(help="Of the text, or the token ids, in a record; text by default.")]
Split = Annotated[str | None, typer.Option(help="Of a data set of the Hub; train by default.")]
Metrics = Annotated[
    str | None, typer.Option(help=f"Some of {','.join(GROUPS)}, the default, and fidelity (of causal bases).")
]
Ablations = Annotated[str | None, typer.Option(help="Baselines of the effect: some of zero,mean; both by default.")]
Tokens = Annotated[int | None, typer.Option(min=1, help="Tokens to read; 100000 by default.")]
Context = Annotated[int | None, typer.Option(min=1, help="Tokens of a row; longer documents are cut; 128 by default.")]
BatchSize = Annotated[int | None, typer.Option(min=1, help="Rows that run together; 8 by default.")]
ExcludeSpecial = Annotated[
    bool, typer.Option("--exclude-special", help="Do not measure special tokens of the tokenizer, such as bos.")
]
MaskFirst = Annotated[int | None, typer.Option(min=0, help="Tokens at the start of each row not to measure; 0.")]
Seed = Annotated[int | None, typer.Option(min=0, help="Of the resampling for the intervals; 0 by default.")]
Out = Annotated[Path | None, typer.Option(help="A new folder for the result as JSON, a table and a picture.")]
AnyModel = Annotated[bool, typer.Option("--any-model", help="Take another model than the artefact names.")]
Device = Annotated[str | None, typer.Option(help="Such as cpu or cuda:0; an accelerator if there is one.")]
Dtype = Annotated[str, typer.Option(help="Of the model: float32, bfloat16, float16 or auto.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]


def words(text: str | None, default: Sequence[str]) -> list[str]:
    """Return the words between commas; the default without a text."""
    return list(default) if text is None else [word.strip() for word in text.split(",") if word.strip()]


def numbers(text: str) -> tuple[list[int], list[float]]:
    """Parse ``k=1,2,4`` or ``threshold=0.1,1``: return the numbers of features, and the thresholds.

    Raises:
        UsageError: the text is of another form.
    """
    name, _, values = text.partition("=")
    try:
        if name == "k":
            return [int(value) for value in values.split(",")], []
        if name == "threshold":
            return [], [float(value) for value in values.split(",")]
    except ValueError:
        pass
    raise UsageError(f"--sweep is k=1,2,4 or threshold=0.1,1, not {text!r}")


def loaded(model: str, device: str | None, dtype: str) -> LanguageModel:
    """Load the model that the options name; of the processes that torchrun starts, each on its own accelerator."""
    import torch
    from featurizers.models import load_model

    place = launched()
    name = device or (place.device if place else "cuda" if torch.cuda.is_available() else "cpu")
    return load_model(model, device=name, dtype=dtype_named(dtype))


def arguments(
    language_model: LanguageModel,
    data: str,
    *,
    key: str | None,
    split: str | None,
    metrics: str | None,
    ablations: str | None,
    tokens: int | None,
    context: int | None,
    batch_size: int | None,
    exclude_special: bool,
    mask_first: int | None,
    seed: int | None,
    any_model: bool,
    as_json: bool,
    group: Any,
) -> tuple[Any, dict[str, Any]]:
    """Return the documents, and the arguments of `evaluate` that the options stand for."""
    from featurizers_evaluate.command.texts import documents_of

    documents = documents_of(data, key or "text", split or "train")
    return documents, {
        "tokenizer": language_model.tokenizer,
        "metrics": words(metrics, GROUPS),
        "ablations": words(ablations, ABLATIONS),
        "max_tokens": tokens or 100_000,
        "context": context or 128,
        "batch_size": batch_size or 8,
        "exclude_special_tokens": exclude_special,
        "mask_first": mask_first or 0,
        "seed": seed or 0,
        "data": name_of(data, split),
        "any_model": any_model,
        "group": group,
        "progress": not as_json,
    }


def refuse_torchrun(what: str) -> None:
    """Raise UsageError if torchrun started this process, for what several processes cannot share."""
    if launched() is not None:
        raise UsageError(f"{what} is not divided over processes; call it without torchrun")


def refuse_given(given: Mapping[str, Any], why: str) -> None:
    """Raise UsageError if one of some options was given.

    Args:
        given: their values by name; None or False for those that were not given.
        why: what the error says of the option.
    """
    if named := [name for name, value in given.items() if value is not None and value is not False]:
        raise UsageError(f"{named[0]} {why}")


def of_harvest(
    *,
    metrics: str | None,
    tokens: int | None,
    batch_size: int | None,
    mask_first: int | None,
    seed: int | None,
    any_model: bool,
    as_json: bool,
    harvest: str,
) -> dict[str, Any]:
    """Return the arguments of `evaluate` on a harvest that the options stand for."""
    from featurizers_evaluate.harvests import harvest_of

    return {
        "harvest": harvest_of(harvest),
        "metrics": None if metrics is None else words(metrics, GROUPS),
        "max_tokens": tokens,
        "batch_size": batch_size or 8,
        "mask_first": mask_first or 0,
        "seed": seed or 0,
        "data": f"harvest {harvest}",
        "any_model": any_model,
        "progress": not as_json,
    }


def name_of(data: str, split: str | None) -> str:
    """Return the name of the data for results: the path of a file, or the data set of the Hub and its split."""
    return data if Path(data).expanduser().is_file() else f"hub:{data}, split {split or 'train'}"


def check_out(out: Path | None) -> None:
    """Raise ArtefactError if the folder of the results is not empty."""
    if out is not None:
        refuse_full(out.expanduser())


def show(comparison: Comparison, out: Path | None, *, joined: bool, as_json: bool) -> None:
    """Print several evaluations, and write them to a new folder: JSON, a table, and with matplotlib a picture."""
    from rich.console import Console

    if as_json:
        print_json(comparison.to_dict())
    else:
        Console(emoji=False, highlight=False).print(comparison.table())
    if out is None:
        return
    with filling(out.expanduser()) as new:
        for number, (_, evaluation) in enumerate(comparison):
            evaluation.save(new / f"evaluation-{number}.json")
        comparison.write_csv(new / "table.csv")
        drawn = comparison.draw(new / "comparison.png", joined=joined)
    if not as_json:
        picture = ", comparison.png" if drawn else " (the picture needs matplotlib)"
        print(f"Written: {printable(str(out), 500)}/evaluation-0.json …, table.csv{picture}")
