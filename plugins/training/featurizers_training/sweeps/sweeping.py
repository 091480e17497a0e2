"""`sweep`: sites × positions × methods, with baselines and controls."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

from featurizers import Site
from featurizers.cli import progress_bar
from featurizers.errors import UsageError
from featurizers.files import replacing, resolved
from featurizers.models import Anatomy, frozen
from torch import nn

from featurizers_training.evaluation import Accuracy, accuracy_of
from featurizers_training.methods.base import Method
from featurizers_training.pairs import Pairs, check_fit
from featurizers_training.records import Position
from featurizers_training.runs.clean_runs import CleanRuns
from featurizers_training.search.found import Found
from featurizers_training.search.objectives import Objective, named_objective
from featurizers_training.search.settings import Settings
from featurizers_training.search.training import train
from featurizers_training.sweeps.controls import check_controls, controlled
from featurizers_training.sweeps.report import heat_map, write_csv

TABLE: Final = "table.csv"
DATA: Final = "table.json"
PICTURE: Final = "heatmap.png"
Runs: TypeAlias = "dict[str, CleanRuns]"
"""Clean runs of the pairs of the search and of those that no search sees, by name."""


@dataclass(frozen=True)
class Cell:
    """Search or baseline of a sweep, at one site and position.

    Attributes:
        site: of the search.
        position: tokens, as they were given to the sweep.
        method: its name.
        control: one of `CONTROLS`, or None.
        held_out: accuracy on pairs that the search did not see.
        train: accuracy on the pairs of the search.
        selected: number of features that are interchanged.
        seconds: of the search and of both accuracies, without the clean runs.
    """

    site: Site
    position: Position
    method: str
    control: str | None
    held_out: Accuracy
    train: Accuracy
    selected: int | None
    seconds: float

    def record(self) -> dict[str, Any]:
        """Return the cell as a row of a table."""
        low, high = self.held_out.interval
        position = self.position
        return {
            "site": str(self.site),
            "position": str(position) if isinstance(position, int | str) else "+".join(map(str, position)),
            "method": self.method,
            "control": self.control,
            "accuracy": self.held_out.value,
            "low_95": low,
            "high_95": high,
            "pairs": self.held_out.n,
            "train_accuracy": self.train.value,
            "train_pairs": self.train.n,
            "selected": self.selected,
            "seconds": round(self.seconds, 3),
        }


@dataclass(frozen=True)
class Sweep:
    """Result of a sweep.

    Attributes:
        cells: in the order of the controls, positions, sites and methods.
        found: for each method the cell with the best held-out accuracy without a control, and its result.
        about: description of the sweep, as JSON data.
    """

    cells: Sequence[Cell]
    found: Mapping[str, tuple[Cell, Found]]
    about: Mapping[str, Any]

    def best(self, method: str | None = None) -> tuple[Cell, Found]:
        """Return the best cell of a method, or of all methods that train something, and its result.

        The held-out pairs choose it, which flatters its accuracy on them: measure it on other pairs.

        Raises:
            UsageError: the sweep had no such method.
        """
        if method is not None and method not in self.found:
            raise UsageError(f"the sweep had the methods {', '.join(self.found)}, and not {method!r}")
        trained = [(cell, found) for cell, found in self.found.values() if found.history]
        candidates = [self.found[method]] if method is not None else trained or list(self.found.values())
        return max(candidates, key=lambda candidate: _merit(candidate[0]))

    def rows(self) -> list[dict[str, Any]]:
        """Return the cells as rows of a table."""
        return [cell.record() for cell in self.cells]

    def write(self, folder: str | Path) -> Path:
        """Write ``table.csv``, ``table.json`` and ``heatmap.png`` to a folder in one step, and return it.

        Other files in the folder are kept.

        Raises:
            MissingDependencyError: matplotlib is not installed.
            ArtefactError: the folder cannot be written.
        """
        data = json.dumps({**self.about, "cells": self.rows()}, indent=2)
        picture = heat_map(self.rows(), str(self.about["title"]))
        with replacing(resolved(folder), {TABLE, DATA, PICTURE}.__contains__, lambda _: None) as new:
            write_csv(self.rows(), new / TABLE)
            (new / DATA).write_text(f"{data}\n", encoding="utf-8")
            picture.savefig(new / PICTURE, dpi=120)
        return Path(folder).expanduser()


def sweep(
    model: nn.Module,
    train_pairs: Pairs,
    test_pairs: Pairs,
    sites: Sequence[Site | str],
    positions: Sequence[Position],
    methods: Sequence[Method] | Mapping[str, Method],
    *,
    controls: Sequence[str] = (),
    objective: str | Objective = "cross-entropy",
    settings: Settings | None = None,
    progress: bool = False,
) -> Sweep:
    """Search each site at each position by each method, and measure the results on pairs that no search saw.

    The prompts are run once for each position, and once more for a random model, for any number of sites and methods.

    Args:
        model: a decoder of `transformers` with its language-model head.
        train_pairs: to search with.
        test_pairs: to measure on, in the model's own precision, as `evaluate` does.
        sites: each is searched alone.
        positions: tokens, or names that the records give to tokens; see `Pairs.at`.
        methods: searches, and baselines (`FullVector`, `RandomSubspace`, `PCA`); a mapping gives them other names,
            which two methods of one name need.
        controls: some of `CONTROLS`; the whole sweep is repeated for each.
        objective: as in `train`.
        settings: as in `train`, the same for each cell.
        progress: whether to show a progress bar; without a terminal, a line on stderr for each cell.

    Raises:
        PairError: a prompt does not have one of the positions.
        SiteError: the model does not have a site.
        UsageError: there is no site or no position, or two methods have one name.

    Example:
        >>> import featurizers_training as training
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=20))
        >>> pairs = training.Pairs.of([{"base": [1, 2], "source": [3, 4], "label": 5}])
        >>> result = training.sweep(model, pairs, pairs, ["resid.post:0"], [-1], [training.FullVector()])
        >>> [(cell.method, cell.held_out.n, cell.selected) for cell in result.cells]
        [('full-vector', 1, 8)]
    """
    settings = settings or Settings()
    parsed = [Site.parse(site) for site in sites]
    by_name = dict(methods) if isinstance(methods, Mapping) else {method.name: method for method in methods}
    if len(by_name) < len(methods):
        raise UsageError("two methods have one name; give a mapping from names of your own to the methods")
    if not sites or not positions:
        raise UsageError("a sweep needs at least a site and a position")
    if settings.patience is not None:
        raise UsageError("a sweep has no validation pairs, so that no search stops early; leave out patience")
    check_controls(controls)
    objective_name, _ = named_objective(objective)
    for site in parsed:
        Anatomy(model).place(site)
    both = {"train": train_pairs, "test": test_pairs}
    at_each = [{name: pairs.at(position) for name, pairs in both.items()} for position in positions]
    for pairs in (pairs for parts in at_each for pairs in parts.values()):
        check_fit(pairs, 1)
    cells: list[Cell] = []
    best: dict[str, tuple[Cell, Found]] = {}
    total = (1 + len(controls)) * len(positions) * len(parsed) * len(by_name)
    with progress_bar(total, "sweep", shown=progress) as bar:
        for position, parts in zip(positions, at_each, strict=True):
            runs: Runs = {}
            for control in sorted((None, *controls), key=lambda control: control == "random-model"):
                searched, own = (model, parts) if control is None else controlled(control, model, parts, settings.seed)
                runs = {
                    name: each.with_labels(own[name]) for name, each in runs.items() if each.serves(searched, own[name])
                }
                if len(runs) < len(own):
                    runs.clear()  # before others are made, which need the memory
                    runs = _clean_runs(searched, own, parsed, settings)
                for site, name, found, seconds in _search_all(searched, own, runs, by_name, objective, settings):
                    measured = found.accuracy
                    cell = Cell(
                        site, position, name, control, measured["test"], measured["train"], found.selected[0], seconds
                    )
                    cells.append(cell)
                    bar.advance(1, f"sweep  accuracy {cell.held_out.value:.0%}")
                    under = "" if control is None else f", {control}"
                    bar.note(
                        f"cell {len(cells)} of {total}: {site}, position {position}, {name}{under}: "
                        f"accuracy {cell.held_out.value:.0%}"
                    )
                    if control is None and (name not in best or _merit(cell) > _merit(best[name][0])):
                        best[name] = cell, found
    cells.sort(key=lambda cell: (None, *controls).index(cell.control))
    about = {
        "title": "Interchange-intervention accuracy on held-out pairs",
        "model": getattr(getattr(model, "config", None), "_name_or_path", None),
        "train_pairs": {"count": len(train_pairs), "sha256": train_pairs.digest()},
        "test_pairs": {"count": len(test_pairs), "sha256": test_pairs.digest()},
        "methods": {key: {"name": method.name, **dataclasses.asdict(method)} for key, method in by_name.items()},
        "settings": {**dataclasses.asdict(settings), "objective": objective_name},
    }
    return Sweep(cells, best, about)


def _clean_runs(model: nn.Module, parts: Mapping[str, Pairs], sites: list[Site], settings: Settings) -> Runs:
    with frozen(model):
        size = settings.micro_batch or settings.batch_size
        unseen = CleanRuns(model, parts["test"], sites, batch_size=size, cache_bytes=settings.cache_bytes)
        return {"train": settings.clean_runs(model, parts["train"], sites), "test": unseen}


def _search_all(
    model: nn.Module,
    parts: Mapping[str, Pairs],
    runs: Runs,
    methods: Mapping[str, Method],
    objective: str | Objective,
    settings: Settings,
) -> Iterator[tuple[Site, str, Found, float]]:
    """Yield the result of each site and method at one position, from the same clean runs, and its seconds."""
    options = {"objective": objective, "settings": settings, "runs": runs["train"]}
    with frozen(model):
        for site in runs["train"].sites:
            for name, method in methods.items():
                start = time.perf_counter()
                found = train(model, parts["train"], site, method, **options)  # type: ignore[arg-type]
                found = found.measured(test=accuracy_of(runs["test"], found.featurizers))
                yield site, name, found, time.perf_counter() - start


def _merit(cell: Cell) -> tuple[float, float]:
    """Return a key that sorts by held-out accuracy, then by accuracy on the pairs of the search."""
    return cell.held_out.value, cell.train.value
