"""Search for the direction of greatest energy orthogonal to the earlier ones, and its presets."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeAlias, final

import torch
from featurizers.errors import UsageError
from jaxtyping import Float
from torch import Tensor

from featurizers_causal_basis.solve.candidates import ALIKE, outside
from featurizers_causal_basis.solve.energy import Energy

Notify: TypeAlias = Callable[[float], None]
"""Called after each evaluation with its energy."""

SHORT = 1e-3
"""Reject a start whose component orthogonal to the earlier vectors has a norm below this."""


@dataclass(frozen=True)
class Preset:
    """A schedule of ascents by L-BFGS with a strong Wolfe line search.

    Attributes:
        name: of the preset.
        restarts: random starts of the power iteration that proposes candidates; 0 for no power iteration.
        picked: how many of its maxima become candidates.
        singular: whether the next singular vector of the unembedding, or the next unit axis, is a candidate.
        axes: whether to use a unit axis even if the unembedding is known.
        losers: how many candidates that lost at the previous step are tried again.
        rounds: for each round, iterations per candidate and number of candidates kept; the last candidate then
            converges.
        logarithm: whether to ascend log E, so that tolerances are of relative changes.
        tolerance_grad: an ascent ends where no entry of the gradient is larger.
        tolerance_change: or where a step, or its effect, is smaller.
        repeats: whether to restart a finished ascent until the energy changes by a fraction of less than 1e-4.
        published: whether to run for the first vector also the ascents of ``reference`` and ``reference-axes``, and to
            take the best, so that its energy is at least as high. Later vectors have no such bound: they depend on the
            vectors before them.
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
    published: bool = False

    @classmethod
    def named(cls, name: str) -> Preset:
        """Return the preset of a name.

        Raises:
            UsageError: no preset has the name.
        """
        if name not in PRESETS:
            raise UsageError(f"there is no preset {name!r}; there are {', '.join(PRESETS)}")
        return PRESETS[name]

    def record(self) -> dict[str, Any]:
        """Return all fields but the name, for `BasisRecord.solver`."""
        numbers = asdict(self)
        numbers["rounds"] = ", ".join(f"{iterations} iterations keep {keep}" for iterations, keep in self.rounds)
        return {name: value for name, value in numbers.items() if name != "name"}


PRESETS = {
    preset.name: preset
    for preset in (
        Preset("multi", restarts=24, picked=2, losers=1, rounds=((6, 2), (10, 1)), published=True),
        Preset("fast", restarts=24, picked=1, singular=False),
        Preset("reference", logarithm=False, tolerance_grad=1e-7, tolerance_change=1e-9, repeats=True),
        Preset("reference-axes", axes=True, logarithm=False, tolerance_grad=1e-7, tolerance_change=1.2e-7),
    )
}
"""Presets by name: ``multi`` tries several starts, for the first vector also those of ``reference`` and
``reference-axes``; ``fast`` tries one start, and may lose a tenth of a layer's energy; ``reference`` is the schedule of
tuned-lens 0.2.0, ``reference-axes`` that of the first published code."""


@dataclass(frozen=True, eq=False)
class SearchResult:
    """Result of one search.

    Attributes:
        vector: best unit vector, float64 on the CPU.
        losers: ends of the ascents that were given up, the best first.
        evaluations: number of evaluations of the energy and its gradient.
    """

    vector: Float[Tensor, " d"]
    losers: tuple[Float[Tensor, " d"], ...]
    evaluations: int

    def or_better(self, other: SearchResult, energy: Energy) -> SearchResult:
        """Return the other result if its energy is higher, with this vector as a loser if it differs; else this one."""
        evaluations = self.evaluations + other.evaluations
        if energy.direct(other.column) <= energy.direct(self.column):
            return replace(self, evaluations=evaluations)
        differs = abs(float(self.vector @ other.vector)) < ALIKE
        losers = (self.vector, *self.losers) if differs else self.losers
        return SearchResult(other.vector, losers, evaluations)

    @property
    def column(self) -> Float[Tensor, "d 1"]:
        """Return the vector as a matrix with one column."""
        return self.vector.unsqueeze(-1)


def search(
    energy: Energy,
    earlier: Float[Tensor, "d j"],
    starts: Sequence[Float[Tensor, " d"]],
    preset: Preset,
    max_iter: int,
    notify: Notify,
) -> SearchResult:
    """Maximise the energy over unit vectors orthogonal to the earlier ones, by successive halving of several ascents.

    All ascents run some iterations, those with the lowest energies are given up, and the last one converges. Nothing
    is random: equal arguments give equal bits.
    """
    ascents = [_Ascent(energy, earlier, start, preset, notify) for start in _usable(starts, earlier)]
    tried = list(ascents)
    lost: list[_Ascent] = []
    done = 0
    for iterations, keep in preset.rounds:
        if len(ascents) > keep:
            for ascent in ascents:
                ascent.run(min(iterations, max_iter - done))
            ascents.sort(key=lambda ascent: -ascent.value)
            lost = ascents[keep:] + lost
            ascents = ascents[:keep]
            done = min(max_iter, done + iterations)
    best = ascents[0]
    if preset.repeats:
        best.repeat(max_iter)
    else:
        best.run(max_iter - done)
    evaluations = sum(ascent.evaluations for ascent in tried)
    return SearchResult(best.vector, tuple(ascent.vector for ascent in lost), evaluations)


def _usable(starts: Sequence[Tensor], earlier: Tensor) -> list[Tensor]:
    """Return the starts as unit vectors orthogonal to the earlier ones; if none is left, the most orthogonal axis."""
    rest = [outside(start, earlier) for start in starts]
    usable = [v / v.norm() for v in rest if float(v.norm()) > SHORT and bool(v.isfinite().all())]
    if usable:
        return usable
    axes = outside(torch.eye(len(earlier), dtype=earlier.dtype), earlier)
    axis = axes[:, int(axes.norm(dim=0).argmax())]
    return [axis / axis.norm()]


@final
class _Ascent:
    """Ascent by L-BFGS that can be paused and continued.

    The variable is any vector; its value is the energy of its direction orthogonal to the earlier vectors.
    """

    def __init__(self, energy: Energy, earlier: Tensor, start: Tensor, preset: Preset, notify: Notify) -> None:
        self._energy, self._earlier, self._preset, self._notify = energy, earlier, preset, notify
        self._floor = torch.finfo(energy.tokens.h.dtype).eps
        self._x = start.clone().requires_grad_()
        self._optimizer = torch.optim.LBFGS(
            [self._x],
            line_search_fn="strong_wolfe",
            tolerance_grad=preset.tolerance_grad,
            tolerance_change=preset.tolerance_change,
        )
        self._known: dict[bytes, tuple[float, Tensor]] = {}
        self._last = 0.0, 0.0
        self.evaluations = 0
        self.calls = 0

    @property
    def vector(self) -> Tensor:
        """Unit vector of the accepted point."""
        return self._direction(self._x.detach())[0]

    @property
    def value(self) -> float:
        """Energy of the accepted point, which is not always the last one evaluated."""
        return self._evaluate()[0]

    def run(self, iterations: int) -> None:
        """Run a number of iterations, fewer on convergence."""
        if iterations > 0:
            group = self._optimizer.param_groups[0]
            group["max_iter"], group["max_eval"] = iterations, iterations * 5 // 4 + 1
            self._optimizer.step(self._closure)  # type: ignore[no-untyped-call]
            kept = self._evaluate()
            self._known = {self._key(): kept}

    def repeat(self, max_iter: int) -> None:
        """Run ascents of ``max_iter`` iterations until there were as many evaluations, or the energy hardly changes."""
        while self.calls < max_iter:
            self.run(max_iter)
            with torch.no_grad():
                self._x.copy_(self.vector)
            if abs(self._last[1] - self._last[0]) < 1e-4 * abs(self._last[1]):
                break

    def _direction(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the unit vector of a point, and its norm before normalisation."""
        rest = outside(x, self._earlier)
        length = rest.norm()
        return rest / length, length

    def _key(self) -> bytes:
        return self._x.detach().numpy().tobytes()

    def _evaluate(self) -> tuple[float, Tensor]:
        """Return the energy and its gradient in the variable."""
        key = self._key()
        if key not in self._known:
            v, length = self._direction(self._x.detach())
            value, grad = self._energy.value_and_grad(v)
            self.evaluations += 1
            self._notify(value)
            if not (math.isfinite(value) and bool(grad.isfinite().all())):
                value, grad = 0.0, torch.zeros_like(v)
            self._known[key] = value, outside(grad - (grad @ v) * v, self._earlier) / length
        return self._known[key]

    def _closure(self) -> float:
        self.calls += 1
        value, grad = self._evaluate()
        self._last = self._last[1], value
        if not self._preset.logarithm:
            self._x.grad = -grad
            return -value
        raised = max(value, 0.0) + self._floor
        self._x.grad = -grad / raised
        return -math.log(raised)
