"""`Baselines`: methods that train nothing, at all sites and positions together, as cells of the patching engine."""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, Final, TypeAlias

import numpy as np
import torch
from featurizers import Featurizer, Site
from featurizers.models import frozen
from featurizers_patching import engine  # whose names are imported when they are used, transformers with them
from torch import Tensor, nn

from featurizers_training.evaluation import Accuracy, interchanged, is_right
from featurizers_training.methods.base import Method
from featurizers_training.methods.searches import BASELINES
from featurizers_training.pairs import Pairs, check_vocabulary
from featurizers_training.records import Pair, Tokens
from featurizers_training.runs.activations import PromptTokens, distinct, each_token_once, padded, read_activations
from featurizers_training.runs.clean_runs import same_runs
from featurizers_training.search.found import Found
from featurizers_training.search.settings import Settings

BATCH_ROWS: Final = 1024
"""Tokens that run together at most, as in `featurizers.patch` on a CPU."""
VERIFIED: Final = 4
"""Cells of each part, and at least one of each batch of prompts, that are compared with whole runs."""

Key: TypeAlias = tuple[int, Site, str]
"""Number of a position, a site, and the name of a method."""
PartsAtEach: TypeAlias = Sequence[Mapping[str, Pairs]]
"""For each position the pairs of the search, ``train``, and held-out pairs, ``test``."""


def trains_nothing(method: Method) -> bool:
    """Return whether a method is a baseline, which has no parameters to train."""
    return type(method) in BASELINES.values()


class Baselines:
    """What a model answers after each baseline's interchange, at each site and position.

    Each pair is run once, and each of its interchanges only where it changes something; see
    `featurizers_patching.engine`. Where that is not possible each interchange is a whole run of the model, and one
    warning says why.

    Args:
        model: a decoder of `transformers` with its language-model head.
        at_each: pairs at each position of the sweep.
        sites: of the sweep.
        methods: baselines, by name.
        settings: of the sweep.

    Attributes:
        featurizers: what each method interchanges at each site and position.
        seconds: of all runs, for each of these.
    """

    def __init__(
        self,
        model: nn.Module,
        at_each: PartsAtEach,
        sites: Sequence[Site],
        methods: Mapping[str, Method],
        settings: Settings,
    ) -> None:
        start = time.perf_counter()
        self._model, self._at_each = model, at_each
        self.featurizers: dict[Key, Featurizer[Any]] = {}
        self._answers: dict[str, Tensor] = {}
        report, device = engine.Report(batch_rows=BATCH_ROWS), next(model.parameters()).device
        with frozen(model):
            for name in ("train", "test"):
                with settings.arithmetic(device) if name == "train" else nullcontext():
                    part = _Part(model, [parts[name] for parts in at_each], sites, settings)
                    self.featurizers = self.featurizers or dict(part.searched(methods))
                    self._answers[name] = part.answers(self.featurizers, report)
        self.seconds = (time.perf_counter() - start) / len(self.featurizers)

    def serve(self, model: nn.Module, at_each: PartsAtEach) -> bool:
        """Return whether these are the runs of other pairs too, whatever their labels say."""
        return model is self._model and all(same_runs(own, at_each[0][name]) for name, own in self._at_each[0].items())

    def found(self, key: Key, method: Method, parts: Mapping[str, Pairs], settings: Mapping[str, Any]) -> Found:
        """Return the result of a baseline.

        Args:
            key: position, site and name of the method.
            method: of that name.
            parts: pairs at the position; their labels may be others than in the runs.
            settings: that the result is described with.
        """
        answers = {part: of_all[list(self.featurizers).index(key)] for part, of_all in self._answers.items()}
        return Found(
            method=method,
            featurizers=[copy.copy(self.featurizers[key])],  # to be described, with tensors that are shared
            sites=[key[1]],
            pairs=parts["train"],
            model=self._model,
            accuracy={part: Accuracy.of(is_right(given, *_labels(parts[part]))) for part, given in answers.items()},
            history=[],
            settings=dict(settings),
        ).labelled()


class _Part:
    """Pairs of one part, at all positions at once, and the activations of their sources.

    Args:
        model: in evaluation mode.
        at_each: the same pairs at each position.
        sites: of the sweep.
        settings: of the sweep.
    """

    def __init__(self, model: nn.Module, at_each: Sequence[Pairs], sites: Sequence[Site], settings: Settings) -> None:
        self._model, self._sites, self._settings = model, list(sites), settings
        self._pairs = [_at_all(same) for same in zip(*at_each, strict=True)]
        check_vocabulary(self._pairs, getattr(model.get_input_embeddings(), "num_embeddings", None))  # type: ignore[operator]
        ends = np.cumsum([len(pairs[0].base_at(0)[1]) for pairs in at_each])
        self._columns = [
            slice(end - len(pairs[0].base_at(0)[1]), end) for end, pairs in zip(ends, at_each, strict=True)
        ]
        self._sources = self._read([pair.source_at(0) for pair in self._pairs])

    def _read(self, prompts: list[PromptTokens]) -> list[tuple[Tensor, Tensor]]:
        size = self._settings.micro_batch or self._settings.batch_size
        return read_activations(self._model, self._sites, [prompts] * len(self._sites), size)

    @functools.cached_property
    def _bases(self) -> list[tuple[Tensor, Tensor]]:
        return self._read([pair.base_at(0) for pair in self._pairs])

    def searched(self, methods: Mapping[str, Method]) -> Iterator[tuple[Key, Featurizer[Any]]]:
        """Yield what each method interchanges at each position and site."""
        for position in range(len(self._columns)):
            for number, site in enumerate(self._sites):
                activations = functools.partial(self._activations, position, number)
                for name, method in methods.items():
                    width = self._sources[number][0].shape[-1]
                    searched = method.search(width, self._settings.seed, None, activations)
                    yield (position, site, name), searched.to(self._sources[number][0].device).found()

    def _activations(self, position: int, number: int) -> Tensor:
        """Return the activations of sources and bases at a position and a site, each token of a prompt once."""
        columns, sides = self._columns[position], []
        for side, read in (("source_at", self._sources), ("base_at", self._bases)):
            prompts = distinct([getattr(pair, side)(0) for pair in self._pairs])[0]
            sides.append(([(ids, tokens[columns]) for ids, tokens in prompts], read[number][0][:, columns]))
        return each_token_once(sides)

    @torch.no_grad()
    def answers(self, featurizers: Mapping[Key, Featurizer[Any]], report: engine.Report) -> Tensor:
        """Return the tokens that the model gives after each interchange, ``(interchanges, pairs, n_label)``."""
        longest = max(len(pair.label) for pair in self._pairs)
        steps = [[min(step, len(pair.label) - 1) for step in range(longest)] for pair in self._pairs]
        at = np.array([len(pair.base) - 1 for pair in self._pairs])[:, None] + np.array(steps)
        found = torch.zeros(len(featurizers), *at.shape, dtype=torch.long)
        groups = list(self._groups())
        for rows in groups:
            runs, run_of = distinct([(self._pairs[row].run, tuple(at[row].tolist())) for row in rows])
            prompts = engine.Prompts([tokens for tokens, _ in runs], np.array([read for _, read in runs]))
            cells, edits = self._table(featurizers, rows, run_of.numpy())

            def consume(numbers: engine.IntArray, logits: Tensor, _: Tensor, rows: engine.IntArray = rows) -> None:
                key, row = np.divmod(numbers, len(rows))
                found[torch.from_numpy(key), torch.from_numpy(rows[row])] = logits.argmax(-1).cpu()

            share = max(1, VERIFIED // len(groups))
            equal = np.zeros(len(cells.cell), dtype=bool)
            sites = [site for _, site, _ in featurizers]
            engine.Sweep(self._model, prompts, cells, equal, sites, edits, verify=share).run(consume, report)
        return found

    def _groups(self) -> Iterator[engine.IntArray]:
        """Yield numbers of pairs whose bases share a clean run, those of like length together."""
        group, runs = list[int](), set[Tokens]()
        for row in sorted(range(len(self._pairs)), key=lambda row: len(self._pairs[row].run)):
            run = self._pairs[row].run
            if group and len(runs | {run}) * len(run) > BATCH_ROWS:
                yield np.array(group)
                group, runs = [], set()
            group.append(row)
            runs.add(run)
        yield np.array(group)

    def _table(
        self, featurizers: Mapping[Key, Featurizer[Any]], rows: engine.IntArray, run_of: engine.IntArray
    ) -> tuple[engine.Cells, list[engine.Edit]]:
        """Return a cell for each interchange and pair, and the edit of each interchange."""
        tokens = np.array([self._pairs[row].base_at(0)[1] for row in rows])
        pair, column, cell, spot = ([] for _ in range(4))
        for number, (position, _, _) in enumerate(featurizers):
            of_position = np.arange(tokens.shape[1])[self._columns[position]]
            pair.append(np.repeat(np.arange(len(rows)), len(of_position)))
            column.append(np.tile(of_position, len(rows)))
            cell.append(number * len(rows) + pair[-1])
            spot.append(np.full(len(pair[-1]), number))
        pairs, columns = np.concatenate(pair), np.concatenate(column)
        cells = engine.Cells.of(
            np.tile(run_of, len(featurizers)), np.concatenate(cell), np.concatenate(spot), tokens[pairs, columns]
        )
        edits = [self._edit(site, f, rows[pairs], columns) for (_, site, _), f in featurizers.items()]
        return cells, edits

    def _edit(
        self, site: Site, featurizer: Featurizer[Any], pair: engine.IntArray, column: engine.IntArray
    ) -> engine.Edit:
        """Return an interchange, given the pair of each edit and its token's number among those of all positions."""
        sources, row_of = self._sources[self._sites.index(site)]
        change, rows = interchanged(featurizer), row_of[torch.from_numpy(pair)]

        def edit(base: Tensor, numbers: engine.IntArray) -> Tensor:
            which = rows[numbers], torch.from_numpy(column[numbers])
            return change(base, sources[tuple(each.to(sources.device) for each in which)])

        return edit


def _at_all(same: Sequence[Pair]) -> Pair:
    """Return a pair at all the tokens at which it is given."""
    base, source = (
        tuple(token for pair in same for token in getattr(pair, side)(0)[1]) for side in ("base_at", "source_at")
    )
    return replace(same[0], base_positions=(base,), source_positions=(source,))


def _labels(pairs: Pairs) -> tuple[Tensor, Tensor]:
    return padded([pair.label for pair in pairs], torch.device("cpu"))
