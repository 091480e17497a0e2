"""`sweep`: sites × positions × methods, with baselines and controls."""

from __future__ import annotations

import dataclasses
import itertools
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
from featurizers_training.sweeps.baselines import Baselines, PartsAtEach, trains_nothing
from featurizers_training.sweeps.controls import check_controls, controlled
from featurizers_training.sweeps.report import heat_map, write_csv

TABLE: Final = "table.csv"
DATA: Final = "table.json"
PICTURE: Final = "heatmap.png"
Control: TypeAlias = str | None
"""One of `CONTROLS`, or None for the searches themselves."""
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
        seconds: of the search and of both accuracies, without the clean runs; the share of a baseline, as all run
            together.
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
    Methods that train nothing run together at all sites and positions; see `Baselines`.

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

    Examples:
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
    named_objective(objective)
    for site in parsed:
        Anatomy(model).place(site)
    both = {"train": train_pairs, "test": test_pairs}
    models: dict[Control, nn.Module] = {None: model}
    by_control: dict[Control, dict[str, Pairs]] = {None: both}
    for name in sorted(controls, key=lambda name: name == "random-model"):
        models[name], by_control[name] = controlled(name, model, both, settings.seed)
    at_each = {
        control: [{name: pairs.at(position) for name, pairs in parts.items()} for position in positions]
        for control, parts in by_control.items()
    }
    for pairs in (pairs for parts in at_each[None] for pairs in parts.values()):
        check_fit(pairs, 1)
    cells: list[Cell] = []
    best: dict[str, tuple[Cell, Found]] = {}
    asked = _Asked(parsed, by_name, objective, settings)
    total = len(models) * len(positions) * len(parsed) * len(by_name)
    with progress_bar(total, "sweep", shown=progress) as bar:
        for control, number, name, found, seconds in _search_all(models, at_each, asked):
            measured, position = found.accuracy, positions[number]
            (site,), (selected,) = found.sites, found.selected
            cell = Cell(site, position, name, control, measured["test"], measured["train"], selected, seconds)
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
        "settings": asked.settings_record,
    }
    return Sweep(cells, best, about)


@dataclass(frozen=True)
class _Asked:
    """What is searched at each position and in each control."""

    sites: Sequence[Site]
    methods: Mapping[str, Method]
    objective: str | Objective
    settings: Settings

    @property
    def settings_record(self) -> dict[str, Any]:
        """The settings as JSON data."""
        return {**dataclasses.asdict(self.settings), "objective": named_objective(self.objective)[0]}


def _search_all(
    models: Mapping[Control, nn.Module], at_each: Mapping[Control, PartsAtEach], asked: _Asked
) -> Iterator[tuple[Control, int, str, Found, float]]:
    """Yield the control, number of the position, name of the method, result and seconds of each cell.

    Args:
        models: of each control.
        at_each: for each control the pairs at each position.
        asked: sites, methods and settings.
    """
    untrained = {name: method for name, method in asked.methods.items() if trains_nothing(method)}
    baselines: dict[Control, Baselines] = {}
    for number in range(len(at_each[None])):
        runs: Runs = {}
        for control, model in models.items():
            parts = at_each[control][number]
            if untrained and control not in baselines:
                made = (each for each in baselines.values() if each.serve(model, at_each[control]))
                baselines[control] = next(made, None) or Baselines(
                    model, at_each[control], asked.sites, untrained, asked.settings
                )
            if len(untrained) < len(asked.methods):
                runs = _clean_runs(model, parts, asked, runs)
            for site, (name, method) in itertools.product(asked.sites, asked.methods.items()):
                start = time.perf_counter()
                if name in untrained:
                    found = baselines[control].found((number, site, name), method, parts, asked.settings_record)
                    start -= baselines[control].seconds
                else:
                    found = _search(model, parts, site, method, asked, runs)
                yield control, number, name, found, time.perf_counter() - start


def _clean_runs(model: nn.Module, parts: Mapping[str, Pairs], asked: _Asked, made: Runs) -> Runs:
    """Return clean runs of the parts: those made before, if they serve."""
    if made and all(runs.serves(model, parts[name]) for name, runs in made.items()):
        return {name: runs.with_labels(parts[name]) for name, runs in made.items()}
    made.clear()  # before others are made, which need the memory
    settings, sites = asked.settings, asked.sites
    with frozen(model):
        size = settings.micro_batch or settings.batch_size
        unseen = CleanRuns(model, parts["test"], sites, batch_size=size, cache_bytes=settings.cache_bytes)
        return {"train": settings.clean_runs(model, parts["train"], sites), "test": unseen}


def _search(
    model: nn.Module, parts: Mapping[str, Pairs], site: Site, method: Method, asked: _Asked, runs: Runs
) -> Found:
    """Search at one site, from clean runs."""
    options: Any = {"objective": asked.objective, "settings": asked.settings, "runs": runs["train"]}
    with frozen(model):
        found = train(model, parts["train"], site, method, **options)
        return found.measured(test=accuracy_of(runs["test"], found.featurizers))


def _merit(cell: Cell) -> tuple[float, float]:
    """Return a key that sorts by held-out accuracy, then by accuracy on the pairs of the search."""
    return cell.held_out.value, cell.train.value
