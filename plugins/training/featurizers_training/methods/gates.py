"""`BoundaryGate`: takes the first features, up to a learned boundary."""

from __future__ import annotations

import torch
from featurizers.errors import UsageError
from jaxtyping import Float
from torch import Tensor, nn


class BoundaryGate(nn.Module):
    """A gate that takes the features before a trainable boundary: ``sigmoid((b n - i - 1/2) / temperature)``.

    This is the gate of feature i (from 0) of n, with the boundary at the share b of the features, as in boundless DAS,
    Wu et al. 2023 (arXiv:2305.08809). If ``hard`` is set, it is exactly 1 before the boundary and 0 after it.

    Args:
        n_features: number of features.
        share: of the features that are within the boundary at first.
        temperature: in features; towards 0 the gate becomes a step.

    Examples:
        >>> gate = BoundaryGate(4, share=0.5, temperature=1.0)
        >>> gate.selected()
        tensor([0, 1])
    """

    def __init__(self, n_features: int, share: float = 0.5, temperature: float = 50.0) -> None:
        super().__init__()
        self.n_features = n_features
        self.boundary = nn.Parameter(torch.tensor([float(share)]))
        self.temperature = temperature
        self.hard = False

    @property
    def temperature(self) -> float:
        """Divisor of the distances from the boundary; positive."""
        return self._temperature

    @temperature.setter
    def temperature(self, temperature: float) -> None:
        if not temperature > 0:
            raise UsageError(f"the temperature of a gate is positive, not {temperature}; for a step use hard=True")
        self._temperature = float(temperature)

    def forward(self) -> Float[Tensor, " n_features"]:
        """Return the gate, between 0 (keep the base) and 1 (take the source)."""
        numbers = torch.arange(self.n_features, device=self.boundary.device)
        inside = self.boundary * self.n_features - numbers - 0.5
        return (inside > 0).to(inside.dtype) if self.hard else torch.sigmoid(inside / self.temperature)

    def selected(self) -> Tensor:
        """Return the numbers of the features before the boundary, int64."""
        count = (self.boundary.detach() * self.n_features - 0.5).ceil().clamp(0, self.n_features)
        return torch.arange(int(count), device=self.boundary.device)

    def sparsity_loss(self) -> Tensor:
        """Return the share of the features before the boundary."""
        return self.boundary.squeeze()
