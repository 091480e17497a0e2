"""`DifferentiatedEnergy`: the energy and its gradient by autograd, through any readout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from featurizers_causal_basis.solve.energy import Energy, Tokens, draw


@final
class DifferentiatedEnergy(Energy):
    """Energy by running a readout on ablated tokens, one part of them at a time.

    Args:
        tokens: whose energy it is.
        parts: rows of the tokens that run together.
        log_probs: function from the activations of a part and its number to log-probabilities.
    """

    def __init__(self, tokens: Tokens, parts: Sequence[slice], log_probs: Callable[[Tensor, int], Tensor]) -> None:
        self.tokens = tokens
        self._parts, self._run = parts, log_probs
        with torch.no_grad():
            self._log_p = [log_probs(tokens.h[rows], number) for number, rows in enumerate(parts)]

    def value_and_grad(self, v: Float[Tensor, " d"]) -> tuple[float, Float[Tensor, " d"]]:
        """See `Energy.value_and_grad`."""
        tokens = self.tokens
        total = torch.zeros(1 + len(v), dtype=torch.float64)
        for number, rows in enumerate(self._parts):
            with torch.enable_grad():
                direction = v.to(tokens.h).requires_grad_()
                along = tokens.deviation[rows] @ direction
                ablated = tokens.h[rows] - along.unsqueeze(-1) * direction
                kl = self._divergence(number, self._run(ablated, number))
                (grad,) = torch.autograd.grad(kl.sum(), direction)
            total[0] += kl.detach().cpu().double().sum()
            total[1:] += grad.cpu().double()
        reduced = tokens.processes.sum(total) / tokens.n
        return float(reduced[0]), reduced[1:]

    @torch.no_grad()
    def direct(self, vectors: Float[Tensor, "d k"]) -> float:
        """See `Energy.direct`."""
        ablated = self.tokens.without(vectors)
        total = torch.zeros(1, dtype=torch.float64)
        for number, rows in enumerate(self._parts):
            total += self._divergence(number, self._run(ablated[rows], number)).cpu().double().sum()
        return float(self.tokens.processes.sum(total)) / self.tokens.n

    def scores(self, uniform: Float[Tensor, " n"]) -> Float[Tensor, "n d"]:
        """See `Energy.scores`. One backward pass; through a whole model, of all tokens' log-probabilities together."""
        scores = torch.empty_like(self.tokens.h)
        for number, rows in enumerate(self._parts):
            y = draw(self._log_p[number], uniform[rows])
            with torch.enable_grad():
                h = self.tokens.h[rows].clone().requires_grad_()
                log_p = self._run(h, number).gather(-1, y.unsqueeze(-1))
                (scores[rows],) = torch.autograd.grad(log_p.sum(), h)
        return scores

    def _divergence(self, number: int, log_q: Tensor) -> Tensor:
        """Return the KL of each row of a part."""
        log_p = self._log_p[number]
        return (log_p.exp() * (log_p - log_q)).sum(dim=-1)
