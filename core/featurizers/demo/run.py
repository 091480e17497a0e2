"""``featurizers demo`` from the task to the artefact."""

from __future__ import annotations

import functools
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import featurizers
from featurizers.demo import report
from featurizers.demo.search import POSITIONS, Row, Task, examples, interchange_accuracy, sweep, work
from featurizers.errors import MissingDependencyError, UsageError


def run(
    model: str | None,
    out: Path,
    *,
    layers: str | None = None,
    features: int | None = None,
    seed: int = 0,
    quiet: bool = False,
) -> dict[str, Any]:
    """Search a model for a causal variable, print and draw what was found, save it and load it back.

    Args:
        model: Hub id or folder of a language model; None trains a tiny transformer.
        out: folder for ``accuracy.png`` and the artefact.
        layers: blocks to search, such as ``"4,8"``.
        features: dimensions of the subspace.
        seed: of everything random.
        quiet: print nothing.

    Returns:
        What was printed, as data.

    Raises:
        MissingDependencyError: transformers or matplotlib is not installed.
        FeaturizerError: the model cannot be used, or does not do the task.
    """
    _need_packages()
    wanted = _layers(layers)
    if model is None and wanted is not None:
        raise UsageError("layers are chosen with --model; the embedded task searches all of its own")
    start = time.perf_counter()
    console = Console(quiet=quiet)
    say = functools.partial(console.print, highlight=False, markup=False, soft_wrap=True)
    if model is None:
        from featurizers.demo.toy import make_task

        say("Training a tiny transformer to answer by whether its first number is below its second …")
        task = make_task(seed, features)
    else:
        from featurizers.demo.english import make_task as make_english_task

        say(f"Loading {model} and looking for prompts that it completes rightly …")
        task = make_english_task(model, seed, features, wanted)
    for note in task.notes:
        say(f"  {note}")

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("searching", total=work(task))
        rows = sweep(task, seed, lambda: progress.advance(bar))
    best = max(rows, key=lambda row: row.accuracy["subspace"])
    console.print(report.table(task.title, rows, best))
    shown = examples(task, best.site, best.found)
    for line in shown:
        say(f"  {line}")
    overlap = _overlap_with_planted(task, rows)
    if overlap is not None:
        say(f"Cosine between the direction found and the planted one: {overlap:.2f}")

    out.mkdir(parents=True, exist_ok=True)
    picture = out / "accuracy.png"
    report.heat_map(task.title, rows, picture)
    folder = _save(task, rows, best, seed, out)
    loaded = featurizers.load(folder.resolve(), verify=True)
    again = interchange_accuracy(task.model, task.test, best.site, loaded)
    say(f"Picture:  {picture}")
    say(f"Artefact: {folder} (loaded back: {again:.1%} at {loaded.site}, saved: {best.accuracy['subspace']:.1%})")
    say(f"Load it:  featurizers.load({str(folder.resolve())!r})")
    seconds = time.perf_counter() - start
    say(f"Done in {seconds:.0f} s.")
    return {
        "task": task.title,
        "notes": task.notes,
        "n_features": task.n_features,
        "accuracy": {str(row.site): row.accuracy for row in rows},
        "best": str(best.site),
        "examples": shown,
        "cosine_with_planted": overlap,
        "loaded_accuracy": again,
        "artefact": str(folder),
        "picture": str(picture),
        "seconds": round(seconds, 1),
    }


def _overlap_with_planted(task: Task, rows: list[Row]) -> float | None:
    """Largest cosine between the found subspace and the planted direction, where there is one."""
    if task.planted is None:
        return None
    site, planted = task.planted
    found = next(row.found for row in rows if row.site == site)
    direction = planted.inverse_featurize(torch.ones(1), None)
    return float(found.collect(direction).detach().norm())


def _save(task: Task, rows: list[Row], best: Row, seed: int, out: Path) -> Path:
    """The best subspace as an artefact that says where it belongs and how it was found."""
    found = best.found
    found.id = f"{task.title} ({best.site})"[:200]
    found.site = best.site.at(position=tuple(POSITIONS), model=task.model_id, model_revision=task.model_revision)
    found.metadata = {
        "method": "distributed alignment search",
        "accuracy": {str(row.site): row.accuracy for row in rows},
        "test_pairs": len(task.test),
        "train_pairs": len(task.train),
        "steps": task.steps,
        "seed": seed,
    }
    return found.save_pretrained(out / "artefact")


def _layers(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(f"layers are numbers with commas between, such as 4,8,12, not {text!r}") from error


def _need_packages() -> None:
    for package in ("transformers", "matplotlib"):
        try:
            __import__(package)
        except ImportError as error:
            raise MissingDependencyError("the demo", package, "pip install 'featurizers[demo]'") from error
