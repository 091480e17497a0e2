"""`LinearDecoderFeaturizer`: base of autoencoders that normalise each token and decode linearly."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from featurizers.builtin.normalization import Normalization, denormalize, normalize
from featurizers.errors import ConfigError, UsageError
from featurizers.features.derivatives import Error
from featurizers.features.feature_space import ConfigT
from featurizers.features.featurizer import Featurizer
from featurizers.features.precision import without_autocast


class LinearDecoderFeaturizer(Featurizer[ConfigT]):
    """Base of autoencoders with a linear decoder, whose encoder sees normalised activations.

    With n the normalisation of a token's activations,

        f = encode_normalized(n(x))        x̂ = n⁻¹(decode(f)) + e

    Lossy by itself, lossless with the error term. The error is e alone or, where n depends on the token, the tuple of
    e and the token's statistics: mean and standard deviation (``layer-norm``), the factor (``constant-norm``). The
    decoder is linear, so that an edit decodes the difference of the features only, in the statistics of the base.

    A kind registers ``W_dec`` and implements `encode_normalized`, `decode`, `decode_change` and `encoder_dtype`.

    Args:
        config: configuration of the kind.
        d_in: width of the activations.
        n_features: number of features.
        normalize: normalisation of each token's activations.
        input_scale: factor of ``normalize="scale"``.
        n_heads: number of heads whose outputs, side by side, are the activations, 0 for any number; if it is not None,
            ``(*batch, n_heads, d_head)`` is accepted too.
        special_tokens: ids of tokens that interventions do not change.

    Raises:
        ConfigError: the width does not fit the normalisation or the heads.
    """

    W_dec: Tensor
    d_in: int
    n_features: int

    def __init__(
        self,
        config: ConfigT,
        *,
        d_in: int,
        n_features: int,
        normalize: Normalization = "none",
        input_scale: float = 1.0,
        n_heads: int | None = None,
        special_tokens: Sequence[int] = (),
    ) -> None:
        super().__init__(config)
        if normalize == "layer-norm" and d_in < 2:
            raise ConfigError("layer-norm needs d_in of at least 2: one coordinate has no standard deviation")
        if n_heads and d_in % n_heads:
            raise ConfigError(f"a width of {d_in} does not make {n_heads} equal heads")
        self.d_in, self.n_features = d_in, n_features
        self._normalization, self._input_scale, self._n_heads = normalize, input_scale, n_heads
        self.special_tokens: tuple[int, ...] = tuple(special_tokens)

    # ------------------------------------------------------------------ what a kind implements
    @property
    @abstractmethod
    def encoder_dtype(self) -> torch.dtype:
        """Dtype that activations are converted to before they are encoded."""

    @property
    def decoder_dtype(self) -> torch.dtype:
        """Dtype that changes of features are converted to before they are decoded: that of ``W_dec``."""
        return self.W_dec.dtype

    @abstractmethod
    def encode_normalized(
        self, normal: Float[Tensor, "*batch d_in"], columns: Tensor | None = None
    ) -> Float[Tensor, "*batch k"]:
        """Return features of normalised activations: all, or those in ``columns``."""

    @abstractmethod
    def decode(self, features: Float[Tensor, "*batch n_features"]) -> Float[Tensor, "*batch d_in"]:
        """Return decoded features, before the normalisation is undone."""

    @abstractmethod
    def decode_change(
        self, change: Float[Tensor, "*batch k"], columns: Tensor | None = None
    ) -> Float[Tensor, "*batch d_in"]:
        """Return the change of `decode` for a change of all features, or of those in ``columns``."""

    # ------------------------------------------------------------------ the map
    def featurize(self, x: Float[Tensor, "..."]) -> tuple[Float[Tensor, "... n_features"], Error]:
        """Return features, and the error with the statistics; x is ``(*batch, d_in)``, or has separate heads."""
        flat = self.flatten(x).to(self.encoder_dtype)
        with without_autocast(flat):
            normal, statistics = self._normalize(flat)
            features = self.encode_normalized(normal)
            error = (flat - self._reconstruct(features, statistics)).reshape(x.shape)
            return features, (error, *statistics) if statistics else error

    def inverse_featurize(self, features: Float[Tensor, "... n_features"], error: Error) -> Float[Tensor, "..."]:
        """Return the reconstruction plus the error."""
        residual, *statistics = error if isinstance(error, tuple) else (error,)
        if not isinstance(residual, Tensor):
            raise UsageError(f"inverse_featurize needs the error that featurize returned, not {type(error).__name__}")
        with without_autocast(residual):
            return self._reconstruct(features, tuple(statistics)).reshape(residual.shape) + residual

    def reconstruct(self, x: Float[Tensor, "..."]) -> tuple[Float[Tensor, "... n_features"], Float[Tensor, "..."]]:
        """Return features and n⁻¹(decode(f)), which is decoded once."""
        flat = self.flatten(x).to(self.encoder_dtype)
        with without_autocast(flat):
            normal, statistics = self._normalize(flat)
            features = self.encode_normalized(normal)
            return features, self._reconstruct(features, statistics).reshape(x.shape)

    def without_residual(self, error: Error) -> Error:
        """Return an error with the statistics of the token and no residual."""
        residual, *statistics = error if isinstance(error, tuple) else (error,)
        zero = torch.zeros_like(residual) if isinstance(residual, Tensor) else residual
        return (zero, *statistics) if isinstance(error, tuple) else zero

    def encode(self, x: Float[Tensor, "..."], columns: Tensor | None = None) -> Float[Tensor, "... k"]:
        """Return features, all or those in ``columns``, without decoding them."""
        with without_autocast(x):
            normal, _ = self._normalize(self.flatten(x).to(self.encoder_dtype))
            return self.encode_normalized(normal, columns)

    def apply_edit(
        self,
        base: Float[Tensor, "*batch d_in"],
        features: Float[Tensor, "*batch k"],
        edited: Float[Tensor, "*batch k"],
        columns: Tensor | None = None,
    ) -> Float[Tensor, "*batch d_in"]:
        """Return ``base`` plus the decoded difference of the features; features that do not change cost nothing."""
        change = (edited - features).to(self.decoder_dtype)
        return self._add(base, self.decode_change(change, columns))

    def flatten(self, x: Tensor) -> Tensor:
        """Return x with its heads, if they are separate, side by side."""
        heads = self._n_heads
        apart = x.dim() > 1 and x.shape[-1] != self.d_in and x.shape[-2:].numel() == self.d_in
        if heads is not None and apart and heads in (0, x.shape[-2]):
            x = x.flatten(-2)
        self.check_width(x)
        return x

    def _add(self, base: Tensor, change: Tensor) -> Tensor:
        """Add a change of what is decoded to ``base``, in the statistics of the base."""
        _, statistics = self._normalize(base.to(self.decoder_dtype))
        change = denormalize(change, self._normalization, self._input_scale, statistics, offset=False)
        return (base + change).to(base.dtype)  # in the wider of the two dtypes, so that no bit of the base is lost

    def _normalize(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        return normalize(x, self._normalization, self._input_scale)

    def _reconstruct(self, features: Tensor, statistics: tuple[Any, ...]) -> Tensor:
        return denormalize(self.decode(features), self._normalization, self._input_scale, statistics)
