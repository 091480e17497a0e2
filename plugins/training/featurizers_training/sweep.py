"""`sweep`: sites × positions × methods, with baselines and controls."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from featurizers import Site
from featurizers.errors import UsageError
from featurizers.models import Anatomy, frozen
from torch import nn

from featurizers_training import report
from featurizers_training.controls import check_controls, controlled
from featurizers_training.evaluation import Accuracy, accuracy_of
from featurizers_training.found import Found
from featurizers_training.methods import Method
from featurizers_training.objectives import Objective, named
from featurizers_training.pairs import Pairs, Position
from featurizers_training.progress import Ticker
from featurizers_training.runs import CleanRuns, check_fit
from featurizers_training.search import Settings, train


@dataclass(frozen=True)
class Cell:
    """One search, or one baseline, of a sweep.

    Attributes:
        site: where.
        position: at which tokens, as it was asked for.
        method: its name.
        control: one of `CONTROLS`, or None.
        held_out: accuracy on pairs that the search did not see.
        train: accuracy on the pairs of the search.
        selected: how many features are interchanged.
        seconds: that the search and both accuracies took, without the clean runs.
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
        """As a row of a table."""
        low, high = self.held_out.interval
        return {
            "site": str(self.site),
            "position": position_name(self.position),
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
    """What a sweep measured.

    Attributes:
        cells: in the order of the controls, positions, sites and methods.
        found: of each method the cell with the best held-out accuracy without a control, and what it found.
        about: what was searched and how, as JSON.
    """

    cells: Sequence[Cell]
    found: Mapping[str, tuple[Cell, Found]]
    about: Mapping[str, Any]

    def best(self, method: str | None = None) -> tuple[Cell, Found]:
        """The best cell of a method, or of all methods that train something, and what it found.

        It is the best by the held-out pairs, whose accuracy there is the better for it: measure it on others.

        Raises:
            UsageError: the sweep had no such method.
        """
        if method is not None and method not in self.found:
            raise UsageError(f"the sweep had the methods {', '.join(self.found)}, and not {method!r}")
        trained = [(cell, found) for cell, found in self.found.values() if found.history]
        wanted = [self.found[method]] if method is not None else trained or list(self.found.values())
        return max(wanted, key=lambda one: _merit(one[0]))

    def rows(self) -> list[dict[str, Any]]:
        """The cells as rows of a table."""
        return [cell.record() for cell in self.cells]

    def write(self, folder: str | Path) -> Path:
        """Write ``table.csv``, ``table.json`` and ``heatmap.png`` to a folder, and return it.

        Raises:
            MissingDependencyError: matplotlib is not installed.
        """
        folder = Path(folder).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        report.write_csv(self.rows(), folder / "table.csv")
        report.write_json({**self.about, "cells": self.rows()}, folder / "table.json")
        report.heat_map(self.rows(), str(self.about["title"])).savefig(folder / "heatmap.png", dpi=120)
        return folder


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
    """Search each site at each position by each method, and measure what is found on pairs that no search saw.

    The prompts are run once a position, and once more for each control, whatever the number of sites and methods.

    Args:
        model: a decoder of `transformers` with its language-model head.
        train_pairs: to search with.
        test_pairs: to measure on, in the model's own precision, as `evaluate` does.
        sites: where; each is searched alone.
        positions: tokens, or names that the records give to some; see `Pairs.at`.
        methods: searches, and baselines (`FullVector`, `RandomSubspace`, `PCA`) beside them; by a name of their own
            where two have one name.
        controls: some of `CONTROLS`: the same once more with nothing to find.
        objective: as in `train`.
        settings: as in `train`; the same for each cell.
        progress: whether to show a progress bar.

    Raises:
        PairError: a prompt does not have one of the positions.
        SiteError: the model does not have a site.
        UsageError: there is nothing to do, or a name stands for two methods.

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
    where = [Site.parse(site) for site in sites]
    by_name = _by_name(methods)
    parts = {name: _at_each(pairs, positions) for name, pairs in (("train", train_pairs), ("test", test_pairs))}
    _check(model, where, positions, controls, settings)
    objective_name, _ = named(objective)
    cells: list[Cell] = []
    found: dict[str, tuple[Cell, Found]] = {}
    total = (1 + len(controls)) * len(positions) * len(where) * len(by_name)
    with Ticker(total, "sweep", shown=progress) as ticker:
        for control in (None, *controls):
            for number, position in enumerate(positions):
                both = {name: at[number] for name, at in parts.items()}
                searched = model
                if control is not None:
                    searched, both = controlled(control, model, both, settings.seed)
                for site, name, held_out, result, seconds in _cells(
                    searched, both, where, by_name, objective, settings
                ):
                    cell = Cell(
                        site, position, name, control, held_out, result.accuracy["train"], result.selected[0], seconds
                    )
                    cells.append(cell)
                    ticker.advance(1, accuracy=held_out.value)
                    if control is None and (name not in found or _merit(cell) > _merit(found[name][0])):
                        found[name] = cell, result
    about = {
        "title": "Interchange-intervention accuracy on held-out pairs",
        "model": getattr(getattr(model, "config", None), "_name_or_path", None),
        "train_pairs": {"count": len(train_pairs), "sha256": train_pairs.digest()},
        "test_pairs": {"count": len(test_pairs), "sha256": test_pairs.digest()},
        "methods": {key: {"name": one.name, **dataclasses.asdict(one)} for key, one in by_name.items()},
        "settings": {**dataclasses.asdict(settings), "objective": objective_name},
    }
    return Sweep(cells, found, about)


def position_name(position: Position) -> str:
    """A position as tables show it: ``-1``, ``subject``, ``0+1``."""
    return str(position) if isinstance(position, int | str) else "+".join(map(str, position))


def _cells(
    model: nn.Module,
    parts: Mapping[str, Pairs],
    sites: list[Site],
    methods: Mapping[str, Method],
    objective: str | Objective,
    settings: Settings,
) -> Iterator[tuple[Site, str, Accuracy, Found, float]]:
    """All sites and methods at one position, from the same clean runs."""
    with frozen(model):
        runs = settings.clean_runs(model, parts["train"], sites)
        size = settings.micro_batch or settings.batch_size
        unseen = CleanRuns(model, parts["test"], sites, batch_size=size, cache_bytes=settings.cache_bytes)
        for site in sites:
            for name, method in methods.items():
                start = time.perf_counter()
                found = train(model, parts["train"], site, method, objective=objective, settings=settings, runs=runs)
                held_out = accuracy_of(unseen, found.featurizers)
                yield site, name, held_out, found.measured(test=held_out), time.perf_counter() - start


def _merit(cell: Cell) -> tuple[float, float]:
    """The better, the larger: by held-out accuracy, then by that on the pairs of the search."""
    return cell.held_out.value, cell.train.value


def _by_name(methods: Sequence[Method] | Mapping[str, Method]) -> dict[str, Method]:
    if isinstance(methods, Mapping):
        return dict(methods)
    by_name = {method.name: method for method in methods}
    if len(by_name) < len(methods):
        raise UsageError("two methods have one name; give a mapping from names of your own to the methods")
    return by_name


def _at_each(pairs: Pairs, positions: Sequence[Position]) -> list[Pairs]:
    found = [pairs.at(position) for position in positions]
    for at in found:
        check_fit(at, 1)
    return found


def _check(
    model: nn.Module, sites: Sequence[Site], positions: Sequence[Position], controls: Sequence[str], settings: Settings
) -> None:
    if not sites or not positions:
        raise UsageError("a sweep needs a site and a position at least")
    anatomy = Anatomy(model)
    for site in sites:
        anatomy.place(site)
    check_controls(controls)
    if settings.patience is not None:
        raise UsageError("a sweep has no validation pairs, so that no search stops early; leave out patience")
