"""Whole searches beside the same searches in pyvene: DAS and DBM on a language model, from nothing to an accuracy."""

from __future__ import annotations

import functools
import importlib
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import featurizers
import featurizers_training
import torch
from featurizers import Featurizer, Site
from featurizers.errors import FeaturizerError
from featurizers.models import load_model
from featurizers_training.methods.base import Searched
from featurizers_training.runs.clean_runs import CleanRuns, SiteEdit
from models import gpt2, prompts
from peers import Inputs, ParametrizedSubspace, Trainer, masked, rotated
from timing import Benchmark, Case, Settings, Sizes, Skipped, Unequal, same, tolerance
from torch import Tensor, nn

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
MODEL = os.environ.get("FEATURIZERS_BENCHMARK_MODEL", "HuggingFaceTB/SmolLM2-135M-Instruct")
"""Hub id, folder, or .gguf file, as ``featurizers demo --model`` takes it."""
LAYER, PAIRS, FEATURES = 20, 200, 16
SETTINGS = featurizers_training.Settings(epochs=5, batch_size=32)
RATE, GATE_RATE = 1e-2, 5e-2
PEER = "pyvene, both prompts through the model at each step"
BEST = f"{PEER}; of the last token's logits alone, parametrize.cached()"
NOISE = 0.05
"""How far below the peer's accuracy ours may be by chance: the two descend in different coordinates."""


@dataclass(frozen=True)
class Task:
    """Pairs to search with and pairs to measure on, in a model that can do the task."""

    model: Any
    site: Site
    train: featurizers_training.Pairs
    test: featurizers_training.Pairs
    d_in: int
    what: str


@functools.lru_cache(maxsize=1)
def task(settings: Settings) -> Task:
    """Which kind of word is asked for, in `MODEL`; a random model and random pairs where the run is to be quick."""
    if settings.quick:
        model: Any = gpt2(settings, layers=3, width=32, vocabulary=100, length=8)
        ids = prompts(settings, 96, 8, 100).tolist()
        records = [{"base": a, "source": b, "label": b[0]} for a, b in zip(ids[:48], ids[48:], strict=True)]
        pairs = featurizers_training.Pairs.of(records)
        return Task(model, Site("resid.post", 1), pairs[:32], pairs[32:], 32, "a random model")
    sys.path.append(str(EXAMPLES))
    find_a_variable = importlib.import_module("find_a_variable")
    try:
        model, tokenizer, _ = load_model(MODEL)
    except (FeaturizerError, ImportError) as error:
        raise Skipped(
            f"{error}; name a model, a folder or a .gguf file in FEATURIZERS_BENCHMARK_MODEL (see docs/demo.md)"
        ) from error
    with tempfile.TemporaryDirectory() as name:
        find_a_variable.write_pairs(model, tokenizer, "kind", Path(name), pairs=PAIRS, held_out=PAIRS, seed=0)
        train, test = (
            featurizers_training.Pairs.read(Path(name, f"{part}.jsonl"), tokenizer, position="last")
            for part in ("train", "test")
        )
    model.to(settings.device, settings.dtype)
    distinct = len({pair.base for pair in train} | {pair.sources[0] for pair in train})
    tokens = statistics.mean(len(pair.base) for pair in train)
    what = (
        f"{Path(MODEL).name}, after layer {LAYER}, {len(train)} pairs of {distinct} prompts of {tokens:.0f} tokens, "
        f"{SETTINGS.epochs} epochs"
    )
    return Task(model, Site("resid.post", LAYER), train, test, int(model.config.hidden_size), what)


@dataclass(frozen=True)
class Outcome:
    """What a whole run came to."""

    accuracy: float
    losses: list[float]


def ours(given: Task, method: featurizers_training.Method) -> tuple[Outcome, Featurizer[Any]]:
    """A search from nothing, and its accuracy on the pairs that it has not seen."""
    found = featurizers_training.train(given.model, given.train, given.site, method, settings=SETTINGS, optimizer=_adam)
    accuracy = featurizers_training.evaluate(given.model, given.test, found.featurizer)
    return Outcome(accuracy.value, [epoch["loss"] for epoch in found.history]), found.featurizer


def _adam(groups: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, weight_decay=0.0)


# ---------------------------------------------------------------------- the peer


def _prepared(given: Task, pairs: featurizers_training.Pairs) -> tuple[Inputs, Inputs, Tensor]:
    """Token ids of bases and sources, padded on the left, and labels."""
    device = next(given.model.parameters()).device
    sides = []
    for rows in ([pair.base for pair in pairs], [pair.sources[0] for pair in pairs]):
        width = max(map(len, rows))
        ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows], device=device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
        sides.append({"input_ids": ids, "attention_mask": mask})
    return sides[0], sides[1], torch.tensor([pair.label[0] for pair in pairs], device=device)


def _rows(inputs: Inputs, rows: Tensor) -> Inputs:
    return {name: tensor[rows] for name, tensor in inputs.items()}


def _order(epoch: int, n: int) -> Iterator[Tensor]:
    """The batches of an epoch, in the order in which our search takes them."""
    generator = torch.Generator().manual_seed(1_000_003 * SETTINGS.seed + epoch)
    yield from torch.split(torch.randperm(n, generator=generator), SETTINGS.batch_size)


def _rate(progress: float) -> float:
    """The learning rate's factor, as in our search."""
    warmup = SETTINGS.warmup
    return progress / warmup if progress < warmup else 1 - 0.95 * (progress - warmup) / (1 - warmup)


def theirs(
    given: Task, trainer: Trainer, lr: float, anneal: Callable[[float], None], cached: Callable[[], Any] = nullcontext
) -> Outcome:
    """The same search in pyvene, with the same batches, rates and temperatures, and its accuracy on the same pairs."""
    inputs, n = _prepared(given, given.train), len(given.train)
    optimizer = _adam(trainer.intervention.parameters())
    total, step, losses = math.ceil(n / SETTINGS.batch_size) * SETTINGS.epochs, 0, []
    trainer.intervention.train()
    for epoch in range(SETTINGS.epochs):
        loss = 0.0
        for rows in _order(epoch, n):
            step += 1
            anneal(step / total)
            optimizer.param_groups[0]["lr"] = lr * _rate(step / total)
            base, source, label = _rows(inputs[0], rows), _rows(inputs[1], rows), inputs[2][rows]
            with cached():
                loss += trainer.step(base, source, label, optimizer) * len(rows) / n
        losses.append(loss)
    trainer.intervention.eval()
    hits = 0
    base, source, label = _prepared(given, given.test)
    with torch.no_grad(), cached():
        for rows in torch.split(torch.arange(len(label)), 64):
            logits = trainer.logits(_rows(base, rows), _rows(source, rows))
            hits += int((logits.argmax(-1) == label[rows]).sum())
    return Outcome(hits / len(label), losses)


def _start(given: Task, trainer: Trainer, method: featurizers_training.Method) -> str:
    """That both sides give the same logits before the first step."""
    rows = next(_order(0, len(given.train)))
    base, source, _ = _prepared(given, given.train)
    runs = CleanRuns(given.model, given.train, [given.site])
    searched = method.search(given.d_in, SETTINGS.seed, None, lambda: runs.activations(0)).to(base["input_ids"].device)
    with torch.no_grad():
        found = runs.logits(rows.tolist(), [SiteEdit(0, searched.featurizer, searched)]).squeeze(1)
        wanted = trainer.logits(_rows(base, rows), _rows(source, rows))
    allowed = max(1e-3, tolerance(next(given.model.parameters()).dtype))
    return same(found, wanted, allowed, "logits before the first step")


def _case(
    settings: Settings, method: featurizers_training.Method, make: Callable[[Task], Any], *, best: bool = False
) -> Case:
    given = task(settings)

    def trainer() -> Trainer:
        return Trainer(given.model, given.site.layer or 0, make(given), last_only=best)

    def here() -> Outcome:
        return ours(given, method)[0]

    def there() -> Outcome:
        made = trainer()
        lr, anneal = method.lr, lambda _: None
        if isinstance(method, featurizers_training.DBM):
            first, last = method.temperature
            lr = method.gate_lr

            def anneal(progress: float) -> None:
                made.intervention.temperature = first * (last / first) ** min(progress / method.annealing, 1.0)

        return theirs(given, made, lr, anneal, torch.nn.utils.parametrize.cached if best else nullcontext)

    last: dict[str, Outcome] = {}

    def noted(side: str, run: Callable[[], Outcome]) -> Callable[[], Outcome]:
        def call() -> Outcome:
            last[side] = run()
            return last[side]

        return call

    def after() -> str:
        a, b = last["here"], last["there"]
        if a.accuracy < b.accuracy - NOISE and not settings.quick:
            raise Unequal(f"our accuracy on held-out pairs is {a.accuracy:.1%}, and the peer's {b.accuracy:.1%}")
        return (
            f"accuracy on {len(given.test)} held-out pairs {a.accuracy:.1%} here, {b.accuracy:.1%} there; "
            f"loss of the last epoch {a.losses[-1]:.3f} here, {b.losses[-1]:.3f} there"
        )

    return Case(
        f"{method.name}: {given.what}",
        BEST if best else PEER,
        noted("here", here),
        noted("there", there),
        lambda: _start(given, trainer(), method),
        after,
    )


def _das(settings: Settings) -> featurizers_training.DAS:
    return featurizers_training.DAS(n_features=settings.size(FEATURES, 4), lr=RATE)


def _dbm() -> featurizers_training.DBM:
    return featurizers_training.DBM(gate_lr=GATE_RATE, temperature=(1.0, 0.01), annealing=0.5)


def _rotation(given: Task, n_features: int) -> Any:
    """The peer's intervention, begun at the basis at which ours begins."""
    subspace = ParametrizedSubspace(given.d_in, n_features)
    basis = featurizers.create(
        "subspace", d_in=given.d_in, n_features=n_features, seed=SETTINGS.seed
    ).orthonormal_basis()
    subspace.rotate.weight = basis.detach()
    return rotated(subspace.to(next(given.model.parameters()).device))


def das(settings: Settings) -> Case:
    """DAS as the recipes have it."""
    method = _das(settings)
    return _case(settings, method, lambda given: _rotation(given, method.n_features))


def das_best(settings: Settings) -> Case:
    """DAS beside the peer at its best."""
    method = _das(settings)
    return _case(settings, method, lambda given: _rotation(given, method.n_features), best=True)


def dbm(settings: Settings) -> Case:
    """DBM on the neurons, as the recipes have it."""
    return _case(settings, _dbm(), lambda given: masked(given.d_in))


# ---------------------------------------------------------------------- where a step's time goes


@dataclass
class _Clock:
    """Seconds in the interchange, its backward pass and the way back to the manifold, and in all steps."""

    forward: float = 0.0
    backward: float = 0.0
    began: float = 0.0
    steps: list[float] = field(default_factory=list)

    def watch(self, searched: Searched) -> None:
        """Time a search's edits: in the backward pass, from their gradient until the parameter has its own."""
        start = 0.0

        def enter(*_: object) -> None:
            nonlocal start
            start = time.perf_counter()
            self.began = self.began or start

        def leave(_: nn.Module, __: object, edited: Tensor) -> None:
            if edited.requires_grad:  # a step's, and not one of the measurements afterwards
                self.forward += time.perf_counter() - start
                edited.register_hook(enter)

        def done(_: Tensor) -> None:
            self.backward += time.perf_counter() - start

        searched.register_forward_pre_hook(enter)
        searched.register_forward_hook(leave)
        for parameter in searched.parameters():
            parameter.register_post_accumulate_grad_hook(done)

    def optimizer(self, groups: Any) -> torch.optim.Optimizer:
        """One that notes when each step ended."""
        made = _adam(groups)
        made.register_step_post_hook(lambda *_: self.steps.append(time.perf_counter()))
        return made


def share(settings: Settings) -> Sizes:
    """How much of a step the featurizer takes."""
    given, clock = task(settings), _Clock()

    class Watched(featurizers_training.DAS):
        def search(
            self, d_in: int, seed: int, through: Featurizer[Any] | None, activations: Callable[[], Tensor]
        ) -> Searched:
            searched = super().search(d_in, seed, through, activations)
            clock.watch(searched)
            return searched

    method = Watched(n_features=settings.size(FEATURES, 4), lr=RATE)
    found = featurizers_training.train(
        given.model, given.train, given.site, method, settings=SETTINGS, optimizer=clock.optimizer
    )
    steps = len(clock.steps)
    featurizer, step = clock.forward / steps, (clock.steps[-1] - clock.began) / steps
    return Sizes(
        f"the interchange, its backward pass and the retraction, of a step of das: {given.what}",
        "the whole step",
        featurizer + clock.backward / steps,
        step,
        f"{featurizer * 1e3:.2f} ms forward with the retraction, {clock.backward / steps * 1e3:.2f} ms backward, of "
        f"{step * 1e3:.0f} ms; {steps} steps of {SETTINGS.batch_size} pairs, {found.accuracy['train'].value:.1%} right",
        unit="s",
    )


BENCHMARKS = (
    Benchmark("training-das", das, required=3),
    Benchmark("training-das-best", das_best),
    Benchmark("training-dbm", dbm, required=2),
    Benchmark("training-share", share, "at most", 0.02),
)
