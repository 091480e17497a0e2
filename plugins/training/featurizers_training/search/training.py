"""`train`: search for features whose interchange makes the model give the counterfactual answers."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from featurizers import Featurizer, Site
from featurizers.cli import ProgressBar, progress_bar
from featurizers.errors import UsageError
from featurizers.format import fingerprint
from featurizers.models import frozen
from torch import Tensor, nn

from featurizers_training.evaluation import Accuracy, accuracy, answered
from featurizers_training.methods.base import Method
from featurizers_training.pairs import Pairs
from featurizers_training.runs.clean_runs import CleanRuns, SiteEdit
from featurizers_training.search.checkpoints import Checkpoint, restore
from featurizers_training.search.found import Found
from featurizers_training.search.objectives import Answers, Objective, named_objective
from featurizers_training.search.settings import Settings

SHOWN: Final = {"loss": "loss {:.3f}", "accuracy": "accuracy {:.0%}", "validation": "validation {:.0%}"}
"""Measurements that the progress bar shows."""


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
    """Search for features at some sites whose interchange makes the model give the counterfactual answers.

    The model is frozen meanwhile, and afterwards is in its old state. Runs with edits begin at the first edited token
    of the first site, from what `CleanRuns` keeps. Under ``torchrun`` or ``accelerate launch`` each batch is divided
    among the processes, and the result is that of one process, up to rounding.

    Args:
        model: a decoder of `transformers` with its language-model head.
        pairs: counterfactual pairs, which say the positions.
        sites: where features are interchanged, at all of them at once.
        method: what to search for: `DAS`, `DBM`, `DASDBM` or `BoundlessDAS`; or a baseline, which trains nothing and is
            only measured: `FullVector`, `RandomSubspace` or `PCA`.
        objective: what to minimise: ``"cross-entropy"`` of the label, ``"logit-difference"``, or a function that maps
            logits and `Answers` to a loss for each pair.
        validation: pairs to measure on after each epoch.
        through: search in the features of this featurizer, or of one for each site; it is not trained.
        settings: see `Settings`.
        checkpoints: a folder to write the state to after each epoch, and to resume from if it holds one; the result is
            the same, bit for bit.
        optimizer: makes the optimizer from the parameter groups; Adam if None.
        runs: clean runs of these pairs that were made before (see `Settings.clean_runs`), at these sites, or also at
            others if the pairs have one position for all sites.
        progress: whether to show a progress bar; without a terminal, a line on stderr for each epoch.

    Raises:
        UsageError: the pairs do not fit the sites, or the checkpoint is of another search.
        ArtefactError: another program searches in the folder of the checkpoint, or the checkpoint is damaged.
        SiteError: the model does not have a site.

    Examples:
        >>> import torch, featurizers_training as training
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=20))
        >>> pairs = training.Pairs.of([{"base": [1, 2], "source": [3, 4], "label": 5}])
        >>> found = training.train(model, pairs, "resid.post:0", training.DAS(n_features=2))
        >>> str(found.featurizer.site), found.featurizer.site.position
        ('resid.post:0', (-1,))
    """
    settings = settings or Settings()
    parsed = [Site.parse(site) for site in ([sites] if isinstance(sites, Site | str) else sites)]
    gone_through = [_through(through, site) for site in parsed]
    with ExitStack() as stack:
        for module in [model, *filter(None, gone_through)]:
            stack.enter_context(frozen(module))
        search = _Search(model, pairs, parsed, method, objective, validation, gone_through, settings, optimizer, runs)
        shown = progress and search.processes.is_main_process
        checkpoint = None if checkpoints is None else Checkpoint(checkpoints, search.identity())
        if checkpoint is not None:
            stack.enter_context(checkpoint.alone(search.processes))
        with progress_bar(search.total_steps, method.name, shown=shown) as bar:
            search.run(checkpoint, bar)
        return search.found()


def _through(through: Any, site: Site) -> Featurizer[Any] | None:
    """Return the featurizer to search through at a site, given one for all sites or a mapping."""
    if through is None or isinstance(through, Featurizer):
        return through
    featurizer = {Site.parse(key): value for key, value in through.items()}.get(site)
    if featurizer is not None and not isinstance(featurizer, Featurizer):
        raise UsageError(f"{site}: expected a Featurizer to search through, got {type(featurizer).__name__}")
    return featurizer


def _fingerprint(featurizer: Featurizer[Any]) -> str:
    return fingerprint(featurizer.state_dict(), f"{featurizer.kind} {featurizer.config.model_dump_json()}")


class _Search:
    """State of one search."""

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
        if not isinstance(method, Method):
            raise UsageError(
                f"method is a search such as DAS(n_features=1), not {type(method).__name__}; a featurizer to search in "
                "is given as through="
            )
        self.model, self.method, self.settings, self.sites = model, method, settings, sites
        self.objective_name, self.objective = named_objective(objective)
        self.device = next(model.parameters()).device
        self.runs = runs or settings.clean_runs(model, pairs, sites)
        self.validation = None if validation is None else settings.clean_runs(model, validation, sites)
        if self.runs.model is not model or self.runs.pairs != pairs:
            raise UsageError("the clean runs are of another model or other pairs than the search")
        numbers = self.runs.numbers(sites)
        if settings.patience is not None and validation is None:
            raise UsageError("patience needs validation pairs, whose accuracy tells when to stop")
        self.searched = [
            method.search(
                self.runs.width(j), settings.seed + i, featurizer, functools.partial(self.runs.activations, j)
            ).to(self.device)
            for i, (j, featurizer) in enumerate(zip(numbers, through, strict=True))
        ]
        self.through = through
        groups = method.groups(self.searched) or [{"params": [], "lr": method.lr}]
        self.parameters = [p for group in groups for p in group["params"]]
        self.epochs = settings.epochs if self.parameters else 0
        self.optimizer = (optimizer or torch.optim.Adam)(groups)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=settings.precision == "fp16")
        self.epoch_steps = math.ceil(len(pairs) / settings.batch_size)
        self.total_steps = self.epoch_steps * settings.epochs
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Any] | None = None

    def run(self, checkpoint: Checkpoint | None, bar: ProgressBar) -> None:
        """Run all epochs that a checkpoint does not have yet."""
        if checkpoint is not None and (state := checkpoint.load(self.parameters, self.optimizer, self.scaler)):
            self.history, self.best = state
        bar.reach(len(self.history) * self.epoch_steps, self._described(self.history[-1] if self.history else {}))
        while len(self.history) < self.epochs and not self._is_stuck():
            self._epoch(len(self.history), bar)
            described = self._described(self.history[-1]).removeprefix(self.method.name).strip()
            bar.note(f"{self.method.name}, epoch {len(self.history)} of {self.epochs}: {described}")
            if checkpoint is not None and self.processes.is_main_process:
                checkpoint.save(self.parameters, self.optimizer, self.scaler, self.history, self.best)
        if self.best is not None and self.settings.patience is not None:
            restore(self.parameters, self.best["state"])
        self._schedule(len(self.history) * self.epoch_steps, hard=True)

    def found(self) -> Found:
        """Return the result, with its accuracy on the pairs of the search and of the validation."""
        measured = {"train": self._accuracy(self.runs)}
        if self.validation is not None:
            measured["validation"] = self._accuracy(self.validation)
        return Found(
            method=self.method,
            featurizers=[each.found() for each in self.searched],
            sites=self.sites,
            pairs=self.runs.pairs,
            model=self.model,
            accuracy=measured,
            history=self.history,
            settings={**dataclasses.asdict(self.settings), "objective": self.objective_name},
        ).labelled()

    def identity(self) -> dict[str, Any]:
        """Return the description that a checkpoint of this search must have."""
        return {
            "method": {"name": self.method.name, **dataclasses.asdict(self.method)},
            "settings": {**dataclasses.asdict(self.settings), "objective": self.objective_name},
            "sites": [str(site) for site in self.sites],
            "pairs": self.runs.pairs.digest(),
            "validation": None if self.validation is None else self.validation.pairs.digest(),
            "through": [featurizer and _fingerprint(featurizer) for featurizer in self.through],
            "parameters": [list(p.shape) for p in self.parameters],
        }

    # ------------------------------------------------------------------ one epoch

    def _epoch(self, epoch: int, bar: ProgressBar) -> None:
        generator = torch.Generator().manual_seed(1_000_003 * self.settings.seed + epoch)
        order = torch.randperm(len(self.runs), generator=generator)
        totals, seen = torch.zeros(3, dtype=torch.float64), 0
        for number, rows in enumerate(torch.split(order, self.settings.batch_size)):
            self._schedule(epoch * self.epoch_steps + number, hard=False)
            totals += (step := self._step(rows.tolist()))
            seen += len(rows)
            bar.advance(1, self._described({"loss": float(step[0]) / len(rows), "accuracy": float(totals[2]) / seen}))
        loss, penalty, hits = totals.tolist()
        record = {
            "epoch": epoch + 1,
            "loss": loss / seen,
            "penalty": penalty / self.epoch_steps,
            "accuracy": hits / seen,
        }
        if self.validation is not None:
            self._schedule((epoch + 1) * self.epoch_steps, hard=True)
            record["validation"] = self._accuracy(self.validation).value
            if self.best is None or record["validation"] > self.best["accuracy"]:
                state = [parameter.detach().clone() for parameter in self.parameters]
                self.best = {"epoch": epoch + 1, "accuracy": record["validation"], "state": state}
        self.history.append(record)

    def _described(self, measured: Mapping[str, float]) -> str:
        """Return the text before the progress bar."""
        values = [text.format(measured[name]) for name, text in SHOWN.items() if name in measured]
        return "  ".join([self.method.name, *values])

    def _step(self, rows: list[int]) -> Tensor:
        """Take one optimizer step; return the sum of the losses, the penalty, and the number of right answers."""
        totals = torch.zeros(3, dtype=torch.float64, device=self.device)
        self.optimizer.zero_grad()
        own = rows[self.processes.process_index :: self.processes.num_processes]
        penalty = torch.stack([self.method.penalty(each).to(self.device) for each in self.searched]).sum()
        size = self.settings.micro_batch or len(rows)
        for start in range(0, len(own), size):
            part = own[start : start + size]
            label, is_token = self.runs.labels(part)
            with self.settings.arithmetic(self.device):
                logits = self.runs.logits(part, self._edits(self.runs))
            losses = self.objective(logits, Answers(label, is_token, functools.partial(self.runs.base_labels, part)))
            if losses.shape != (len(part),):
                raise UsageError(f"the objective gives a loss for each pair, ({len(part)},), not {tuple(losses.shape)}")
            self._backward(losses.sum() / len(rows))
            totals[0] += losses.detach().sum()
            totals[2] += answered(logits.detach(), label, is_token).sum()
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

    def _schedule(self, step: int, *, hard: bool) -> None:
        """Set the learning rates and the gates' temperatures for a step."""
        progress = min((step + 1) / self.total_steps, 1.0)
        warmup = max(self.settings.warmup, 1e-9)
        factor = progress / warmup if progress < warmup else 1 - 0.95 * (progress - warmup) / (1 - warmup)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        for each in self.searched:
            self.method.anneal(each, progress)
            if each.gate is not None:
                each.gate.hard = hard

    def _is_stuck(self) -> bool:
        if self.settings.patience is None or self.best is None:
            return False
        return len(self.history) - int(self.best["epoch"]) >= self.settings.patience

    def _accuracy(self, runs: CleanRuns) -> Accuracy:
        with self.settings.arithmetic(self.device):
            return accuracy(runs, self._edits(runs))

    def _edits(self, runs: CleanRuns) -> list[SiteEdit]:
        numbers = runs.numbers(self.sites)
        return [SiteEdit(j, each.featurizer, each) for j, each in zip(numbers, self.searched, strict=True)]
