"""`ExtractionOptions`, the checked options of an extraction, and `Progress`, which it reports."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, get_args

from featurizers.errors import UsageError
from featurizers.format import Side
from jaxtyping import Bool, Int
from torch import Tensor

from featurizers_causal_basis.featurizer import SITES
from featurizers_causal_basis.record import Mode
from featurizers_causal_basis.solve.solver import Preset

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Progress:
    """State of an extraction, reported after each evaluation of the energy and when a vector is found.

    Attributes:
        layer: current layer.
        layers_done: number of layers finished before it.
        n_layers: number of layers in all.
        vector: number of the vector that is searched for, or was found, from 0.
        k: vectors per layer.
        energy: of the evaluation, or of the vector that was found, nats per token.
        evaluations: in this layer so far.
        found: True if the vector was found.
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
"""Receives the progress, in every process."""


@dataclass(frozen=True, eq=False, kw_only=True)
class ExtractionOptions:
    """Options of an extraction; `extract_causal_bases` describes them.

    Raises:
        UsageError: an option is out of range.
    """

    k: int
    max_iter: int = 100
    min_energy: float = 0.0
    mode: Mode = "mean"
    layers: Iterable[int] | None = None
    mask: Bool[Tensor, "*tokens"] | Int[Tensor, "*tokens"] | None = None
    side: Side = "input"
    preset: str = "multi"
    seed: int = 0
    group: ProcessGroup | None = None
    progress: Listener | None = None
    resume: str | Path | None = None
    batch_size: int = 8
    mask_rule: str | None = None
    model_id: str | None = None
    model_revision: str | None = None

    def __post_init__(self) -> None:
        """Check the options."""
        for name, least in (("k", 1), ("max_iter", 1), ("batch_size", 1), ("seed", 0)):
            number = getattr(self, name)
            if isinstance(number, bool) or not isinstance(number, int) or number < least:
                raise UsageError(f"{name} is a whole number from {least}, not {number!r}")
        if self.mode not in get_args(Mode) or self.side not in SITES:
            raise UsageError(
                f"mode is one of {', '.join(get_args(Mode))} and side is input or output, not {self.mode!r} and "
                f"{self.side!r}"
            )
        if not 0 <= self.min_energy < float("inf"):
            raise UsageError(f"min_energy is a number of nats per token from 0, not {self.min_energy!r}")
        Preset.named(self.preset)

    @property
    def schedule(self) -> Preset:
        """Preset of the solver."""
        return Preset.named(self.preset)
