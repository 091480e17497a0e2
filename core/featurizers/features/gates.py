"""Gates: how far each feature is moved from the base to the source by a mask."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from featurizers.errors import UsageError


class SigmoidGate(nn.Module):
    """A trainable gate per feature: ``sigmoid(logits / temperature)``, or its rounding where ``hard``.

    Differential binary masking (De Cao et al. 2020, arXiv:2004.14992). Whether the gate is hard is a setting of
    its own and never follows ``.training``; the hard gate has no gradient.

    Args:
        n_features: number of features.
        temperature: divides the logits; towards 0 the gate becomes a step.
        hard: whether the gate is exactly 0 or 1: 1 where the logit is positive.
        tied: whether one logit stands for all features.

    Example:
        >>> gate = SigmoidGate(3, hard=True)
        >>> gate.logits.data = torch.tensor([2.0, -1.0, 0.0])
        >>> gate()
        tensor([1., 0., 0.])
    """

    def __init__(self, n_features: int, *, temperature: float = 1.0, hard: bool = False, tied: bool = False) -> None:
        super().__init__()
        self.n_features = n_features
        self.logits = nn.Parameter(torch.zeros(1 if tied else n_features))
        self.temperature = temperature
        self.hard = hard

    @property
    def temperature(self) -> float:
        """What the logits are divided by; positive and finite."""
        return self._temperature

    @temperature.setter
    def temperature(self, temperature: float | Tensor) -> None:
        temperature = float(temperature)
        if not 0 < temperature < float("inf"):
            raise UsageError(
                f"the temperature of a gate is positive and finite, not {temperature}; for a step use hard=True"
            )
        self._temperature = temperature

    def soft(self) -> Float[Tensor, " n_features"]:
        """``sigmoid(logits / temperature)``, whatever ``hard`` is."""
        return torch.sigmoid(self.logits / self.temperature).expand(self.n_features)

    def forward(self) -> Float[Tensor, " n_features"]:
        """The gate, between 0 (keep the base) and 1 (take the source)."""
        if not self.hard:
            return self.soft()
        return (self.logits > 0).to(self.logits.dtype).expand(self.n_features)

    def selected(self) -> Tensor:
        """Numbers of the features whose hard gate is 1, int64."""
        return (self.logits.detach() > 0).expand(self.n_features).nonzero().squeeze(-1)

    def sparsity_loss(self) -> Float[Tensor, ""]:
        """Sum of the soft gates: the expected number of features that are swapped."""
        return self.soft().sum()
