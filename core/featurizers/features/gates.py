"""Gates: how far a mask moves each feature from the base to the source."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from featurizers.errors import UsageError


class SigmoidGate(nn.Module):
    """Trainable gate for each feature: ``sigmoid(logits / temperature)``, rounded to 0 or 1 where ``hard`` is set.

    Differential binary masking (De Cao et al. 2020, arXiv:2004.14992). ``hard`` is a setting of its own and does not
    follow ``.training``. The hard gate has no gradient.

    Args:
        n_features: number of features.
        temperature: divides the logits; the gate approaches a step as it approaches 0.
        hard: if True the gate is 1 where the logit is positive and 0 elsewhere.
        tied: if True all features share one logit.

    Examples:
        >>> gate = SigmoidGate(3, hard=True)
        >>> gate.logits.data = torch.tensor([2.0, -1.0, 0.0])
        >>> gate()
        tensor([1., 0., 0.])
    """

    def __init__(self, n_features: int, *, temperature: float = 1.0, hard: bool = False, tied: bool = False) -> None:
        super().__init__()
        self.n_features = n_features
        self.logits: nn.Parameter = nn.Parameter(torch.zeros(1 if tied else n_features))
        self.temperature = temperature
        self.hard = hard

    @property
    def temperature(self) -> float:
        """Positive, finite divisor of the logits."""
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
        """Return ``sigmoid(logits / temperature)``, whether or not ``hard`` is set."""
        return torch.sigmoid(self.logits / self.temperature).expand(self.n_features)

    def forward(self) -> Float[Tensor, " n_features"]:
        """Return the gate, between 0 (keep the base) and 1 (take the source)."""
        if not self.hard:
            return self.soft()
        return (self.logits > 0).to(self.logits.dtype).expand(self.n_features)

    def selected(self) -> Tensor:
        """Return the numbers of the features whose hard gate is 1, int64."""
        return (self.logits.detach() > 0).expand(self.n_features).nonzero().squeeze(-1)

    def sparsity_loss(self) -> Float[Tensor, ""]:
        """Return the sum of the soft gates: the expected number of swapped features."""
        return self.soft().sum()
