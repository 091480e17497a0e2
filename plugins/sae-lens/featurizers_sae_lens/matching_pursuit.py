"""`MatchingPursuitFeaturizer`: features found one at a time in what the others leave over."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, final

import torch
from featurizers import Error, Featurizer
from featurizers.builtin import denormalize, normalize
from featurizers.errors import ConfigError, ShapeError, UsageError
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn


class MatchingPursuitConfig(BaseModel):
    """Configuration of a `MatchingPursuitFeaturizer`.

    Attributes:
        d_in: width of the activations.
        n_features: number of features.
        residual_threshold: a token is done when what is left has a smaller norm; 0 to go on.
        max_iterations: steps at most, ``d_in`` if None.
        stop_on_duplicate_support: whether a token is done when a step brings it no new feature.
        pre_bias: whether the bias is taken off before and put back after; else there is none.
        normalize: what is done to each token's activations before, and undone after.
        n_heads: as in `featurizers.builtin.dictionary.DictionaryConfig`.
        special_tokens: ids of tokens that interventions leave alone.
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
class MatchingPursuitFeaturizer(Featurizer[MatchingPursuitConfig]):
    """Matching pursuit over the rows of a decoder, which is its own encoder (Mallat and Zhang 1993; SAELens' SAE).

    From the residual r = n(x) - b_dec, each step takes the row that r lies along the most, adds max(r·w, 0) to its
    feature and takes that much of the row off r, until the token is done. Lossy by itself, lossless with the error
    term, which is the residual of the reconstruction and the statistics of n. The decoder is linear, so an edit
    decodes the difference. Cost: one product of r with the decoder a step.
    """

    kind: ClassVar[str] = "sae-lens.matching-pursuit"
    Config: ClassVar[type[BaseModel]] = MatchingPursuitConfig

    W_dec: Tensor
    b_dec: Tensor
    d_in: int
    n_features: int

    def __init__(self, config: MatchingPursuitConfig) -> None:
        super().__init__(config)
        if config.normalize == "layer-norm" and config.d_in < 2:
            raise ConfigError("one coordinate has no standard deviation; layer-norm needs d_in of 2 at least")
        if config.n_heads and config.d_in % config.n_heads:
            raise ConfigError(f"a width of {config.d_in} does not make {config.n_heads} equal heads")
        self.d_in, self.n_features = config.d_in, config.n_features
        self.special_tokens = tuple(config.special_tokens)
        self.W_dec = nn.Parameter(torch.zeros(config.n_features, config.d_in), requires_grad=False)
        self.b_dec = nn.Parameter(torch.zeros(config.d_in), requires_grad=False)

    def flatten(self, x: Tensor) -> Tensor:
        """Heads side by side, where there are heads."""
        if self.config.n_heads is not None and x.shape[-1] != self.d_in and x.shape[-2:].numel() == self.d_in:
            x = x.flatten(-2)
        self.check_width(x)
        return x

    def featurize(self, x: Float[Tensor, "*batch d_in"]) -> tuple[Float[Tensor, "*batch n_features"], Error]:
        """Features, and the error with the statistics of the normalisation."""
        flat = self.flatten(x).to(self.W_dec.dtype)
        normal, statistics = normalize(flat, self.config.normalize, 1.0)
        features = self._pursue(normal)
        error = (flat - self._reconstruct(features, statistics)).reshape(x.shape)
        return features, (error, *statistics) if statistics else error

    def inverse_featurize(
        self, features: Float[Tensor, "*batch n_features"], error: Error
    ) -> Float[Tensor, "*batch d_in"]:
        """The decoded features, and the error."""
        residual, *statistics = error if isinstance(error, tuple) else (error,)
        if not isinstance(residual, Tensor):
            raise UsageError("inverse_featurize needs the error that featurize gave")
        return self._reconstruct(features, tuple(statistics)).reshape(residual.shape) + residual

    def encode(self, x: Float[Tensor, "*batch d_in"], columns: Tensor | None = None) -> Float[Tensor, "*batch k"]:
        """Features, all or some: each depends on all others."""
        normal, _ = normalize(self.flatten(x).to(self.W_dec.dtype), self.config.normalize, 1.0)
        features = self._pursue(normal)
        return features if columns is None else features[..., columns]

    def apply_edit(
        self,
        base: Float[Tensor, "*batch d_in"],
        features: Float[Tensor, "*batch k"],
        edited: Float[Tensor, "*batch k"],
        columns: Tensor | None = None,
    ) -> Float[Tensor, "*batch d_in"]:
        """``base`` and the decoded difference of the features."""
        weight = self.W_dec if columns is None else self.W_dec[columns]
        x = base.to(weight.dtype)
        _, statistics = normalize(x, self.config.normalize, 1.0)
        change = denormalize(
            (edited - features).to(weight.dtype) @ weight, self.config.normalize, 1.0, statistics, offset=False
        )
        return (x + change).to(base.dtype)

    def check(self) -> None:
        """Raise `ShapeError` unless the rows have the length 1 that the pursuit takes them to have, or nearly."""
        norms = self.W_dec.detach().float().norm(dim=-1)
        if (norms > 2**0.5).any():
            raise ShapeError(
                f"the pursuit does not end with decoder rows longer than √2; the longest is {float(norms.max()):.3g}"
            )

    def _reconstruct(self, features: Tensor, statistics: tuple[Any, ...]) -> Tensor:
        decoded = features @ self.W_dec
        if self.config.pre_bias:
            decoded = decoded + self.b_dec
        return denormalize(decoded, self.config.normalize, 1.0, statistics)

    def _pursue(self, normal: Tensor) -> Tensor:
        """Features of normalised activations; the choice of a row has no gradient, its coefficient has."""
        shape = normal.shape[:-1]
        left = (normal - self.b_dec if self.config.pre_bias else normal).reshape(-1, self.d_in)
        features = left.new_zeros(len(left), self.n_features)
        going = torch.ones(len(left), dtype=torch.bool, device=left.device)
        for _ in range(self.config.max_iterations or self.d_in):
            best = (left.detach() @ self.W_dec.detach().mT).argmax(dim=-1, keepdim=True)
            rows = self.W_dec[best[:, 0]]
            found = torch.relu((left * rows).sum(dim=-1, keepdim=True)) * going.unsqueeze(-1)
            before = features.detach() != 0
            features = features.scatter_add(-1, best, found)
            left = left - found * rows
            if self.config.stop_on_duplicate_support:
                going = going & ((features.detach() != 0) != before).any(dim=-1)
            if self.config.residual_threshold > 0:
                going = going & (left.detach().norm(dim=-1) >= self.config.residual_threshold)
            if not going.any():
                break
        return features.reshape(*shape, self.n_features)
