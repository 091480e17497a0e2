"""`train`: the search for features whose interchange gives the counterfactual answer."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from featurizers import Featurizer, Site
from featurizers.errors import UsageError
from featurizers.models import frozen
from torch import Tensor, nn

from featurizers_training.checkpoints import Checkpoint, fingerprint, put
from featurizers_training.evaluation import Accuracy, accuracy, right
from featurizers_training.found import Found
from featurizers_training.methods import Method
from featurizers_training.objectives import Answers, Objective, named
from featurizers_training.pairs import Pairs
from featurizers_training.progress import Ticker
from featurizers_training.runs import CleanRuns, Work

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Settings:
    """How a search runs.

    Attributes:
        epochs: passes over the pairs.
        batch_size: pairs an optimizer step, over all processes.
        micro_batch: pairs a forward pass and process, for models that do not hold a batch; the gradient is the same.
        seed: of the start and of the order of the pairs.
        warmup: share of the steps in which the learning rate rises; it then falls to a twentieth, both linearly.
        precision: of the model's arithmetic: ``fp32`` as the model is, or autocast to ``bf16`` or ``fp16``.
        patience: stop after so many epochs without a better accuracy on the validation pairs, and go back to the best.
        clip: largest norm of the gradient.
        cache_bytes: how much of the clean runs may be kept in memory; see `CleanRuns`.
    """

    epochs: int = 5
    batch_size: int = 32
    micro_batch: int | None = None
    seed: int = 0
    warmup: float = 0.1
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    patience: int | None = None
    clip: float | None = None
    cache_bytes: int = 2**31

    def __post_init__(self) -> None:
        """Refuse what is no setting."""
        for name in ("epochs", "batch_size", "micro_batch", "patience"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise UsageError(f"{name} is a number from 1, not {value!r}")
        if self.precision not in AUTOCAST:
            raise UsageError(f"precision is one of {', '.join(AUTOCAST)}, not {self.precision!r}")
        if not 0 <= self.warmup < 1:
            raise UsageError(f"warmup is a share of the steps from 0 to below 1, not {self.warmup!r}")

    def arithmetic(self, device: torch.device) -> AbstractContextManager[Any]:
        """A context in which the model computes with `precision`."""
        dtype = AUTOCAST[self.precision]
        return nullcontext() if dtype is None else torch.autocast(device.type, dtype)

    def clean_runs(self, model: nn.Module, pairs: Pairs, sites: Sequence[Site | str]) -> CleanRuns:
        """The clean runs of a model, in evaluation mode, as a search with these settings makes them."""
        with self.arithmetic(next(model.parameters()).device):
            size = self.micro_batch or self.batch_size
            return CleanRuns(model, pairs, sites, batch_size=size, cache_bytes=self.cache_bytes)


def train(
    model: nn.Module,
    pairs: Pairs,
    sites: Site | str | Sequence[Site | str],
    method: Method,
    *,
    objective: str | Objective = "cross-entropy",
    validation: Pairs | None = None,
    through: Featurizer[Any] | Mapping[Site | str, Featurizer[Any]] | None = None,
    settings: Settings | None = None,
    checkpoints: str | Path | None = None,
    optimizer: Callable[[list[dict[str, Any]]], torch.optim.Optimizer] | None = None,
    runs: CleanRuns | None = None,
    progress: bool = False,
) -> Found:
    """Search for the features of some sites whose interchange makes the model give the counterfactual answers.

    The model is frozen and is left as it was. Runs with edits begin at the first edited token of the first site, from
    what `CleanRuns` keeps. Under ``torchrun`` or ``accelerate launch`` each batch is divided among the processes, and
    the result is that of one process, to rounding.

    Args:
        model: a decoder of `transformers` with its language-model head.
        pairs: counterfactual pairs, which say the positions.
        sites: where features are interchanged, all of them at once.
        method: what to search for: `DAS`, `DBM`, `DASDBM` or `BoundlessDAS`; or a baseline that trains nothing, which
            is measured in no epochs: `FullVector`, `RandomSubspace` or `PCA`.
        objective: what to make small: ``"cross-entropy"`` on the label, ``"logit-difference"``, or a function of
            logits and `Answers` that gives a loss for each pair.
        validation: pairs to measure on after each epoch.
        through: search in the features of this featurizer, or of one for each site; it is not trained.
        settings: see `Settings`.
        checkpoints: a folder to write the state to after each epoch, and to go on from if there is one; the result is
            the same, bit for bit.
        optimizer: makes the optimizer of the parameter groups; Adam if None.
        runs: the clean runs of these pairs, if they are there already (see `Settings.clean_runs`): at these sites, or,
            where the pairs say one position for all sites, at more of them.
        progress: whether to show a progress bar.

    Raises:
        UsageError: the pairs do not fit the sites, or the checkpoint is of another search.
        SiteError: the model does not have a site.

    Example:
        >>> import torch, featurizers_training as training
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=20))
        >>> pairs = training.Pairs.of([{"base": [1, 2], "source": [3, 4], "label": 5}])
        >>> found = training.train(model, pairs, "resid.post:0", training.DAS(n_features=2))
        >>> str(found.featurizer.site), found.featurizer.site.position
        ('resid.post:0', (-1,))
    """
    settings = settings or Settings()
    where = [Site.parse(site) for site in ([sites] if isinstance(sites, Site | str) else sites)]
    given = [_through(through, site) for site in where]
    with ExitStack() as stack:
        for module in [model, *filter(None, given)]:
            stack.enter_context(frozen(module))
        search = _Search(model, pairs, where, method, objective, validation, given, settings, optimizer, runs)
        with Ticker(search.total_steps, method.name, shown=progress and search.processes.is_main_process) as ticker:
            search.run(None if checkpoints is None else Checkpoint(checkpoints, search.identity()), ticker)
        return search.found()


class _Search:
    """The state of one search."""

    def __init__(
        self,
        model: nn.Module,
        pairs: Pairs,
        sites: list[Site],
        method: Method,
        objective: str | Objective,
        validation: Pairs | None,
        through: Sequence[Featurizer[Any] | None],
        settings: Settings,
        optimizer: Callable[[list[dict[str, Any]]], torch.optim.Optimizer] | None,
        runs: CleanRuns | None,
    ) -> None:
        self.processes = PartialState(cpu=not torch.accelerator.is_available())
        if self.processes.num_processes > 1:
            model.to(self.processes.device)
        self.model, self.method, self.settings, self.sites = model, method, settings, sites
        self.objective_name, self.objective = named(objective)
        self.device = next(model.parameters()).device
        self.runs = runs or settings.clean_runs(model, pairs, sites)
        self.validation = None if validation is None else settings.clean_runs(model, validation, sites)
        if self.runs.model is not model or self.runs.pairs != pairs:
            raise UsageError("the clean runs are of another model or other pairs than the search")
        numbers = self.runs.numbers(sites)
        if settings.patience is not None and validation is None:
            raise UsageError("patience needs validation pairs, whose accuracy tells when to stop")
        self.searched = [
            method.search(self.runs.width(j), settings.seed + i, given, functools.partial(self.runs.activations, j)).to(
                self.device
            )
            for i, (j, given) in enumerate(zip(numbers, through, strict=True))
        ]
        self.through = through
        groups = method.groups(self.searched) or [{"params": [], "lr": method.lr}]
        self.parameters = [p for group in groups for p in group["params"]]
        self.epochs = settings.epochs if self.parameters else 0
        self.optimizer = (optimizer or torch.optim.Adam)(groups)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=settings.precision == "fp16")
        self.steps_an_epoch = math.ceil(len(pairs) / settings.batch_size)
        self.total_steps = self.steps_an_epoch * settings.epochs
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Any] | None = None

    def run(self, checkpoint: Checkpoint | None, ticker: Ticker) -> None:
        """All epochs, or those that a checkpoint does not have yet."""
        if checkpoint is not None:
            self._resume(checkpoint)
        ticker.advance(len(self.history) * self.steps_an_epoch, **(self.history[-1] if self.history else {}))
        while len(self.history) < self.epochs and not self._is_stuck():
            self._epoch(len(self.history), ticker)
            if checkpoint is not None and self.processes.is_main_process:
                checkpoint.save(self.parameters, self.optimizer, self.scaler, self.history, self.best)
        if self.best is not None and self.settings.patience is not None:
            put(self.parameters, self.best["state"])
        self._set(len(self.history) * self.steps_an_epoch, hard=True)

    def found(self) -> Found:
        """The result, with its accuracy on the pairs of the search and of the validation."""
        measured = {"train": self._accuracy(self.runs)}
        if self.validation is not None:
            measured["validation"] = self._accuracy(self.validation)
        return Found(
            method=self.method,
            featurizers=[one.found() for one in self.searched],
            sites=self.sites,
            pairs=self.runs.pairs,
            model=self.model,
            accuracy=measured,
            history=self.history,
            settings={**dataclasses.asdict(self.settings), "objective": self.objective_name},
        ).labelled()

    def identity(self) -> dict[str, Any]:
        """What must be the same for a checkpoint to be of this search."""
        return {
            "method": {"name": self.method.name, **dataclasses.asdict(self.method)},
            "settings": {**dataclasses.asdict(self.settings), "objective": self.objective_name},
            "sites": [str(site) for site in self.sites],
            "pairs": self.runs.pairs.digest(),
            "validation": None if self.validation is None else self.validation.pairs.digest(),
            "through": [given and fingerprint(given) for given in self.through],
            "parameters": [list(p.shape) for p in self.parameters],
        }

    # ------------------------------------------------------------------ one epoch

    def _epoch(self, epoch: int, ticker: Ticker) -> None:
        generator = torch.Generator().manual_seed(1_000_003 * self.settings.seed + epoch)
        order = torch.randperm(len(self.runs), generator=generator)
        totals, seen = torch.zeros(3, dtype=torch.float64), 0
        for number, rows in enumerate(torch.split(order, self.settings.batch_size)):
            self._set(epoch * self.steps_an_epoch + number, hard=False)
            totals += (step := self._step(rows.tolist()))
            seen += len(rows)
            ticker.advance(1, loss=float(step[0]) / len(rows), accuracy=float(totals[2]) / seen)
        loss, penalty, hits = totals.tolist()
        record = {
            "epoch": epoch + 1,
            "loss": loss / seen,
            "penalty": penalty / self.steps_an_epoch,
            "accuracy": hits / seen,
        }
        if self.validation is not None:
            self._set((epoch + 1) * self.steps_an_epoch, hard=True)
            record["validation"] = self._accuracy(self.validation).value
            if self.best is None or record["validation"] > self.best["accuracy"]:
                state = [parameter.detach().clone() for parameter in self.parameters]
                self.best = {"epoch": epoch + 1, "accuracy": record["validation"], "state": state}
        self.history.append(record)

    def _step(self, rows: list[int]) -> Tensor:
        """One optimizer step; returns the sum of the losses, the penalty and the number of right answers."""
        totals = torch.zeros(3, dtype=torch.float64, device=self.device)
        self.optimizer.zero_grad()
        own = rows[self.processes.process_index :: self.processes.num_processes]
        penalty = torch.stack([self.method.penalty(one).to(self.device) for one in self.searched]).sum()
        size = self.settings.micro_batch or len(rows)
        for start in range(0, len(own), size):
            part = own[start : start + size]
            label, there = self.runs.labels(part)
            with self.settings.arithmetic(self.device):
                logits = self.runs.logits(part, self._work(self.runs))
            losses = self.objective(logits, Answers(label, there, functools.partial(self.runs.base_labels, part)))
            if losses.shape != (len(part),):
                raise UsageError(f"the objective gives a loss for each pair, ({len(part)},), not {tuple(losses.shape)}")
            self._backward(losses.sum() / len(rows))
            totals[0] += losses.detach().sum()
            totals[2] += right(logits.detach(), label, there).sum()
        if penalty.requires_grad:
            self._backward(penalty / self.processes.num_processes)
        self._reduce_gradients()
        if self.processes.num_processes > 1:
            totals = reduce(totals, "sum")
        totals[1] = penalty.detach()
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.settings.clip or math.inf)
        if not norm.isfinite() and not self.scaler.is_enabled():
            raise UsageError("the gradient is not finite: lower the learning rate, or use precision 'fp32'")
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return totals.cpu()

    def _backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]

    def _reduce_gradients(self) -> None:
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if self.processes.num_processes > 1:
                parameter.grad.copy_(reduce(parameter.grad, "sum"))

    def _set(self, step: int, *, hard: bool) -> None:
        """Whatever changes in the course of the search: temperatures and learning rates."""
        progress = min((step + 1) / self.total_steps, 1.0)
        warmup = max(self.settings.warmup, 1e-9)
        factor = progress / warmup if progress < warmup else 1 - 0.95 * (progress - warmup) / (1 - warmup)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        for one in self.searched:
            self.method.anneal(one, progress)
            if one.gate is not None:
                one.gate.hard = hard

    def _is_stuck(self) -> bool:
        if self.settings.patience is None or self.best is None:
            return False
        return len(self.history) - int(self.best["epoch"]) >= self.settings.patience

    def _accuracy(self, runs: CleanRuns) -> Accuracy:
        with self.settings.arithmetic(self.device):
            return accuracy(runs, self._work(runs))

    def _work(self, runs: CleanRuns) -> list[Work]:
        """The edits of the search, by the numbers of its sites in these runs."""
        return [Work(j, one.featurizer, one) for j, one in zip(runs.numbers(self.sites), self.searched, strict=True)]

    def _resume(self, checkpoint: Checkpoint) -> None:
        found = checkpoint.load(self.parameters, self.optimizer, self.scaler)
        if found is not None:
            self.history, self.best = found


def _through(given: Any, site: Site) -> Featurizer[Any] | None:
    if given is None or isinstance(given, Featurizer):
        return given
    found = {Site.parse(key): featurizer for key, featurizer in given.items()}.get(site)
    if found is not None and not isinstance(found, Featurizer):
        raise UsageError(f"{site}: expected a Featurizer to search through, got {type(found).__name__}")
    return found
