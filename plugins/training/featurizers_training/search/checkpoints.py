"""Checkpoints: the state of a search after an epoch, from which it resumes to the same result, bit for bit."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any, Final, TypeAlias

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from featurizers.errors import ArtefactError, FeaturizerError, ManifestError, UsageError, shown
from featurizers.files import LOCK_NAME, contained, locked, os_errors, read_bytes, resolved
from featurizers.format import (
    check_finite,
    fingerprint,
    is_unfinished,
    parse_json,
    read_header,
    read_state,
    read_tensors,
    sha256,
    write_state,
)
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from torch import Tensor, nn

STATE_NAME: Final = "search.safetensors"
OPTIMIZER: Final = "optimizer."
FORMAT, VERSION = "featurizers-training checkpoint", 1
OLD_STATE_NAME, OLD_TENSORS_NAME = "checkpoint.json", "checkpoint.safetensors"
"""Files of a checkpoint before the state was one file."""
MAX_OLD_BYTES: Final = 2**24
COLUMNS: Final = ("epoch", "loss", "penalty", "accuracy")
"""Columns of the history; ``validation`` follows if the search has validation pairs."""

State: TypeAlias = tuple[list[dict[str, Any]], dict[str, Any] | None]
"""History of a search, and its best epoch with the parameters as ``state``."""


Count = Annotated[int, Field(ge=0, lt=2**31)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Number: TypeAlias = bool | int | Finite | None


class _Best(BaseModel):
    """Epoch with the best accuracy on the validation pairs."""

    model_config = ConfigDict(strict=True, extra="forbid")

    epoch: Annotated[int, Field(ge=1, lt=2**31)]
    accuracy: Annotated[float, Field(ge=0, le=1)]


class _Scaler(BaseModel):
    """State of a `torch.amp.GradScaler`."""

    model_config = ConfigDict(strict=True, extra="forbid")

    scale: Annotated[Finite, Field(gt=0)]
    growth_factor: Annotated[Finite, Field(gt=1)]
    backoff_factor: Annotated[Finite, Field(gt=0, lt=1)]
    growth_interval: Annotated[Count, Field(gt=0)]
    growth_tracker: Annotated[Count, Field(alias="_growth_tracker")]


class _About(BaseModel):
    """JSON that a checkpoint holds beside its tensors."""

    model_config = ConfigDict(strict=True, extra="forbid")

    search: dict[str, Any]
    history: list[str]
    best: _Best | None
    optimizer: dict[str, Number]
    scaler: _Scaler | None
    fingerprint: str

    @field_validator("scaler", mode="before")
    @classmethod
    def _without_state(cls, scaler: Any) -> Any:
        """Return None for the state of a scaler that is not enabled."""
        return None if scaler == {} else scaler


class _OldAbout(BaseModel):
    """JSON of a checkpoint before the state was one file; ``history`` has a record for each epoch."""

    model_config = ConfigDict(strict=True, extra="forbid")

    search: dict[str, Any]
    history: Annotated[list[dict[str, Finite | int]], Field(min_length=1)]
    best: _Best | None
    optimizer: dict[str, Number]
    scaler: dict[str, Any]
    sha256: str


class Checkpoint:
    """Checkpoint of a search: a folder with one file, which is replaced after each epoch.

    Args:
        folder: holds the checkpoint, if there is one.
        identity: describes the search; a checkpoint of another search is refused.
    """

    def __init__(self, folder: str | Path, identity: dict[str, Any]) -> None:
        self.folder = resolved(folder)
        self.identity = json.loads(json.dumps(identity))

    @contextmanager
    def alone(self, processes: PartialState) -> Iterator[None]:
        """Keep other programs out of the folder while the block runs; the processes of one search share it.

        Raises:
            UsageError: the folder holds something else.
            ArtefactError: another program searches in it, or it cannot be written.
        """
        self._present()  # before anything is written to it
        problems: list[FeaturizerError | None] = [None]
        with ExitStack() as stack:
            if processes.is_main_process:
                try:
                    stack.enter_context(locked(self.folder))
                except FeaturizerError as error:
                    problems = [error]
            if processes.num_processes > 1:
                broadcast_object_list(problems)
            if problems[0] is not None:
                raise problems[0]
            yield

    def _present(self) -> set[str]:
        """Return the names of the files of a checkpoint that are in the folder.

        Raises:
            UsageError: the folder holds something else.
        """
        with os_errors(self.folder):
            found = (
                {path.name for path in self.folder.iterdir() if not is_unfinished(path)}
                if self.folder.is_dir()
                else set()
            )
        found.discard(LOCK_NAME)
        if found and not found & {STATE_NAME, OLD_STATE_NAME}:
            raise UsageError(f"{self.folder} holds something else than a checkpoint; name a new or an empty folder")
        return found

    def save(
        self,
        parameters: Sequence[nn.Parameter],
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        history: list[dict[str, Any]],
        best: dict[str, Any] | None,
    ) -> None:
        """Write the state after an epoch.

        Raises:
            ArtefactError: the folder cannot be written.
        """
        tensors = {f"search.{i}": parameter.detach() for i, parameter in enumerate(parameters)}
        numbers: dict[str, Any] = {}
        for i, state in optimizer.state_dict()["state"].items():
            for name, value in state.items():
                if isinstance(value, Tensor):
                    tensors[f"{OPTIMIZER}{i}.{name}"] = value
                else:
                    numbers[f"{i}.{name}"] = value
        if best is not None:
            tensors.update({f"best.{i}": tensor for i, tensor in enumerate(best["state"])})
        # a tensor, because JSON has no NaN, and a loss may be that
        tensors["history"] = torch.tensor([list(record.values()) for record in history], dtype=torch.float64)
        about = {
            "search": self.identity,
            "history": list(history[0]),
            "best": best and {name: best[name] for name in ("epoch", "accuracy")},
            "optimizer": numbers,
            "scaler": scaler.state_dict(),
            "fingerprint": _digest(tensors),
        }
        with os_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        write_state(self.folder / STATE_NAME, tensors, about, format=FORMAT, version=VERSION)
        with os_errors(self.folder):
            for name in (OLD_STATE_NAME, OLD_TENSORS_NAME):
                (self.folder / name).unlink(missing_ok=True)

    def load(
        self, parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
    ) -> State | None:
        """Set the state of parameters, optimizer and scaler, and return the rest; None if there is no checkpoint.

        Raises:
            UsageError: the checkpoint is of another search, or the folder holds something else.
            ArtefactError: the checkpoint is damaged.
        """
        present = self._present()
        if not present:
            return None
        if STATE_NAME in present:
            path = contained(self.folder, self.folder / STATE_NAME, str(self.folder), ArtefactError)
            tensors, about = read_state(path, format=FORMAT, version=VERSION, schema=_About)
        else:
            tensors, about = self._read_old()
        if about.search.keys() != self.identity.keys():
            raise self._damaged("it does not describe a search as this release does")
        if differ := [key for key in self.identity if self.identity[key] != about.search[key]]:
            raise UsageError(
                f"{self.folder} holds a checkpoint of another search: its {', '.join(differ)} differ; "
                "name another folder"
            )
        self._check(tensors, about, parameters, optimizer, scaler)
        rows = [dict(zip(about.history, row, strict=True)) for row in tensors["history"].tolist()]
        history = [{**row, "epoch": int(row["epoch"])} for row in rows]
        restore(parameters, _numbered(tensors, "search.", parameters))
        states: dict[int, dict[str, Any]] = {}
        for name, value in {**_optimizer_tensors(tensors), **about.optimizer}.items():
            number, _, key = name.partition(".")
            states.setdefault(int(number), {})[key] = value
        optimizer.load_state_dict({**optimizer.state_dict(), "state": states})
        if about.scaler is not None:
            scaler.load_state_dict(about.scaler.model_dump(by_alias=True))
        if about.best is None:
            return history, None
        return history, {**about.best.model_dump(), "state": _numbered(tensors, "best.", parameters)}

    def _damaged(self, problem: str) -> ArtefactError:
        return ArtefactError(str(self.folder / STATE_NAME), f"{problem}; remove the folder to search from the start")

    def _check(
        self,
        tensors: dict[str, Tensor],
        about: _About,
        parameters: Sequence[nn.Parameter],
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
    ) -> None:
        """Raise `ArtefactError` unless a checkpoint has the tensors and numbers that `save` writes for this search."""
        expected = _optimizer_state(optimizer)
        wanted: dict[str, Any] = {f"{OPTIMIZER}{name}": x for name, x in expected.items() if isinstance(x, Tensor)}
        for prefix in ("search.", *(["best."] if about.best is not None else [])):
            wanted |= {f"{prefix}{i}": parameter for i, parameter in enumerate(parameters)}
        if tensors.keys() != {*wanted, "history"}:
            names = ", ".join(map(shown, sorted(tensors.keys() ^ {*wanted, "history"})[:5]))
            raise self._damaged(f"it lacks tensors of this search, or has others: {names}")
        for name, like in wanted.items():
            if tensors[name].shape != like.shape or tensors[name].dtype != like.dtype:
                raise self._damaged(f"its tensor {name!r} has another shape or dtype than that of this search")
        check_finite({name: tensors[name] for name in wanted}, str(self.folder / STATE_NAME))
        numbers = {name: x for name, x in expected.items() if not isinstance(x, Tensor)}
        if about.optimizer.keys() != numbers.keys():
            raise self._damaged("its optimizer has other numbers than that of this search")
        if (about.scaler is not None) != scaler.is_enabled():
            raise self._damaged("its gradient scaler is not that of this search")
        history = tensors["history"]
        columns = [*COLUMNS, "validation"] if self.identity["validation"] is not None else [*COLUMNS]
        if about.history != columns or history.dtype != torch.float64 or history.shape != (len(history), len(columns)):
            raise self._damaged(f"its history is no table of {', '.join(columns)}")
        if not torch.equal(history[:, 0], torch.arange(1, len(history) + 1, dtype=torch.float64)):
            raise self._damaged("its history does not count the epochs from 1")
        if about.best is not None and about.best.epoch > len(history):
            raise self._damaged(f"its best epoch is {about.best.epoch} of {len(history)}")
        if about.fingerprint != _digest(tensors):
            raise self._damaged("its tensors are not those that were written")

    def _read_old(self) -> tuple[dict[str, Tensor], _About]:
        """Return tensors and JSON of a checkpoint of two files, in the form of one file."""
        where = str(self.folder)
        state, path = (
            contained(self.folder, self.folder / name, where, ManifestError)
            for name in (OLD_STATE_NAME, OLD_TENSORS_NAME)
        )
        raw = read_bytes(state, where, ManifestError, MAX_OLD_BYTES)
        record = parse_json(raw, where, OLD_STATE_NAME, most=MAX_OLD_BYTES)
        try:
            old = _OldAbout.model_validate(record)
            names = list(old.history[0])
            rows = [[float(epoch[name]) for name in names] for epoch in old.history]
            about = _About(
                search=old.search,
                history=names,
                best=old.best,
                optimizer=old.optimizer,
                scaler=old.scaler,  # type: ignore[arg-type]  # it is validated
                fingerprint="",
            )
        except (KeyError, OverflowError, ValidationError) as error:
            raise ManifestError(where, f"{OLD_STATE_NAME} is no checkpoint of a search") from error
        read_header(path, where, OLD_TENSORS_NAME)
        if sha256(path, where) != old.sha256:
            raise ManifestError(where, f"{OLD_TENSORS_NAME} is not the one that {OLD_STATE_NAME} was written with")
        tensors = read_tensors(path, None, where)
        tensors["history"] = torch.tensor(rows, dtype=torch.float64)
        return tensors, about.model_copy(update={"fingerprint": _digest(tensors)})


def _optimizer_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(OPTIMIZER): x for name, x in tensors.items() if name.startswith(OPTIMIZER)}


def _optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the state that an optimizer has after a step, by the number of the parameter and the name."""
    trial = copy.deepcopy(optimizer)  # with its parameters
    for group in trial.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    trial.step()
    states = trial.state_dict()["state"]
    return {f"{number}.{name}": value for number, state in states.items() for name, value in state.items()}


@torch.no_grad()
def restore(parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
    """Copy values to parameters."""
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


def _digest(tensors: dict[str, Tensor]) -> str:
    return fingerprint(dict(sorted(tensors.items())))  # files have another order


def _numbered(tensors: dict[str, Tensor], prefix: str, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    return [tensors[f"{prefix}{i}"] for i in range(len(parameters))]
