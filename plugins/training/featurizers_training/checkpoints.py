"""Checkpoints: the state of a search after an epoch, from which it goes on to the same result."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
from featurizers import Featurizer
from featurizers.errors import ManifestError, UsageError
from featurizers.files import read_bytes, replacing, resolved
from featurizers.format import parse_json, read_header, read_tensors, sha256, write_tensors
from torch import Tensor, nn

STATE_NAME: Final = "checkpoint.json"
TENSORS_NAME: Final = "checkpoint.safetensors"


class Checkpoint:
    """The folder of a search's checkpoint; it is replaced as a whole after each epoch.

    Args:
        folder: holds the checkpoint, if there is one.
        identity: what the search is; a checkpoint of another one is refused.
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
        """Write the state.

        Raises:
            ArtefactError: the folder holds something else.
        """
        tensors = {f"search.{i}": parameter.detach() for i, parameter in enumerate(parameters)}
        numbers: dict[str, Any] = {}
        for i, state in optimizer.state_dict()["state"].items():
            for name, value in state.items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer.{i}.{name}"] = value
                else:
                    numbers[f"{i}.{name}"] = value
        if best is not None:
            tensors.update({f"best.{i}": tensor for i, tensor in enumerate(best["state"])})
        with replacing(self.folder, {STATE_NAME, TENSORS_NAME}.__contains__, self._check) as new:
            digest = write_tensors(tensors, new / TENSORS_NAME, str(self.folder))
            state = {
                "search": self.identity,
                "history": history,
                "best": best and {name: best[name] for name in ("epoch", "accuracy")},
                "optimizer": numbers,
                "scaler": scaler.state_dict(),
                "sha256": digest,
            }
            (new / STATE_NAME).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")

    def load(
        self, parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
    ) -> tuple[list[dict[str, Any]], dict[str, Any] | None] | None:
        """Set the state; returns the history and the best epoch, or None if there is no checkpoint.

        Raises:
            UsageError: it is of another search.
            ManifestError, WeightsError: it is damaged.
        """
        where = str(self.folder)
        if not (self.folder / STATE_NAME).exists():
            return None
        state = parse_json(read_bytes(self.folder / STATE_NAME, where, ManifestError, 2**24), where, STATE_NAME)
        if not isinstance(state, dict) or not isinstance(state.get("search"), dict):
            raise ManifestError(where, f"{STATE_NAME} is no checkpoint of a search")
        if differ := [key for key in self.identity if self.identity[key] != state["search"].get(key)]:
            raise UsageError(
                f"{where} holds a checkpoint of another search: its {', '.join(differ)} differ; name another folder"
            )
        path = self.folder / TENSORS_NAME
        read_header(path, where, TENSORS_NAME)
        if sha256(path, where) != state.get("sha256"):
            raise ManifestError(where, f"{TENSORS_NAME} is not the one that {STATE_NAME} was written with")
        tensors = read_tensors(path, None, where)
        put(parameters, _numbered(tensors, "search.", parameters))
        record = optimizer.state_dict()
        states: dict[int, dict[str, Any]] = {}
        for name, value in {**_part(tensors, "optimizer."), **state["optimizer"]}.items():
            number, _, key = name.partition(".")
            states.setdefault(int(number), {})[key] = value
        optimizer.load_state_dict({**record, "state": states})
        scaler.load_state_dict(state["scaler"])
        best = state["best"] and {**state["best"], "state": _numbered(tensors, "best.", parameters)}
        return state["history"], best

    def _check(self, folder: Path) -> None:
        if any(folder.iterdir()) and not (folder / STATE_NAME).exists():
            raise UsageError(f"{folder} holds something else than a checkpoint; name a new or an empty folder")


@torch.no_grad()
def put(parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
    """Give parameters the values that were kept of them."""
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


def fingerprint(featurizer: Featurizer[Any]) -> str:
    """SHA-256 of what a featurizer computes by: its kind, its config and its tensors."""
    found = hashlib.sha256(f"{featurizer.kind} {featurizer.config.model_dump_json()};".encode())
    for name, tensor in featurizer.state_dict().items():
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _numbered(tensors: dict[str, Tensor], prefix: str, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    return [tensors[f"{prefix}{i}"] for i in range(len(parameters))]


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
