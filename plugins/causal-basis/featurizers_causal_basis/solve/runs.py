"""`Run`: a folder in which an extraction keeps what it has found, so that it can be gone on with."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import torch
from featurizers.errors import ArtefactError, UsageError, shown
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from featurizers_causal_basis.solve.processes import Processes

IDENTITY = "run.json"


@dataclass(frozen=True, eq=False)
class LayerState:
    """What is known of a layer's basis: all that the rest of the search depends on.

    Attributes:
        vectors: found so far, in the order of the search, ``(d, j)`` float64.
        energies: of each, ``(j)`` float64.
        losers: ends of given-up ascents that the next step tries again, ``(d, m)`` float64.
        evaluations: of the energy so far.
        finished: whether no more vectors are looked for.
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
        """Nothing found yet."""
        none = torch.zeros(d, 0, dtype=torch.float64)
        return cls(none, torch.zeros(0, dtype=torch.float64), none)


@final
@dataclass(frozen=True)
class Run:
    """The folder of an extraction. Process 0 alone reads and writes; the others are told.

    A file a layer, replaced whole after each vector, and ``run.json``, which says what the run is: a folder of another
    run is refused.

    Attributes:
        folder: where; None keeps nothing.
        identity: everything that the result depends on but the layers and the processes' number.
        processes: that work together.
    """

    folder: Path | None
    identity: dict[str, Any] = field(repr=False)
    processes: Processes

    def begin(self) -> None:
        """Make the folder, or check that it is of this run.

        Raises:
            UsageError: it is of a run that differs; the message names in what.
            ArtefactError: its ``run.json`` cannot be read, or the folder cannot be made.
        """
        if self.folder is None:
            return
        outcome: Exception | None = None
        if self.processes.rank == 0:
            try:
                self._begin(self.folder)
            except (UsageError, ArtefactError) as error:
                outcome = error
        told = self.processes.first(None if outcome is None else (type(outcome).__name__, str(outcome)))
        if outcome is not None:
            raise outcome
        if told is not None:
            raise UsageError(f"process 0 refuses: {told[1]}")

    def read(self, layer: int, activations: str) -> LayerState | None:
        """What is known of a layer, None if nothing.

        Raises:
            UsageError: it was found with other activations than those whose hash is given.
            ArtefactError: the file is damaged.
        """
        if self.folder is None:
            return None
        known: LayerState | None = None
        problem: tuple[str, str] | None = None
        if self.processes.rank == 0:
            try:
                known = self._read(self._file(layer), layer, activations)
            except (UsageError, ArtefactError) as error:
                problem = type(error).__name__, str(error)
        known, problem = self.processes.first((known, problem))
        if problem is not None:
            raise (
                UsageError(problem[1]) if problem[0] == "UsageError" else ArtefactError(str(self.folder), problem[1])
            )
        return known

    def write(self, layer: int, activations: str, state: LayerState) -> None:
        """Keep what is known of a layer: the file is replaced whole, so that a kill leaves the one or the other."""
        if self.folder is None or self.processes.rank != 0:
            return
        about = {
            "activations_sha256": activations,
            "evaluations": state.evaluations,
            "finished": state.finished,
            "joint_energy": state.joint_energy,
        }
        tensors = {name: getattr(state, name).contiguous() for name in ("vectors", "energies", "losers")}
        _replace(self._file(layer), save(tensors, metadata={"about": json.dumps(about)}))

    def _begin(self, folder: Path) -> None:
        path = folder / IDENTITY
        try:
            folder.mkdir(parents=True, exist_ok=True)
            before = path.read_bytes() if path.exists() else None
        except OSError as error:
            raise ArtefactError(str(folder), f"cannot be used as the folder of a run: {error.strerror}") from error
        if before is None:
            if any(folder.iterdir()):
                raise UsageError(
                    f"{folder} has files in it that are of no extraction; give an empty folder or a new one"
                )
            _replace(path, json.dumps(self.identity, indent=2, sort_keys=True).encode())
            return
        try:
            known = json.loads(before)
        except ValueError as error:
            raise ArtefactError(str(folder), f"{IDENTITY} cannot be read: {error}") from error
        mine = json.loads(json.dumps(self.identity))
        if not isinstance(known, dict):
            raise ArtefactError(str(folder), f"{IDENTITY} is not of an extraction")
        if known != mine:
            names = [name for name in sorted(known.keys() | mine.keys()) if known.get(name) != mine.get(name)]
            differences = "; ".join(
                f"{name} was {shown(known.get(name))} and is {shown(mine.get(name))}" for name in names
            )
            raise UsageError(
                f"{folder} is of another extraction: {differences}. Give another folder, or the same options"
            )

    def _file(self, layer: int) -> Path:
        folder = self.folder or Path()  # the callers looked
        return folder / f"layer-{layer:03d}.safetensors"

    def _read(self, path: Path, layer: int, activations: str) -> LayerState | None:
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                about = json.loads(file.metadata()["about"])
                vectors, energies, losers = (file.get_tensor(name) for name in ("vectors", "energies", "losers"))
            state = LayerState(
                vectors,
                energies,
                losers,
                int(about["evaluations"]),
                bool(about["finished"]),
                float(about["joint_energy"]),
            )
            known = about["activations_sha256"]
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise ArtefactError(
                path.name, f"cannot be read ({error}); delete it, and the layer is begun again"
            ) from error
        if known != activations:
            raise UsageError(
                f"{self.folder} is of another extraction: the activations of layer {layer} were others. "
                "Give another folder"
            )
        return state


def _replace(path: Path, contents: bytes) -> None:
    new = path.with_name(f".{path.name}.{os.getpid()}")
    new.write_bytes(contents)
    os.replace(new, path)
