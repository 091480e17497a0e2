"""`run`: the demo, from the task to the artefact."""

from __future__ import annotations

import functools
import time
from pathlib import Path
from typing import Any

import featurizers
import torch
from featurizers import Featurizer
from featurizers.cli import layer_numbers
from featurizers.errors import MissingDependencyError, UsageError
from featurizers.files import os_errors, refuse_unwritable
from rich.console import Console
from rich.table import Table

from featurizers_training.demo import english, toy
from featurizers_training.demo.task import Task
from featurizers_training.evaluation import evaluate
from featurizers_training.methods.searches import PCA, FullVector, RandomSubspace
from featurizers_training.search.found import Found
from featurizers_training.search.training import train
from featurizers_training.sweeps.report import heat_map
from featurizers_training.sweeps.sweeping import Cell, sweep


def run(
    model: str | None,
    out: Path,
    *,
    layers: str | None = None,
    features: int | None = None,
    seed: int = 0,
    quiet: bool = False,
) -> dict[str, Any]:
    """Search a model for a causal variable, print and draw the accuracies, save the best subspace and load it back.

    Args:
        model: Hub id or folder of a language model; None trains a tiny transformer.
        out: folder for ``accuracy.png`` and the artefact.
        layers: blocks to search, such as ``"4,8"``.
        features: dimensions of the subspace.
        seed: of everything random.
        quiet: print nothing.

    Returns:
        What it prints, as data.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        ArtefactError: the folder cannot be written.
        FeaturizerError: the model cannot be used, or cannot do the task.
    """
    _need_matplotlib()
    refuse_unwritable(out, out)
    numbers = None if layers is None else layer_numbers(layers)
    if model is None and numbers is not None:
        raise UsageError("layers are chosen with --model; the embedded task searches all layers of its own model")
    start = time.perf_counter()
    console = Console(quiet=quiet)
    say = functools.partial(console.print, highlight=False, markup=False, soft_wrap=True)
    if model is None:
        say("Training a tiny transformer whose answer depends on whether the first number is below the second …")
        task = toy.make_task(seed, features)
    else:
        say(f"Loading {model} and looking for prompts that it completes correctly …")
        task = english.make_task(model, seed, features, numbers)
    for note in task.notes:
        say(f"  {note}")

    n_features = task.subspace.n_features
    methods = {
        "full vector": FullVector(),
        "subspace": task.subspace,
        "PCA": PCA(n_features),
        "random": RandomSubspace(n_features),
    }
    result = sweep(
        task.model, task.train, task.test, task.sites, [-1], methods, settings=task.settings, progress=not quiet
    )
    accuracy: dict[str, dict[str, float]] = {}
    for cell in result.cells:
        accuracy.setdefault(str(cell.site), {})[cell.method] = cell.held_out.value
    best, found = result.best("subspace")
    say(f"\n{task.title}")
    console.print(_table(accuracy, best))
    say("Share of held-out pairs that the model answers as if the variable had the source's value.")
    examples = _examples(task, found.featurizer)
    for line in examples:
        say(f"  {line}")
    cosine = _cosine_with_planted(task, best, found)
    if cosine is not None:
        say(f"Cosine between the found and the planted direction: {cosine:.2f}")

    picture = out / "accuracy.png"
    with os_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        heat_map(result.rows(), task.title).savefig(picture, dpi=120)
    found.featurizer.id = f"{task.title} ({best.site})"[:200]
    found.featurizer.metadata["accuracy"] = accuracy
    folder = found.save(out / "artefact")
    loaded = featurizers.load(folder.resolve(), verify=True)
    loaded_accuracy = evaluate(task.model, task.test, loaded).value
    say(f"Picture:  {picture}")
    saved = f"{best.held_out.value:.1%} when it was saved, {loaded_accuracy:.1%} loaded back"
    say(f"Artefact: {folder} (accuracy at {loaded.site}: {saved})")
    say(f"Load it:  featurizers.load({str(folder.resolve())!r})")
    seconds = time.perf_counter() - start
    say(f"Done in {seconds:.0f} s.")
    return {
        "task": task.title,
        "notes": task.notes,
        "n_features": n_features,
        "accuracy": accuracy,
        "best": str(best.site),
        "examples": examples,
        "cosine_with_planted": cosine,
        "loaded_accuracy": loaded_accuracy,
        "artefact": str(folder),
        "picture": str(picture),
        "seconds": round(seconds, 1),
    }


def _need_matplotlib() -> None:
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError("the demo", "matplotlib", "pip install 'featurizers[demo]'") from error


def _table(accuracy: dict[str, dict[str, float]], best: Cell) -> Table:
    """Return the accuracies, sites down and methods across; the best site is bold."""
    methods = list(accuracy[str(best.site)])
    table = Table("site")
    for method in methods:
        table.add_column(method, justify="right")
    for site, values in accuracy.items():
        cells = [f"{values[method]:.0%}" for method in methods]
        table.add_row(site, *cells, style="bold" if site == str(best.site) else None)
    return table


@torch.no_grad()
def _examples(task: Task, featurizer: Featurizer[Any], count: int = 3) -> list[str]:
    """Return the model's answers to held-out base prompts, before and after the interchange."""
    attached, lines = featurizer.attach(task.model), []
    for pair in task.test[:count]:
        base, source = (torch.tensor([ids]) for ids in (pair.base, pair.sources[0]))
        before = task.model(input_ids=base).logits[0, -1].argmax()
        after = attached({"input_ids": base}, {"input_ids": source}).logits[0, -1].argmax()
        prompt, old, new, other = map(task.spell, (base[0], before, after, source[0]))
        lines.append(f"{prompt!r} is answered {old!r}, but {new!r} with the features of {other!r}")
    return lines


def _cosine_with_planted(task: Task, best: Cell, found: Found) -> float | None:
    """Return the largest cosine between the subspace at the planted site and the planted direction, if there is one."""
    if task.planted is None:
        return None
    site, planted = task.planted
    if best.site != site:
        found = train(task.model, task.train, site, task.subspace, settings=task.settings)
    direction = planted.inverse_featurize(torch.ones(1), None)
    return float(found.featurizer.collect(direction).detach().norm())
