"""A study of where a language model represents a variable: ``python benchmarks/study.py``; see docs/training-study.md.

The task is ``kind`` of ``examples/find_a_variable.py``, with more words. A *fold* has a seed of its own: of the split
of the words, of the pairs and of each search. It leaves one kind of word out of everything but the pairs ``unseen``.
"""

from __future__ import annotations

import copy
import functools
import gc
import importlib
import json
import os
import platform
import random
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Final

import featurizers
import featurizers_training as training
import torch
import transformers
import typer
from featurizers.models import frozen, load_model
from featurizers_training import DAS, DBM, PCA, FullVector, Method, Pairs, RandomSubspace, Settings
from featurizers_training.evaluation import accuracy_of
from featurizers_training.runs.activations import padded

sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))
example: Any = importlib.import_module("find_a_variable")

HERE: Final = Path(__file__).resolve().parent
RESULTS: Final = HERE / "results" / "training-study.json"
MODEL: Final = os.environ.get("FEATURIZERS_BENCHMARK_MODEL", "HuggingFaceTB/SmolLM2-135M-Instruct")

KINDS: Final = {
    "animal": "dog cat horse cow sheep lion tiger bear wolf fox rabbit mouse goat pig deer monkey elephant snake",
    "color": "red blue green yellow purple pink brown gray black white silver violet gold scarlet turquoise indigo",
    "country": "France Japan Brazil Kenya Canada Spain Egypt India Peru Italy Norway Chile Germany China Mexico Sweden "
    "Greece Poland",
    "drink": "tea coffee milk water juice wine beer soda cocoa cider lemonade rum whiskey gin",
    "fruit": "apple banana orange grape peach pear lemon mango cherry lime plum fig strawberry pineapple coconut berry "
    "kiwi papaya",
    "tool": "hammer saw drill wrench shovel axe knife needle rake ladder scissors brush nail screw file rope fork",
}
"""Words by kind; in the model's vocabulary each is one token."""
N_TRAIN_WORDS, N_CHOOSE_WORDS = 7, 3
"""Words of a kind for the search and for the choices; the rest are for the report."""
SIZES: Final = {"train": 160, "choose": 64, "report": 120, "unseen": 64, "same": 40}
"""Pairs of each part. ``unseen`` has sources that ask for the kind that is left out; in ``same`` base and source ask
for the same kind."""
DRAWN: Final = {"train": 64, "choose": 32, "report": 64, "unseen": 28}
"""Prompts that pairs are made of, before those are left out that the model answers wrongly."""
MEASURED: Final = ("choose", "report", "unseen", "same")

FEATURES: Final = 16
SITES: Final = {"last": (18, 24, 27, 21), "kind": (12,)}
"""Blocks after which is searched, at each position."""
MAIN: Final = ("last", 21)
"""Where rates and numbers of features are compared."""
RATES: Final[dict[str, tuple[float, ...]]] = {"das": (0.01, 0.03, 0.1), "dbm": (0.02, 0.05, 0.2)}
"""Learning rates to choose from: of the subspace and of the gate."""
COUNTS: Final = (1, 4, 64, 2, 8)
"""Numbers of features beside `FEATURES`."""
SHUFFLED: Final = (21, 27)
"""Blocks after which the labels of the search's pairs are shuffled as a control, at the last token."""


@dataclass(frozen=True)
class Fold:
    """Pairs of one seed.

    Attributes:
        seed: of everything random.
        left_out: kind of word that is only in ``unseen``.
        parts: records of each part.
        prompts: number of prompts of each part, and of those that the model answers correctly.
    """

    seed: int
    left_out: str
    parts: Mapping[str, Sequence[dict[str, Any]]]
    prompts: Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class Cell:
    """A search or a baseline in one fold; with the outcome of each pair as a digit, 1 for the right answer.

    Attributes:
        seed: of the fold.
        position: name of the token.
        block: after which is searched.
        method: its name.
        k: number of features that are interchanged.
        rate: learning rate, None without training.
        control: ``shuffled-labels``, or None.
        train: accuracy on the pairs of the search.
        outcomes: of the pairs of each part.
        seconds: of the search and the measurements.
    """

    seed: int
    position: str
    block: int
    method: str
    k: int
    rate: float | None
    control: str | None
    train: float
    outcomes: dict[str, str]
    seconds: float = field(compare=False)


def words_of(seed: int) -> dict[str, dict[str, list[str]]]:
    """Split the words of each kind at random into those of the search, of the choices and of the report."""
    split = {}
    for kind, text in KINDS.items():
        words = text.split()
        random.Random(f"{seed} {kind}").shuffle(words)
        end = N_TRAIN_WORDS + N_CHOOSE_WORDS
        split[kind] = {"train": words[:N_TRAIN_WORDS], "choose": words[N_TRAIN_WORDS:end], "report": words[end:]}
    return split


def prompts_of(
    words: Mapping[str, Sequence[str]], rng: random.Random, *, asked: str | None = None, listed: str | None = None
) -> Iterator[Any]:
    """Yield prompts without end: two words of different kinds, and one of these kinds.

    Args:
        words: to draw from, by kind.
        rng: source of randomness.
        asked: ask for this kind always.
        listed: list a word of this kind always, and ask for the other.
    """
    while True:
        kinds = rng.sample(sorted(words), 2)
        if asked is not None:
            kinds = [asked, rng.choice(sorted(set(words) - {asked}))]
        elif listed is not None:
            kinds = [rng.choice(sorted(set(words) - {listed})), listed]
        word = {kind: rng.choice(words[kind]) for kind in kinds}
        first, second = rng.sample(kinds, 2)
        to_kind = f"{example.SHOWN}{word[first]}, {word[second]}. {kinds[0]}"
        text = f"{to_kind}:"
        yield example.Prompt(
            text, word[kinds[0]], kinds[0], word, frozenset(word.values()), {"kind": to_kind, "last": text}
        )


def fold(model: Any, tokenizer: Any, seed: int) -> Fold:
    """Draw the pairs of a seed. The model answers both prompts of each correctly."""
    split, left_out = words_of(seed), sorted(KINDS)[seed % len(KINDS)]
    seen = {
        part: {k: by_part[part] for k, by_part in split.items() if k != left_out}
        for part in ("train", "choose", "report")
    }
    every = {**seen["report"], left_out: KINDS[left_out].split()}
    parts: dict[str, list[dict[str, Any]]] = {}
    prompts: dict[str, tuple[int, int]] = {}

    def right(part: str, rng: random.Random, words: Mapping[str, Sequence[str]], **options: str) -> list[Any]:
        prompts_drawn = islice(prompts_of(words, rng, **options), DRAWN[part])
        drawn = list({prompt.text: prompt for prompt in prompts_drawn}.values())
        correct = answered(model, tokenizer, drawn)
        before = prompts.get(part, (0, 0))
        prompts[part] = before[0] + len(drawn), before[1] + len(correct)
        return correct

    for part in ("train", "choose", "report"):
        rng = random.Random(f"{seed} {part}")
        correct = right(part, rng, seen[part])
        parts[part] = example.records(tokenizer, correct, SIZES[part], rng)
        if part == "report":
            parts["same"] = example.records(tokenizer, correct, SIZES["same"], rng, differ=False)
    rng = random.Random(f"{seed} unseen")
    bases, sources = right("unseen", rng, every, listed=left_out), right("unseen", rng, every, asked=left_out)
    parts["unseen"] = between(tokenizer, bases, sources, SIZES["unseen"], rng)
    return Fold(seed, left_out, parts, prompts)


@torch.no_grad()
def answered(model: Any, tokenizer: Any, prompts: Sequence[Any], batch: int = 32) -> list[Any]:
    """Return the prompts whose answer is the model's most likely next token, as the example's function does.

    The line that all prompts begin with is run once, and logits are computed at the last token alone.
    """
    shown, correct = tokenizer(example.SHOWN).input_ids, []
    past = model.base_model(input_ids=torch.tensor([shown]), use_cache=True).past_key_values
    for start in range(0, len(prompts), batch):
        chunk = prompts[start : start + batch]
        rows = [tokenizer(prompt.text).input_ids for prompt in chunk]
        answers = [tokenizer(f"{p.text} {p.answer}").input_ids[len(row)] for p, row in zip(chunk, rows, strict=True)]
        if any(row[: len(shown)] != shown for row in rows):
            raise ValueError("the tokens of a prompt do not begin with those of the line that is shown")
        ids, mask = padded([tuple(row[len(shown) :]) for row in rows], next(model.parameters()).device)
        cache = copy.deepcopy(past)
        cache.batch_repeat_interleave(len(chunk))
        whole = torch.cat([torch.ones(len(chunk), len(shown), dtype=torch.long), mask.long()], dim=1)
        hidden = model.base_model(input_ids=ids, attention_mask=whole, past_key_values=cache).last_hidden_state
        last = hidden[torch.arange(len(chunk)), mask.sum(-1) - 1]
        likeliest = model.get_output_embeddings()(last).argmax(-1).tolist()
        correct += [prompt for prompt, a, b in zip(chunk, likeliest, answers, strict=True) if a == b]
    return correct


def between(
    tokenizer: Any, bases: Sequence[Any], sources: Sequence[Any], count: int, rng: random.Random
) -> list[dict[str, Any]]:
    """Draw pairs of a base of the first prompts and a source of the second, without a word in common."""
    made: dict[tuple[str, str], dict[str, Any]] = {}
    for _ in range(1000 * count):
        if len(made) == count:
            break
        base, source = rng.choice(bases), rng.choice(sources)
        if (base.text, source.text) not in made and not base.words & source.words:
            made[base.text, source.text] = example.records(tokenizer, [base, source], 1, _InOrder())[0]
    return list(made.values())


class _InOrder(random.Random):
    """Source of randomness that draws a whole list in its own order."""

    def sample(self, population: Any, k: int, *, counts: Any = None) -> list[Any]:
        return list(population)[:k]


class Searches:
    """Searches in one fold at one position, from clean runs that are made once."""

    def __init__(self, model: Any, tokenizer: Any, given: Fold, position: str) -> None:
        self.model, self.given, self.position = model, given, position
        blocks = sorted({*SITES[position]})
        self.sites = [f"resid.post:{block}" for block in blocks]
        self.pairs = Pairs.of(given.parts["train"], tokenizer, position=position)
        measured = [record for part in MEASURED for record in given.parts[part]]
        with frozen(model):
            self.runs = training.CleanRuns(model, self.pairs, self.sites)
            self.unseen = training.CleanRuns(model, Pairs.of(measured, tokenizer, position=position), self.sites)
        for runs in (self.runs, self.unseen):
            wrong = sum(a != list(p.base_label or ()) for a, p in zip(runs.answers.tolist(), runs.pairs, strict=True))
            print(given.seed, position, f"{wrong} of {len(runs)} bases answered wrongly", flush=True)

    @functools.cached_property
    def shuffled(self) -> tuple[Pairs, training.CleanRuns]:
        """Pairs of the search with the labels of other pairs, and their clean runs."""
        pairs = self.pairs.with_shuffled_labels(self.given.seed)
        with frozen(self.model):
            return pairs, training.CleanRuns(self.model, pairs, self.sites)

    def cell(self, block: int, method: Method, control: str | None = None) -> Cell:
        """Search after a block and measure the result on each part."""
        start, site = time.perf_counter(), f"resid.post:{block}"
        pairs, runs = (self.pairs, self.runs) if control is None else self.shuffled
        found = training.train(self.model, pairs, site, method, settings=Settings(seed=self.given.seed), runs=runs)
        with frozen(self.model):
            right = accuracy_of(self.unseen, found.featurizers).right
        digits, outcomes = "".join(str(int(each)) for each in right or ()), {}
        for part in MEASURED:
            count = len(self.given.parts[part])
            outcomes[part], digits = digits[:count], digits[count:]
        return Cell(
            seed=self.given.seed,
            position=self.position,
            block=block,
            method=method.name,
            k=int(found.selected[0] or 0),
            rate=rate_of(method),
            control=control,
            train=found.accuracy["train"].value,
            outcomes=outcomes,
            seconds=round(time.perf_counter() - start, 1),
        )


def rate_of(method: Method) -> float | None:
    """Return the learning rate of a method that trains something."""
    if isinstance(method, DBM):
        return method.gate_lr
    return method.lr if isinstance(method, DAS) and not isinstance(method, RandomSubspace) else None


def with_rate(name: str, rate: float) -> Method:
    """Return DAS or DBM with a learning rate."""
    return DAS(n_features=FEATURES, lr=rate) if name == "das" else DBM(gate_lr=rate)


def share(digits: Sequence[str]) -> float:
    """Return the share of the digits 1 in several texts."""
    return sum(text.count("1") for text in digits) / sum(map(len, digits))


class Log:
    """File of finished cells, one JSON object a line, so that an interrupted run goes on where it was."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self.cells = [Cell(**json.loads(line)) for line in lines]

    def once(self, searches: Searches, block: int, method: Method, control: str | None = None) -> None:
        """Make a cell, unless it is in the file."""
        wanted = (searches.given.seed, searches.position, block, method.name, rate_of(method), control)
        count = getattr(method, "n_features", None)
        for c in self.cells:
            if wanted == (c.seed, c.position, c.block, c.method, c.rate, c.control) and count in (None, c.k):
                return
        made = searches.cell(block, method, control)
        self.cells.append(made)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(vars(made)) + "\n")
        accuracies = {part: f"{share([digits]):.0%}" for part, digits in made.outcomes.items()}
        print(*wanted, made.k, f"train {made.train:.0%}", accuracies, f"{made.seconds} s", flush=True)


def search_all(model: Any, tokenizer: Any, folds: Sequence[Fold], log: Log) -> None:
    """Run all cells of all folds, the most important ones first."""
    baselines: list[Method] = [FullVector(), PCA(n_features=FEATURES), RandomSubspace(n_features=FEATURES)]
    methods = [DAS(n_features=FEATURES), DBM(), *baselines]
    components = min(len({r[side] for r in each.parts["train"] for side in ("base", "source")}) for each in folds)
    methods_by_count = (DAS, PCA, RandomSubspace)  # there are no more components than prompts
    counts = [make(n_features=k) for k in COUNTS for make in methods_by_count if make is not PCA or k <= components]
    rates = [with_rate(name, rate) for name, of_name in RATES.items() for rate in of_name]
    at_last = [Searches(model, tokenizer, given, "last") for given in folds]
    _, main_block = MAIN
    _run(log, at_last, [(main_block, method, None) for method in [*methods, *counts]])
    _run(log, at_last, [(block, method, None) for block in SITES["last"] for method in methods])
    _run(log, at_last, [(main_block, method, None) for method in rates])
    _run(log, at_last, [(block, methods[0], "shuffled-labels") for block in SHUFFLED])
    at_last.clear()
    for given in folds:
        gc.collect()
        at_kind = [Searches(model, tokenizer, given, "kind")]
        _run(log, at_kind, [(block, method, None) for block in SITES["kind"] for method in methods])


def _run(log: Log, folds: Sequence[Searches], cells: Sequence[tuple[int, Method, str | None]]) -> None:
    """Make each cell, given as block, method and control, in all folds before the next cell."""
    for block, method, control in cells:
        for searches in folds:
            log.once(searches, block, method, control)


def main(
    model: Annotated[str, typer.Option(help="Hub id, folder, or .gguf file of a decoder.")] = MODEL,
    out: Annotated[Path, typer.Option(help="File of the results.")] = RESULTS,
    log: Annotated[Path, typer.Option(help="File of finished cells, to continue from.")] = Path("training-study.jsonl"),
    folds: Annotated[int, typer.Option(help="Number of folds, each with a seed of its own.", min=1)] = 3,
    threads: Annotated[int, typer.Option(help="Threads of torch.", min=1)] = 1,
    stop: Annotated[bool, typer.Option(help="Write the results of the cells in the log, and make no more.")] = False,
) -> None:
    """Run the study and write its results; what is in the log is not run again."""
    torch.set_num_threads(threads)
    loaded = None if stop else load_model(model)
    made, cells = [], Log(log)
    for seed in range(folds):
        kept = log.with_name(f"{log.stem}-{seed}.json")
        if loaded is not None and not kept.exists():
            kept.write_text(json.dumps(vars(fold(loaded.model, loaded.tokenizer, seed))), encoding="utf-8")
        made.append(Fold(**json.loads(kept.read_text(encoding="utf-8"))))
        print(seed, made[-1].left_out, made[-1].prompts, {p: len(r) for p, r in made[-1].parts.items()}, flush=True)
    if loaded is not None:
        search_all(loaded.model, loaded.tokenizer, made, cells)
    data = {
        "model": Path(model).name,
        "threads": threads,
        "machine": {
            "processor": platform.machine(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "featurizers": featurizers.__version__,
        },
        "folds": [vars(each) for each in made],
        "cells": [vars(cell) for cell in cells.cells],
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(data) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
