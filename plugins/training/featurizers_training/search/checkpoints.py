"""Checkpoints: the state of a search after an epoch, from which it resumes to the same result, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, TypeAlias

import torch
from featurizers.errors import ArtefactError, ManifestError, UsageError
from featurizers.files import os_errors, read_bytes, resolved
from featurizers.format import fingerprint, parse_json, read_header, read_state, read_tensors, sha256, write_state
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor, nn

STATE_NAME: Final = "search.safetensors"
OPTIMIZER: Final = "optimizer."
FORMAT, VERSION = "featurizers-training checkpoint", 1
OLD_STATE_NAME, OLD_TENSORS_NAME = "checkpoint.json", "checkpoint.safetensors"
"""Files of a checkpoint before the state was one file."""

State: TypeAlias = tuple[list[dict[str, Any]], dict[str, Any] | None]
"""History of a search, and its best epoch with the parameters as ``state``."""


class _About(BaseModel):
    """JSON that a checkpoint holds beside its tensors."""

    model_config = ConfigDict(strict=True, extra="forbid")

    search: dict[str, Any]
    history: list[str]
    best: dict[str, Any] | None
    optimizer: dict[str, Any]
    scaler: dict[str, Any]
    fingerprint: str


class Checkpoint:
    """Checkpoint of a search: a folder with one file, which is replaced after each epoch.

    Args:
        folder: holds the checkpoint, if there is one.
        identity: describes the search; a checkpoint of another search is refused.
    """

    def __init__(self, folder: str | Path, identity: dict[str, Any]) -> None:
        self.folder = resolved(folder)
        self.identity = json.loads(json.dumps(identity))

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
        about = _About(
            search=self.identity,
            history=list(history[0]),
            best=best and {name: best[name] for name in ("epoch", "accuracy")},
            optimizer=numbers,
            scaler=scaler.state_dict(),
            fingerprint=_digest(tensors),
        )
        with os_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        write_state(self.folder / STATE_NAME, tensors, about.model_dump(), format=FORMAT, version=VERSION)
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
        if (self.folder / STATE_NAME).exists():
            tensors, about, history = self._read()
        elif (self.folder / OLD_STATE_NAME).exists():
            tensors, about, history = self._read_old()
        elif self.folder.is_dir() and any(self.folder.iterdir()):
            raise UsageError(f"{self.folder} holds something else than a checkpoint; name a new or an empty folder")
        else:
            return None
        if differ := [key for key in self.identity if self.identity[key] != about.search.get(key)]:
            raise UsageError(
                f"{self.folder} holds a checkpoint of another search: its {', '.join(differ)} differ; "
                "name another folder"
            )
        restore(parameters, _numbered(tensors, "search.", parameters))
        states: dict[int, dict[str, Any]] = {}
        kept = {name.removeprefix(OPTIMIZER): x for name, x in tensors.items() if name.startswith(OPTIMIZER)}
        for name, value in {**kept, **about.optimizer}.items():
            number, _, key = name.partition(".")
            states.setdefault(int(number), {})[key] = value
        optimizer.load_state_dict({**optimizer.state_dict(), "state": states})
        scaler.load_state_dict(about.scaler)
        return history, about.best and {**about.best, "state": _numbered(tensors, "best.", parameters)}

    def _read(self) -> tuple[dict[str, Tensor], _About, list[dict[str, Any]]]:
        path = self.folder / STATE_NAME
        tensors, about = read_state(path, format=FORMAT, version=VERSION, schema=_About)
        if _digest(tensors) != about.fingerprint:
            raise ArtefactError(str(path), "its tensors are not those that were written; remove the folder")
        rows = [dict(zip(about.history, row, strict=True)) for row in tensors["history"].tolist()]
        return tensors, about, [{**row, "epoch": int(row["epoch"])} for row in rows]

    def _read_old(self) -> tuple[dict[str, Tensor], _About, list[dict[str, Any]]]:
        where, path = str(self.folder), self.folder / OLD_TENSORS_NAME
        record = parse_json(
            read_bytes(self.folder / OLD_STATE_NAME, where, ManifestError, 2**24), where, OLD_STATE_NAME
        )
        try:
            history, digest = record.pop("history"), record.pop("sha256")
            about = _About(**record, history=[], fingerprint=digest)
        except (AttributeError, KeyError, TypeError, ValidationError) as error:
            raise ManifestError(where, f"{OLD_STATE_NAME} is no checkpoint of a search") from error
        read_header(path, where, OLD_TENSORS_NAME)
        if sha256(path, where) != digest:
            raise ManifestError(where, f"{OLD_TENSORS_NAME} is not the one that {OLD_STATE_NAME} was written with")
        return read_tensors(path, None, where), about, history


@torch.no_grad()
def restore(parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
    """Copy values to parameters."""
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


def _digest(tensors: dict[str, Tensor]) -> str:
    return fingerprint(dict(sorted(tensors.items())))  # files have another order


def _numbered(tensors: dict[str, Tensor], prefix: str, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    return [tensors[f"{prefix}{i}"] for i in range(len(parameters))]
