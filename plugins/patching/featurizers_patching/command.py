"""Command ``featurizers patch``."""

from __future__ import annotations

import csv
import math
import re
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import featurizers
import typer
from featurizers.cli import ProgressBar, dtype_named, print_json, progress_bar
from featurizers.errors import UsageError, printable
from featurizers.files import filling, refuse_full

if TYPE_CHECKING:
    from featurizers import Featurizer
    from rich.table import Table

    from featurizers_patching.grid import Grid, GridCell

STEPS: Final = 1000


def patch_command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Hub id, folder or .gguf file of a language model.")],
    base: Annotated[str | None, typer.Option(help="Prompt to edit.")] = None,
    source: Annotated[str | None, typer.Option(help="Prompt to take activations from.")] = None,
    pairs: Annotated[str | None, typer.Option(help="File of JSON lines, one pair each, instead of the two.")] = None,
    sites: Annotated[
        str | None,
        typer.Option(help="Such as resid.pre:8,mlp.out or 'attn.z:*:*'; resid.pre by default, attn.z with --heads."),
    ] = None,
    heads: Annotated[str | None, typer.Option(help="all, or numbers such as 0,7: patch head by head.")] = None,
    positions: Annotated[
        str | None,
        typer.Option(help="Tokens or names of the records, such as -1,subject,0+1 or all; each by default."),
    ] = None,
    metric: Annotated[
        str, typer.Option(help="logit-difference, log-probability, probability, loss, accuracy or kl.")
    ] = "logit-difference",
    answer: Annotated[
        str | None, typer.Option(help="Answer that the metric measures; else the records' label.")
    ] = None,
    counter: Annotated[str | None, typer.Option(help="Token to compare with; else the records' base_label.")] = None,
    featurizer: Annotated[str | None, typer.Option(help="Featurizer to patch through: id or folder.")] = None,
    indices: Annotated[str | None, typer.Option(help="Its features to patch, such as 3,17.")] = None,
    receivers: Annotated[
        str | None, typer.Option(help="Path patching: sites that alone read the edits, such as attn.q:9:6,attn.q:9:9.")
    ] = None,
    freeze: Annotated[str | None, typer.Option(help="Some of attn.out,mlp.out,attn.pattern.")] = None,
    method: Annotated[
        str | None,
        typer.Option(help="exact; gradient or integrated estimate all cells by backward passes. exact by default."),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Gradients that integrated averages.")] = 5,
    screen: Annotated[int | None, typer.Option(min=1, help="Cells with the largest estimates to run exactly.")] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Show the metric itself, not 0 for the base and 1 for the source.")
    ] = False,
    top: Annotated[int, typer.Option(min=1, help="Cells to show.")] = 10,
    out: Annotated[Path | None, typer.Option(help="A new folder for the grid, a table and a heat map.")] = None,
    batch_rows: Annotated[int | None, typer.Option(min=1, help="Tokens that run together.")] = None,
    device: Annotated[str | None, typer.Option(help="Such as cpu or cuda:0; an accelerator if there is one.")] = None,
    dtype: Annotated[str, typer.Option(help="Of the model: float32, bfloat16, float16 or auto.")] = "float32",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
) -> None:
    """Patch activations of one prompt into another, site by site and token by token, and show where it matters."""
    import torch
    from featurizers.models import load_model
    from rich.console import Console

    from featurizers_patching.pairs import pairs_of, read_pairs
    from featurizers_patching.patching import patch

    if (pairs is None) == (base is None and source is None) or (base is None) != (source is None):
        raise UsageError("give --base and --source, or --pairs with a file of records")
    measured = _metric(metric, answer, counter)
    if out is not None:
        refuse_full(out.expanduser())
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    loaded = load_model(model, device=name, dtype=dtype_named(dtype))
    read = pairs_of(base, source, loaded.tokenizer) if pairs is None else read_pairs(pairs, loaded.tokenizer)
    f: Featurizer[Any] | None = None
    if featurizer is not None:
        f = featurizers.load(featurizer, device=name)
    with progress_bar(STEPS, "patching", shown=not as_json) as bar:
        grid = patch(
            loaded.model,
            read,
            sites=None if sites is None else [part.strip() for part in sites.split(",")],
            heads=heads if heads in (None, "all") else _numbers(heads, "heads"),
            positions=None if positions is None else [_position(part.strip()) for part in positions.split(",")],
            featurizer=f,
            indices=None if indices is None else _numbers(indices, "indices"),
            metric=measured,
            normalize=not raw,
            receivers=None if receivers is None else [part.strip() for part in receivers.split(",")],
            freeze=[part.strip() for part in freeze.split(",")] if freeze else (),
            batch_rows=batch_rows,
            method=method,
            steps=steps,
            screen=screen,
            tokenizer=loaded.tokenizer,
            progress=_advance(bar),
        )
    if out is not None:
        _write(grid, out.expanduser())
    cells = grid.top(top)
    if as_json:
        print_json({"about": dict(grid.about), "base": grid.base.tolist(), "source": grid.source.tolist(),
                    "cells": [_json(cell) for cell in cells]})  # fmt: skip
        return
    Console(emoji=False).print(_table(grid, cells))
    if note := grid.note_of_estimates():
        print(note)
    if grid.exact.any():
        print(f"{grid.about['verified']} cells were compared with whole runs of the model.")
    if out is not None:
        picture = ", heatmap.png" if find_spec("matplotlib") is not None else " (the heat map needs matplotlib)"
        print(f"Written: {out}/grid.safetensors, table.csv{picture}")


def _metric(name: str, answer: str | None, counter: str | None) -> tuple[str, ...]:
    from featurizers_patching.metrics import METRICS

    answers = [each for each in (answer, counter) if each is not None]
    kind = METRICS.get(name.replace("-", "_"))
    if answer is None and counter is not None:
        raise UsageError("--counter goes with --answer")
    if kind is not None and kind.name != "logit_difference" and counter is not None:
        raise UsageError(f"--counter is for the metric logit-difference, not for {name}")
    return (name, *answers)


def _position(text: str) -> int | str | list[int]:
    if not re.fullmatch(r"-?\d+(\+-?\d+)*", text):
        return text
    numbers = [int(part) for part in text.split("+")]
    return numbers[0] if len(numbers) == 1 else numbers


def _numbers(text: str, what: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(f"--{what} takes numbers such as 3,17, not {text!r}") from error


def _advance(bar: ProgressBar) -> Any:
    return lambda share: bar.reach(round(STEPS * share))


def _table(grid: Grid, cells: list[GridCell]) -> Table:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(printable(grid.title(), 200)), title_justify="left")
    several = grid.raw.shape[2] > 1
    for column in ("site", "position", "token", "value", *(["± (se)", "pairs"] if several else [])):
        table.add_column(column, justify="left" if column in ("site", "position", "token") else "right")
    for cell in cells:
        token = "" if cell.token == cell.position else printable(repr(cell.token), 30)
        more = [f"{cell.stderr:.3f}", str(cell.n)] if several else []
        value = f"{'' if cell.exact else '~'}{cell.value:+.3f}"
        table.add_row(str(cell.site), escape(printable(cell.position, 30)), escape(token), value, *more)
    return table


def _json(cell: GridCell) -> dict[str, Any]:
    known = {**cell._asdict(), "site": str(cell.site)}
    return known | {"stderr": None if math.isnan(cell.stderr) else cell.stderr}


def _write(grid: Grid, folder: Path) -> None:
    """Write the grid, its table and, with matplotlib, its heat map to a new folder."""
    with filling(folder) as new:
        grid.save(new / "grid.safetensors")
        rows = list(grid.rows())
        with (new / "table.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]) if rows else ["metric"])
            writer.writeheader()
            writer.writerows(rows)
        if find_spec("matplotlib") is not None:
            grid.plot().figure.savefig(new / "heatmap.png", dpi=150)
