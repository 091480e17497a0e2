"""`FlowFeaturizer`: an invertible map by affine coupling layers, whose features are not linear in the activations."""

from __future__ import annotations

from typing import Annotated, Self

import torch
from featurizers import Error, Featurizer
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn


class FlowConfig(BaseModel):
    """What `config.json` says of the kind; `featurizers.create` takes these arguments.

    Attributes:
        d_in: width of the activations.
        layers: number of coupling layers; each changes one half of the coordinates by what the other half says.
        hidden: width of the network in each layer.
        seed: of the first weights.
    """

    model_config = ConfigDict(strict=True, extra="forbid")

    d_in: Annotated[int, Field(ge=2, le=2**16)]
    layers: Annotated[int, Field(ge=1, le=64)] = 4
    hidden: Annotated[int, Field(ge=1, le=2**14)] = 16
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0


class Coupling(nn.Module):
    """One layer: (a, b) becomes (a, b · exp(s(a)) + t(a)), with s between -1 and 1.

    Source: Dinh et al. 2017, "Density estimation using Real NVP", arXiv 1605.08803, section 3.2.
    """

    def __init__(self, kept: int, changed: int, hidden: int, generator: torch.Generator) -> None:
        super().__init__()
        self.inner = nn.Parameter(torch.randn(hidden, kept, generator=generator) / kept**0.5)
        self.bias = nn.Parameter(torch.zeros(hidden))
        self.outer = nn.Parameter(torch.zeros(2 * changed, hidden))  # the identity at first

    def forward(self, a: Tensor) -> tuple[Tensor, Tensor]:
        """Return s and t, each ``(*batch, changed)``, of the half that is kept."""
        s, t = (torch.tanh(a @ self.inner.mT + self.bias) @ self.outer.mT).chunk(2, dim=-1)
        return torch.tanh(s), t


class FlowFeaturizer(Featurizer[FlowConfig]):
    """Features of an invertible network (a normalizing flow): lossless, to rounding.

    An edit of one feature moves the activations along a curve that depends on where they are. Maps and inverses cost
    ``layers`` small networks each.
    """

    kind = "flow"
    Config = FlowConfig

    def __init__(self, config: FlowConfig) -> None:
        super().__init__(config)
        self.d_in = self.n_features = config.d_in
        generator = torch.Generator().manual_seed(config.seed)
        first = config.d_in // 2
        sizes = [(first, config.d_in - first), (config.d_in - first, first)]
        self.couplings = nn.ModuleList(Coupling(*sizes[i % 2], config.hidden, generator) for i in range(config.layers))

    def featurize(self, x: Tensor) -> tuple[Tensor, Error]:
        """Return the features of activations ``(*batch, d_in)``, and None for the error."""
        return self._forward(x)[0], None

    def inverse_featurize(self, features: Tensor, error: Error) -> Tensor:
        """Return the activations of features ``(*batch, d_in)``, to rounding."""
        x = features.to(self._dtype)
        for i in reversed(range(len(self.couplings))):
            a, b = self._halves(x, i)
            s, t = self.couplings[i](a)
            x = self._joined(a, (b - t) * torch.exp(-s), i)
        return x

    @classmethod
    def fit(
        cls,
        activations: Tensor,
        *,
        layers: int = 4,
        hidden: int = 16,
        steps: int = 200,
        lr: float = 1e-2,
        seed: int = 0,
    ) -> Self:
        """Fit to activations ``(n, d_in)``: make their features as likely as possible under independent normals."""
        f = cls(FlowConfig(d_in=activations.shape[-1], layers=layers, hidden=hidden, seed=seed))
        optimizer = torch.optim.Adam(f.parameters(), lr=lr)
        x = activations.detach().to(f._dtype)
        for _ in range(steps):
            optimizer.zero_grad()
            f.negative_log_likelihood(x).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        return f

    def negative_log_likelihood(self, x: Tensor) -> Tensor:
        """Return the mean negative log-likelihood of activations, up to a constant, in nats."""
        features, log_determinant = self._forward(x)
        return (0.5 * features.square().sum(-1) - log_determinant).mean()

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def _forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the features, and the logarithm of the Jacobian's determinant ``(*batch)``."""
        x = x.to(self._dtype)  # activations may be in half precision
        total = x.new_zeros(x.shape[:-1])
        for i, coupling in enumerate(self.couplings):
            a, b = self._halves(x, i)
            s, t = coupling(a)
            x, total = self._joined(a, b * torch.exp(s) + t, i), total + s.sum(-1)
        return x, total

    def _halves(self, x: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Return the half that a layer keeps, and the one that it changes."""
        first = self.config.d_in // 2
        return (x[..., :first], x[..., first:]) if layer % 2 == 0 else (x[..., first:], x[..., :first])

    def _joined(self, kept: Tensor, changed: Tensor, layer: int) -> Tensor:
        return torch.cat((kept, changed) if layer % 2 == 0 else (changed, kept), dim=-1)
