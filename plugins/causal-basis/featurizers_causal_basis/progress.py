"""`Progress`: how far an extraction is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True)
class Progress:
    """How far an extraction is: sent after each evaluation of the energy, and when a vector is found.

    Attributes:
        layer: that is worked on.
        layers_done: how many were finished before it.
        n_layers: how many are wanted.
        vector: number of the vector that is looked for, or was found, from 0.
        k: how many vectors are wanted.
        energy: of the evaluation, or of the vector that was found, nats per token.
        evaluations: of this layer so far.
        found: whether the vector was found.
    """

    layer: int
    layers_done: int
    n_layers: int
    vector: int
    k: int
    energy: float
    evaluations: int
    found: bool


Listener: TypeAlias = Callable[[Progress], None]
"""What is called with the progress, in every process."""
