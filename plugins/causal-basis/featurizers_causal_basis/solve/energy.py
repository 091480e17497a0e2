"""`Energy`: the objective of a causal basis at one layer, and `Tokens`, the activations that it averages over."""

from __future__ import annotations

import abc
from dataclasses import dataclass

import torch
from featurizers.errors import UsageError
from jaxtyping import Float
from torch import Tensor

from featurizers_causal_basis.inputs import derangement
from featurizers_causal_basis.record import Mode
from featurizers_causal_basis.solve.processes import Processes


@dataclass(frozen=True, eq=False)
class Tokens:
    """Activations of the selected tokens, and their differences from the values that ablation sets.

    Attributes:
        h: activations of this process, in the working dtype.
        deviation: h - m, where m is the mean over all tokens, zero, or another token.
        mean: over the tokens of all processes, float64 on the CPU.
        n: number of tokens of all processes.
        start: number of tokens in the processes before this one.
        processes: that share the tokens.
    """

    h: Float[Tensor, "n d"]
    deviation: Float[Tensor, "n d"]
    mean: Float[Tensor, " d"]
    n: int
    start: int
    processes: Processes

    @classmethod
    def of(cls, h: Float[Tensor, "n d"], mode: Mode, processes: Processes, seed: int) -> Tokens:
        """Return the tokens of this process. ``resample`` draws one derangement of the tokens of all processes.

        Raises:
            UsageError: there are too few tokens, or they are not finite.
        """
        counts = processes.all((len(h), bool(h.isfinite().all())))
        n, start = sum(count for count, _ in counts), sum(count for count, _ in counts[: processes.rank])
        if not all(finite for _, finite in counts):
            raise UsageError("the activations hold NaN or infinity; leave such tokens out with a mask")
        if n < (least := 1 if mode == "zero" else 2):
            raise UsageError(f"{mode} ablation needs {least} tokens or more, got {n}")
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
        """Return the activations with the span of orthonormal columns ablated."""
        columns = vectors.to(self.h)
        return self.h - (self.deviation @ columns) @ columns.mT


class Energy(abc.ABC):
    """Mean over tokens of KL(p(h) ‖ p(h - v vᵀ(h - m))) as a function of the unit vector v."""

    tokens: Tokens

    @abc.abstractmethod
    def value_and_grad(self, v: Float[Tensor, " d"]) -> tuple[float, Float[Tensor, " d"]]:
        """Return the energy of a unit vector, nats per token, and its gradient in v; float64 on the CPU in and out."""

    @abc.abstractmethod
    def direct(self, vectors: Float[Tensor, "d k"]) -> float:
        """Return the energy of ablating orthonormal columns together, by running the readout on ablated tokens."""

    @abc.abstractmethod
    def scores(self, uniform: Float[Tensor, " n"]) -> Float[Tensor, "n d"]:
        """Return ∇ log p(y | h) in h for each token of this process, at a y drawn from p(· | h) by a uniform number."""


def draw(log_p: Float[Tensor, "n vocabulary"], uniform: Float[Tensor, " n"]) -> Tensor:
    """Return one y per row, drawn with probability exp(log_p[y])."""
    cumulative = log_p.exp().cumsum(dim=-1)
    target = uniform.to(cumulative).unsqueeze(-1) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target).squeeze(-1).clamp_(max=log_p.shape[-1] - 1)
