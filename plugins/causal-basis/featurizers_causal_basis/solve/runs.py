"""`Run`: a folder that keeps the state of an extraction, so that it can be resumed."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from featurizers.errors import ArtefactError, UsageError, shown
from featurizers.format import read_json, read_state, write_json, write_state
from pydantic import BaseModel, ConfigDict
from torch import Tensor

TENSORS = ("vectors", "energies", "losers")
"""Names of the tensors in a layer's file."""
KEY = "about"
"""Name of the JSON in the metadata of a layer's file."""


@dataclass(frozen=True, eq=False)
class LayerState:
    """State of the search at a layer; the rest of the search depends on nothing else.

    Attributes:
        vectors: found so far, in the order of the search, ``(d, j)`` float64.
        energies: of each vector, ``(j)`` float64.
        losers: ends of abandoned ascents that the next step tries again, ``(d, m)`` float64.
        evaluations: of the energy so far.
        finished: True if the basis is complete.
        joint_energy: of all vectors at once, when finished.
    """

    vectors: Tensor
    energies: Tensor
    losers: Tensor
    evaluations: int = 0
    finished: bool = False
    joint_energy: float = 0.0

    @classmethod
    def empty(cls, d: int) -> LayerState:
        """Return the state before the first step."""
        none = torch.zeros(d, 0, dtype=torch.float64)
        return cls(none, torch.zeros(0, dtype=torch.float64), none)


class _About(BaseModel):
    """JSON beside the tensors of a layer."""

    model_config = ConfigDict(strict=True)
    activations_sha256: str
    evaluations: int
    finished: bool
    joint_energy: float


@final
class Run:
    """Folder of an extraction: ``run.json`` identifies it, and each layer has a file, replaced after each vector.

    Args:
        folder: where; made if it does not exist.
        identity: everything that the result depends on, but the layers and the activations.

    Raises:
        UsageError: the folder belongs to another extraction; the message names the differences.
        ArtefactError: its ``run.json`` cannot be read, or the folder cannot be made.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self._folder, path = folder, folder / "run.json"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            is_new, is_empty = not path.exists(), not any(folder.iterdir())
        except OSError as error:
            raise ArtefactError(str(folder), f"cannot be used as the folder of a run: {error.strerror}") from error
        if is_new and not is_empty:
            raise UsageError(f"{folder} has files that are of no extraction; give an empty folder or a new one")
        if is_new:
            write_json(path, identity)
            return
        before, now = read_json(path, expected="the options of an extraction"), json.loads(json.dumps(identity))
        if before != now:
            changed = [name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]
            changes = [f"{name} was {shown(before.get(name))} and is {shown(now.get(name))}" for name in changed]
            raise UsageError(
                f"{folder} belongs to another extraction: {'; '.join(changes)}. "
                "Give another folder, or the same options"
            )

    def read(self, layer: int, activations: str) -> LayerState | None:
        """Return the state of a layer with activations of this hash, None if it has none.

        Raises:
            UsageError: the state belongs to other activations.
            ArtefactError: the file is damaged.
        """
        path = self._file(layer)
        if not path.exists():
            return None
        try:
            tensors, about = read_state(path, format=None, schema=_About, key=KEY, expected="the state of a layer")
            if tensors.keys() != set(TENSORS):
                raise ArtefactError(str(path), f"it holds the tensors {', '.join(tensors)}, not {', '.join(TENSORS)}")
        except ArtefactError as error:
            raise ArtefactError(str(path), f"{error.problem}; delete it to search the layer again") from error
        if about.activations_sha256 != activations:
            raise UsageError(
                f"{self._folder} belongs to another extraction: the activations of layer {layer} have changed. "
                "Give another folder"
            )
        vectors, energies, losers = (tensors[name] for name in TENSORS)
        return LayerState(vectors, energies, losers, about.evaluations, about.finished, about.joint_energy)

    def write(self, layer: int, activations: str, state: LayerState) -> None:
        """Write the state of a layer. After a crash at any point, the old or the new file is intact."""
        about = _About(
            activations_sha256=activations,
            evaluations=state.evaluations,
            finished=state.finished,
            joint_energy=state.joint_energy,
        )
        tensors = {name: getattr(state, name) for name in TENSORS}
        write_state(self._file(layer), tensors, about.model_dump(), format=None, key=KEY)

    def _file(self, layer: int) -> Path:
        return self._folder / f"layer-{layer:03d}.safetensors"
