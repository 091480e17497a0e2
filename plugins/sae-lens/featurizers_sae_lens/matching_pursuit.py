"""`MatchingPursuitFeaturizer`: finds features one at a time, in the residual that the earlier ones leave."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, final

import torch
from featurizers.builtin import LinearDecoderFeaturizer
from featurizers.errors import ShapeError
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn


class MatchingPursuitConfig(BaseModel):
    """Configuration of a `MatchingPursuitFeaturizer`.

    Attributes:
        d_in: width of the activations.
        n_features: number of features.
        residual_threshold: a token is done when the norm of its residual is below this; 0 for no threshold.
        max_iterations: maximum number of steps, ``d_in`` if None.
        stop_on_duplicate_support: if True a token is done when a step gives it no new feature.
        pre_bias: if True the bias is subtracted before and added after; if False there is no bias.
        normalize: normalisation of each token's activations, undone after decoding.
        n_heads: as in the configuration of `featurizers.DictionaryFeaturizer`.
        special_tokens: ids of tokens that interventions do not change.
    """

    model_config = ConfigDict(strict=True, extra="forbid")
    d_in: Annotated[int, Field(gt=0, le=2**24)]
    n_features: Annotated[int, Field(gt=0, le=2**31)]
    residual_threshold: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1e-2
    max_iterations: Annotated[int, Field(gt=0, le=100_000)] | None = None
    stop_on_duplicate_support: bool = True
    pre_bias: bool = True
    normalize: Literal["none", "layer-norm", "constant-norm"] = "none"
    n_heads: Annotated[int, Field(ge=0, le=2**16)] | None = None
    special_tokens: list[Annotated[int, Field(ge=0)]] = []


@final
class MatchingPursuitFeaturizer(LinearDecoderFeaturizer[MatchingPursuitConfig]):
    """Matching pursuit over the rows of a decoder, which is its own encoder (Mallat and Zhang 1993; SAELens).

    From the residual r = n(x) - b_dec, each step takes the row w with the largest r·w, adds max(r·w, 0) to its feature
    and subtracts that multiple of the row from r, until the token is done. Lossy by itself, lossless with the error
    term. Cost: one product of r with the decoder a step.
    """

    kind: ClassVar[str] = "sae-lens.matching-pursuit"
    Config: ClassVar[type[BaseModel]] = MatchingPursuitConfig

    b_dec: Tensor

    def __init__(self, config: MatchingPursuitConfig) -> None:
        super().__init__(
            config,
            d_in=config.d_in,
            n_features=config.n_features,
            normalize=config.normalize,
            n_heads=config.n_heads,
            special_tokens=config.special_tokens,
        )
        self.W_dec = nn.Parameter(torch.zeros(config.n_features, config.d_in), requires_grad=False)
        self.b_dec = nn.Parameter(torch.zeros(config.d_in), requires_grad=False)

    @property
    def encoder_dtype(self) -> torch.dtype:
        """Dtype of ``W_dec``, the only matrix."""
        return self.W_dec.dtype

    def encode_normalized(
        self, normal: Float[Tensor, "*batch d_in"], columns: Tensor | None = None
    ) -> Float[Tensor, "*batch k"]:
        """Return features, all or some; each depends on all others.

        The gradient reaches the coefficient of a row and not its choice.
        """
        residual = (normal - self.b_dec if self.config.pre_bias else normal).reshape(-1, self.d_in)
        features = residual.new_zeros(len(residual), self.n_features)
        active = torch.ones(len(residual), dtype=torch.bool, device=residual.device)
        for _ in range(self.config.max_iterations or self.d_in):
            best = (residual.detach() @ self.W_dec.detach().mT).argmax(dim=-1, keepdim=True)
            rows = self.W_dec[best[:, 0]]
            coefficient = torch.relu((residual * rows).sum(dim=-1, keepdim=True)) * active.unsqueeze(-1)
            before = features.detach() != 0
            features = features.scatter_add(-1, best, coefficient)
            residual = residual - coefficient * rows
            if self.config.stop_on_duplicate_support:
                active = active & ((features.detach() != 0) != before).any(dim=-1)
            if self.config.residual_threshold > 0:
                active = active & (residual.detach().norm(dim=-1) >= self.config.residual_threshold)
            if not active.any():
                break
        features = features.reshape(*normal.shape[:-1], self.n_features)
        return features if columns is None else features[..., columns]

    def decode(self, features: Float[Tensor, "*batch n_features"]) -> Float[Tensor, "*batch d_in"]:
        """Return ``W_decᵀ f``, plus ``b_dec`` with ``pre_bias``, before the normalisation is undone."""
        decoded = features @ self.W_dec
        return decoded + self.b_dec if self.config.pre_bias else decoded

    def decode_change(
        self, change: Float[Tensor, "*batch k"], columns: Tensor | None = None
    ) -> Float[Tensor, "*batch d_in"]:
        """Return ``W_decᵀ f`` for a change of all features, or of those in ``columns``."""
        return change @ (self.W_dec if columns is None else self.W_dec[columns])

    def check(self) -> None:
        """Raise `ShapeError` if a row is much longer than 1, the length that the pursuit takes rows to have."""
        norms = self.W_dec.detach().float().norm(dim=-1)
        if (norms > 2**0.5).any():
            raise ShapeError(
                f"the pursuit does not end with decoder rows longer than √2; the longest is {float(norms.max()):.3g}"
            )
