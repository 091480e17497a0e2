"""The search for the direction of the greatest energy outside those that were found before."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from featurizers_causal_basis.candidates import outside
from featurizers_causal_basis.energy import Energy
from featurizers_causal_basis.presets import Preset

Notify = Callable[[float], None]
"""Called after each evaluation with its energy."""

SHORT = 1e-3
"""A candidate with less of itself outside the earlier vectors is none."""


@dataclass(frozen=True, eq=False)
class Found:
    """What a search came to.

    Attributes:
        vector: the best unit vector, float64 on the CPU.
        losers: ends of the ascents that were given up, the best first.
        evaluations: how often the energy and its gradient were computed.
    """

    vector: Float[Tensor, " d"]
    losers: tuple[Float[Tensor, " d"], ...]
    evaluations: int


def search(
    energy: Energy,
    earlier: Float[Tensor, "d j"],
    starts: Sequence[Float[Tensor, " d"]],
    preset: Preset,
    max_iter: int,
    notify: Notify,
) -> Found:
    """The unit vector outside the earlier ones that ascents from several starts come to, by successive halving.

    All starts are given some iterations, those with the lowest energies are given up, the rest go on; the last one
    converges. Nothing is random here: equal arguments give equal bits.
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
    return Found(best.vector, tuple(ascent.vector for ascent in lost), sum(ascent.evaluations for ascent in tried))


def _usable(starts: Sequence[Tensor], earlier: Tensor) -> list[Tensor]:
    """Unit vectors outside the earlier ones; if there are none, that unit axis which is most outside."""
    rest = [outside(start, earlier) for start in starts]
    usable = [v / v.norm() for v in rest if float(v.norm()) > SHORT and bool(v.isfinite().all())]
    if usable:
        return usable
    axes = outside(torch.eye(len(earlier), dtype=earlier.dtype), earlier)
    axis = axes[:, int(axes.norm(dim=0).argmax())]
    return [axis / axis.norm()]


@final
class _Ascent:
    """One ascent by L-BFGS, which can be stopped and gone on with.

    The variable is any vector; the energy is that of its direction outside the earlier vectors.
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
        """The unit vector of the accepted point."""
        return self._direction(self._x.detach())[0]

    @property
    def value(self) -> float:
        """Energy of the accepted point, which is not always the last that was evaluated."""
        return self._evaluate()[0]

    def run(self, iterations: int) -> None:
        """Go on for so many iterations, or until converged."""
        if iterations > 0:
            group = self._optimizer.param_groups[0]
            group["max_iter"], group["max_eval"] = iterations, iterations * 5 // 4 + 1
            self._optimizer.step(self._closure)  # type: ignore[no-untyped-call]
            kept = self._evaluate()
            self._known = {self._key(): kept}

    def repeat(self, max_iter: int) -> None:
        """Ascents of so many iterations until there were as many evaluations, or the last two hardly differ."""
        while self.calls < max_iter:
            self.run(max_iter)
            with torch.no_grad():
                self._x.copy_(self.vector)
            if abs(self._last[1] - self._last[0]) < 1e-4 * abs(self._last[1]):
                break

    def _direction(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The unit vector of a point, and the length that it had."""
        rest = outside(x, self._earlier)
        length = rest.norm()
        return rest / length, length

    def _key(self) -> bytes:
        return self._x.detach().numpy().tobytes()

    def _evaluate(self) -> tuple[float, Tensor]:
        """The energy, and its gradient in the variable."""
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
