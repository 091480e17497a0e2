"""`Preset`: how hard the best direction is looked for."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from featurizers.errors import UsageError


@dataclass(frozen=True)
class Preset:
    """A schedule of ascents by L-BFGS with a strong Wolfe line search.

    Attributes:
        name: of the preset.
        restarts: power iterations that candidates are picked from; 0 for none.
        picked: how many of their ends become candidates.
        singular: whether the next singular vector of the unembedding, or the next unit axis, is a candidate.
        axes: whether that is a unit axis in any case.
        losers: how many of the candidates that lost at the step before are tried again.
        rounds: iterations of each candidate in a round, and how many stay after it; the one that is left then
            converges.
        logarithm: whether log E is ascended, which makes the tolerance one of relative change.
        tolerance_grad: the ascent ends where no part of the gradient is larger.
        tolerance_change: or where a step, or its effect, is smaller.
        repeats: whether an ascent that ended is begun again until the energy changes by less than 1e-4 of itself.
    """

    name: str
    restarts: int = 0
    picked: int = 0
    singular: bool = True
    axes: bool = False
    losers: int = 0
    rounds: tuple[tuple[int, int], ...] = ()
    logarithm: bool = True
    tolerance_grad: float = 1e-3
    tolerance_change: float = 1e-7
    repeats: bool = False

    def record(self) -> dict[str, Any]:
        """The numbers, for `BasisRecord.solver`."""
        numbers = asdict(self)
        numbers["rounds"] = ", ".join(f"{iterations} iterations keep {keep}" for iterations, keep in self.rounds)
        return {name: value for name, value in numbers.items() if name != "name"}


PRESETS = {
    preset.name: preset
    for preset in (
        Preset("multi", restarts=24, picked=2, losers=1, rounds=((6, 2), (10, 1))),
        Preset("fast", restarts=24, picked=1, singular=False),
        Preset("reference", logarithm=False, tolerance_grad=1e-7, tolerance_change=1e-9, repeats=True),
        Preset("reference-axes", axes=True, logarithm=False, tolerance_grad=1e-7, tolerance_change=1.2e-7),
    )
}
"""The presets by name: ``multi`` tries several starts; ``fast`` one, and may lose a tenth of a layer's energy;
``reference`` is the schedule of tuned-lens 0.2.0, ``reference-axes`` that of the first published code."""


def preset_of(name: str) -> Preset:
    """The preset of a name.

    Raises:
        UsageError: there is none.
    """
    if name not in PRESETS:
        raise UsageError(f"there is no preset {name!r}; there are {', '.join(PRESETS)}")
    return PRESETS[name]
