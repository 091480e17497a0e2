"""`Energy`: the objective of a causal basis at one layer, and the tokens that it is of."""

from __future__ import annotations

import abc
from dataclasses import dataclass

import torch
from featurizers.errors import UsageError
from jaxtyping import Float
from torch import Tensor

from featurizers_causal_basis.derangement import derangement
from featurizers_causal_basis.record import Mode
from featurizers_causal_basis.reduction import Processes


@dataclass(frozen=True, eq=False)
class Tokens:
    """The activations that take part, and what a direction of them is ablated to.

    Attributes:
        h: activations of this process, in the working dtype.
        deviation: h - m, where m is the mean over all tokens, zero, or another token.
        mean: over all tokens of all processes, float64 on the CPU.
        n: tokens of all processes.
        start: how many tokens the processes before this one hold.
        processes: that hold the tokens.
    """

    h: Float[Tensor, "n d"]
    deviation: Float[Tensor, "n d"]
    mean: Float[Tensor, " d"]
    n: int
    start: int
    processes: Processes

    @classmethod
    def of(cls, h: Float[Tensor, "n d"], mode: Mode, processes: Processes, seed: int) -> Tokens:
        """The tokens of this process; a derangement, if the mode needs one, is drawn once, over all processes.

        Raises:
            UsageError: the tokens are too few, or not finite.
        """
        counts = processes.all((len(h), bool(h.isfinite().all())))
        n, start = sum(count for count, _ in counts), sum(count for count, _ in counts[: processes.rank])
        if not all(finite for _, finite in counts):
            raise UsageError("the activations hold NaN or infinity; leave such tokens out with a mask")
        if n < (1 if mode == "zero" else 2):
            raise UsageError(f"{mode} ablation takes {1 if mode == 'zero' else 2} tokens or more, and {n} take part")
        h = h.to(torch.promote_types(h.dtype, torch.float32))
        mean = processes.sum(h.double().sum(dim=0) if h.device.type != "mps" else h.sum(dim=0)) / n
        if mode == "mean":
            deviation = h - mean.to(h)
        elif mode == "zero":
            deviation = h
        else:
            rows, start = processes.rows(h)
            order = derangement(n, torch.Generator().manual_seed(seed)).to(h.device)
            deviation = h - rows[order[start : start + len(h)]]
        return cls(h, deviation, mean, n, start, processes)

    def without(self, vectors: Float[Tensor, "d k"]) -> Float[Tensor, "n d"]:
        """The activations with what orthonormal columns span ablated."""
        columns = vectors.to(self.h)
        return self.h - (self.deviation @ columns) @ columns.mT


class Energy(abc.ABC):
    """The mean over tokens of KL(p(h) ‖ p(h - v vᵀ(h - m))) as a function of the unit vector v."""

    tokens: Tokens

    @abc.abstractmethod
    def value_and_grad(self, v: Float[Tensor, " d"]) -> tuple[float, Float[Tensor, " d"]]:
        """The energy of a unit vector, nats per token, and its gradient in v; float64 on the CPU in and out."""

    @abc.abstractmethod
    def direct(self, vectors: Float[Tensor, "d k"]) -> float:
        """The energy of ablating orthonormal columns together, by running the readout on the ablated tokens."""

    @abc.abstractmethod
    def scores(self, uniform: Float[Tensor, " n"]) -> Float[Tensor, "n d"]:
        """∇ log p(y | h) in h of each token of this process, at a y drawn from p(· | h) by a uniform number."""


def draw(log_p: Float[Tensor, "n vocabulary"], uniform: Float[Tensor, " n"]) -> Tensor:
    """One y a row with probability exp(log_p[y])."""
    cumulative = log_p.exp().cumsum(dim=-1)
    target = uniform.to(cumulative).unsqueeze(-1) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target).squeeze(-1).clamp_(max=log_p.shape[-1] - 1)
