"""``featurizers demo`` from the task to the artefact."""

from __future__ import annotations

import functools
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

import featurizers
from featurizers.cli.options import layer_numbers
from featurizers.cli.progress import progress_bar
from featurizers.errors import MissingDependencyError, UsageError

if TYPE_CHECKING:
    from featurizers.demo.search import Row, Task


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
    from featurizers_training import evaluate

    from featurizers.demo import report
    from featurizers.demo.search import METHODS, examples, search

    wanted = None if layers is None else layer_numbers(layers)
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

    with progress_bar(len(task.sites) * len(METHODS), "searching", shown=not quiet) as bar:
        rows = search(task, bar.advance)
    best = max(rows, key=lambda row: row.accuracy["subspace"])
    console.print(report.table(task.title, rows, best))
    shown = examples(task, best.found.featurizer)
    for line in shown:
        say(f"  {line}")
    overlap = _overlap_with_planted(task, rows)
    if overlap is not None:
        say(f"Cosine between the direction found and the planted one: {overlap:.2f}")

    out.mkdir(parents=True, exist_ok=True)
    picture = out / "accuracy.png"
    report.heat_map(task.title, rows, picture)
    folder = _save(task, rows, best, out)
    loaded = featurizers.load(folder.resolve(), verify=True)
    again = evaluate(task.model, task.test, loaded).value
    say(f"Picture:  {picture}")
    say(f"Artefact: {folder} (loaded back: {again:.1%} at {loaded.site}, saved: {best.accuracy['subspace']:.1%})")
    say(f"Load it:  featurizers.load({str(folder.resolve())!r})")
    seconds = time.perf_counter() - start
    say(f"Done in {seconds:.0f} s.")
    return {
        "task": task.title,
        "notes": task.notes,
        "n_features": task.subspace.n_features,
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
    found = next(row.found.featurizer for row in rows if row.site == site)
    direction = planted.inverse_featurize(torch.ones(1), None)
    return float(found.collect(direction).detach().norm())


def _save(task: Task, rows: list[Row], best: Row, out: Path) -> Path:
    """The best subspace as an artefact that says where it belongs, how it was found, and what the others gave."""
    featurizer = best.found.featurizer
    featurizer.id = f"{task.title} ({best.site})"[:200]
    featurizer.metadata["accuracy"] = {str(row.site): row.accuracy for row in rows}
    return best.found.save(out / "artefact")


def _need_packages() -> None:
    for package in ("transformers", "matplotlib", "featurizers_training"):
        try:
            __import__(package)
        except ImportError as error:
            raise MissingDependencyError("the demo", package, "pip install 'featurizers[demo]'") from error
