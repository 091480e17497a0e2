"""Derivatives of a featurizer's two maps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, TypeAlias, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

Error: TypeAlias = "Tensor | tuple[Any, ...] | None"
"""What `Featurizer.inverse_featurize` needs beside the features: opaque to callers."""


class Derivatives(nn.Module, ABC):
    """What `featurizers.Featurizer` is built on: its two maps, and their derivatives by `torch.func`."""

    @abstractmethod
    def encode(self, x: Float[Tensor, "*batch d_in"], columns: Tensor | None = None) -> Float[Tensor, "*batch k"]:
        """Features alone, all or those in ``columns`` (int64, ``(k,)``)."""

    @abstractmethod
    def inverse_featurize(
        self, features: Float[Tensor, "*batch n_features"], error: Error
    ) -> Float[Tensor, "*batch d_in"]:
        """The activations that have these features and this error term."""

    @final
    def encode_jvp(
        self, x: Float[Tensor, "*batch d_in"], tangent: Float[Tensor, "*batch d_in"]
    ) -> Float[Tensor, "*batch n_features"]:
        """How the features change as x moves along ``tangent``."""
        return torch.func.jvp(self.encode, (x,), (tangent,))[1]  # type: ignore[no-any-return]

    @final
    def encode_vjp(
        self, x: Float[Tensor, "*batch d_in"], cotangent: Float[Tensor, "*batch n_features"]
    ) -> Float[Tensor, "*batch d_in"]:
        """The gradient in x of ``(features * cotangent).sum()``."""
        return torch.func.vjp(self.encode, x)[1](cotangent)[0]  # type: ignore[no-any-return]

    @final
    def decode_jvp(
        self,
        features: Float[Tensor, "*batch n_features"],
        error: Error,
        tangent: Float[Tensor, "*batch n_features"],
    ) -> Float[Tensor, "*batch d_in"]:
        """How the activations change as the features move along ``tangent``, the error term held."""
        return torch.func.jvp(lambda f: self.inverse_featurize(f, error), (features,), (tangent,))[1]  # type: ignore[no-any-return]

    @final
    def decode_vjp(
        self,
        features: Float[Tensor, "*batch n_features"],
        error: Error,
        cotangent: Float[Tensor, "*batch d_in"],
    ) -> Float[Tensor, "*batch n_features"]:
        """The gradient in the features of ``(x̂ * cotangent).sum()``, the error term held."""
        return torch.func.vjp(lambda f: self.inverse_featurize(f, error), features)[1](cotangent)[0]  # type: ignore[no-any-return]
