"""`Run`: a folder that keeps the state of an extraction, so that it can be resumed."""

from __future__ import annotations

import json
import os
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, final

import torch
from featurizers.errors import ArtefactError, UsageError, shown
from featurizers.files import LOCK_NAME, contained, locked
from featurizers.format import is_unfinished, read_json, read_state, write_json, write_state
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from featurizers_causal_basis.record import Count, Finite

TENSORS = ("vectors", "energies", "losers")
"""Names of the tensors in a layer's file."""
RUN_NAME: Final = "run.json"
KEY = "about"
"""Name of the JSON in the metadata of a layer's file."""
TOLERANCE: Final = 1e-6
"""Largest deviation of stored vectors from orthonormality."""


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

    model_config = ConfigDict(strict=True, extra="forbid")

    activations_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    evaluations: Count
    finished: bool
    joint_energy: Finite


@final
class Run:
    """Folder of an extraction: ``run.json`` identifies it, and each layer has a file, replaced after each vector.

    The folder is locked against other programs until `close`.

    Args:
        folder: where; made if it does not exist.
        identity: everything that the result depends on, but the layers and the activations.

    Raises:
        UsageError: the folder belongs to another extraction; the message names the differences.
        ArtefactError: another program uses it, its ``run.json`` cannot be read, or the folder cannot be made.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self._folder, self._lock = folder, ExitStack()
        self._names()  # before anything is written to it
        with ExitStack() as stack:
            stack.enter_context(locked(folder))
            self._open(identity)
            self._lock = stack.pop_all()

    def close(self) -> None:
        """Let other programs use the folder."""
        self._lock.close()

    def _names(self) -> set[str]:
        """Return the names in the folder, which are those of a run or none."""
        folder = self._folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            present = {each.name for each in folder.iterdir() if not is_unfinished(each)} - {LOCK_NAME}
        except OSError as error:
            raise ArtefactError(str(folder), f"cannot be used as the folder of a run: {error.strerror}") from error
        if present and RUN_NAME not in present:
            raise UsageError(f"{folder} has files that are of no extraction; give an empty folder or a new one")
        return present

    def _open(self, identity: dict[str, Any]) -> None:
        """Write ``run.json`` to an empty folder, or compare the one that is there."""
        folder, path = self._folder, self._folder / RUN_NAME
        if not self._names():
            write_json(path, identity)
            return
        contained(folder, path, str(folder), ArtefactError)
        before, now = read_json(path, expected="the options of an extraction"), json.loads(json.dumps(identity))
        if before != now:
            changed = [name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]
            changes = [f"{name} was {shown(before.get(name))} and is {shown(now.get(name))}" for name in changed]
            raise UsageError(
                f"{folder} belongs to another extraction: {'; '.join(changes)}. "
                "Give another folder, or the same options"
            )

    def read(self, layer: int, activations: str, d: int, k: int, losers: int) -> LayerState | None:
        """Return the state of a layer, None if it has none.

        Args:
            layer: number of the layer.
            activations: hash of its activations.
            d: their width.
            k: most vectors of a basis.
            losers: most losers that a search keeps.

        Raises:
            UsageError: the state belongs to other activations.
            ArtefactError: the file is damaged, or is not of such a search.
        """
        path = self._file(layer)
        if not os.path.lexists(path):
            return None
        try:
            contained(self._folder, path, str(path), ArtefactError)
            tensors, about = read_state(path, format=None, schema=_About, key=KEY, expected="the state of a layer")
            if tensors.keys() != set(TENSORS):
                names = ", ".join(map(shown, list(tensors)[:5]))
                raise ArtefactError(str(path), f"it holds the tensors {names}, not {', '.join(TENSORS)}")
            vectors, energies, others = (tensors[name] for name in TENSORS)
            state = LayerState(vectors, energies, others, about.evaluations, about.finished, about.joint_energy)
            if about.activations_sha256 == activations and (problem := _problem(state, d, k, losers)):
                raise ArtefactError(str(path), problem)
        except ArtefactError as error:
            raise ArtefactError(str(path), f"{error.problem}; delete it to search the layer again") from error
        if about.activations_sha256 != activations:
            raise UsageError(
                f"{self._folder} belongs to another extraction: the activations of layer {layer} have changed. "
                "Give another folder"
            )
        return state

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


def _problem(state: LayerState, d: int, k: int, losers: int) -> str | None:
    """Return what no search of ``k`` vectors of width ``d`` leaves in a state; None if there is nothing."""
    vectors, energies, others = state.vectors, state.energies, state.losers
    found = energies.numel()
    for name, tensor, shape, most in (
        ("vectors", vectors, (d, found), k),
        ("energies", energies, (found,), k),
        ("losers", others, (d, others.shape[-1] if others.dim() else 0), losers),
    ):
        if tensor.dtype != torch.float64 or tensor.shape != shape or shape[-1] > most:
            wanted = f"float64, {d} wide and at most {most}" if tensor.dim() > 1 else f"float64 and at most {most}"
            return f"its {name} are {tensor.dtype} {tuple(tensor.shape)}; a search leaves {wanted}"
        if not tensor.isfinite().all():
            return f"its {name} hold NaN or infinity"
    if ((vectors.mT @ vectors - torch.eye(found, dtype=torch.float64)).abs() > TOLERANCE).any():
        return "its vectors are not orthonormal"
    if ((others.norm(dim=0) - 1).abs() > TOLERANCE).any():
        return "its losers are no unit vectors"
    return "it has all vectors, but says that it is not finished" if found == k and not state.finished else None
