"""Gradients through a featurizer: derivatives of its two maps, and `splice`, which shows the features to autograd."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Literal, TypeAlias, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from featurizers.errors import UsageError
from featurizers.features.precision import without_autocast, without_overflow

Error: TypeAlias = "Tensor | tuple[Any, ...] | None"
"""All that `Featurizer.inverse_featurize` needs besides the features. Callers pass it on and do not look inside."""


class Derivatives(nn.Module, ABC):
    """Base of `featurizers.Featurizer`: derivatives of its two maps by `torch.func`, and `splice`."""

    @abstractmethod
    def encode(self, x: Float[Tensor, "*batch d_in"], columns: Tensor | None = None) -> Float[Tensor, "*batch k"]:
        """See `featurizers.Featurizer.encode`."""

    @abstractmethod
    def inverse_featurize(
        self, features: Float[Tensor, "*batch n_features"], error: Error
    ) -> Float[Tensor, "*batch d_in"]:
        """See `featurizers.Featurizer.inverse_featurize`."""

    @abstractmethod
    def apply_edit(
        self,
        base: Float[Tensor, "*batch d_in"],
        features: Float[Tensor, "*batch k"],
        edited: Float[Tensor, "*batch k"],
        columns: Tensor | None = None,
    ) -> Float[Tensor, "*batch d_in"]:
        """See `featurizers.Featurizer.apply_edit`."""

    @abstractmethod
    def flatten(self, x: Tensor) -> Float[Tensor, "*batch d_in"]:
        """See `featurizers.Featurizer.flatten`."""

    @final
    def encode_jvp(
        self, x: Float[Tensor, "*batch d_in"], tangent: Float[Tensor, "*batch d_in"]
    ) -> Float[Tensor, "*batch n_features"]:
        """Return the derivative of the features as x moves along ``tangent``."""
        return torch.func.jvp(self.encode, (x,), (tangent,))[1]  # type: ignore[no-any-return]

    @final
    def encode_vjp(
        self, x: Float[Tensor, "*batch d_in"], cotangent: Float[Tensor, "*batch n_features"]
    ) -> Float[Tensor, "*batch d_in"]:
        """Return the gradient of ``(features * cotangent).sum()`` with respect to x."""
        return torch.func.vjp(self.encode, x)[1](cotangent)[0]  # type: ignore[no-any-return]

    @final
    def decode_jvp(
        self,
        features: Float[Tensor, "*batch n_features"],
        error: Error,
        tangent: Float[Tensor, "*batch n_features"],
    ) -> Float[Tensor, "*batch d_in"]:
        """Return the derivative of x̂ as the features move along ``tangent`` while the error term is constant."""
        return torch.func.jvp(lambda f: self.inverse_featurize(f, error), (features,), (tangent,))[1]  # type: ignore[no-any-return]

    @final
    def decode_vjp(
        self,
        features: Float[Tensor, "*batch n_features"],
        error: Error,
        cotangent: Float[Tensor, "*batch d_in"],
    ) -> Float[Tensor, "*batch n_features"]:
        """Return the gradient of ``(x̂ * cotangent).sum()`` with respect to the features; the error term is constant."""
        return torch.func.vjp(lambda f: self.inverse_featurize(f, error), features)[1](cotangent)[0]  # type: ignore[no-any-return]

    @final
    def splice(
        self,
        x: Float[Tensor, "*batch d_in"],
        tap: Callable[[Tensor], Tensor | None],
        *,
        error_grad: Literal["live", "stop"] = "live",
    ) -> Float[Tensor, "*batch d_in"]:
        """Route x through its features: ``tap`` sees them and may return others. Return x, with the edit of the tap.

        The result equals x unless the tap changes a feature. A splice is for gradients: it gives the tapped features
        a gradient. The tap gets a copy of the features, because the features themselves are both added and
        subtracted, and their gradient is exactly zero.

        Args:
            x: activations.
            tap: called once with the features; the tensor that it returns replaces them, None keeps them.
            error_grad: ``live`` lets the gradient reach x through the error term as well as through the features;
                ``stop`` lets it through the features alone, with the error held constant as in SAELens.

        Examples:
            >>> import torch, featurizers
            >>> x = torch.randn(2, 8, requires_grad=True)
            >>> seen = []
            >>> f = featurizers.create("subspace", d_in=8, n_features=2)
            >>> f.splice(x, lambda z: (z.retain_grad(), seen.append(z))[1]).sum().backward()
            >>> seen[0].grad.shape
            torch.Size([2, 2])
        """
        if error_grad not in ("live", "stop"):
            raise UsageError(f"error_grad must be 'live' or 'stop', not {error_grad!r}")
        shape, x = x.shape, self.flatten(x)
        with without_autocast(x):
            features = self.encode(x)
        tapped = features.clone()
        changed = tap(tapped)
        if error_grad == "stop":
            x, features = x.detach(), features.detach()
        with without_autocast(x):
            result = self.apply_edit(x, features, tapped if changed is None else changed)
            untouched = torch.tensor((changed is None or changed is tapped) and tapped._version == 0, device=x.device)
            return without_overflow(self, result, x, None, lambda: untouched).reshape(shape)
