"""The six modules of CausalAbstraction: x → (features, error), and back."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from featurizers import Error, Featurizer
from featurizers.errors import UsageError
from featurizers_subspace import SubspaceFeaturizer
from torch import Tensor, nn

RESCALED = "constant_norm_rescale"
"""SAELens' name of a normalization that divides each x by its norm."""


class IdentityFeaturizerModule(nn.Module):
    """x → (a copy of x, None)."""

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """Features of x, and no error."""
        return x.clone(), None


class IdentityInverseFeaturizerModule(nn.Module):
    """The inverse of `IdentityFeaturizerModule`."""

    def forward(self, x: Tensor, error: None = None) -> Tensor:
        """A copy of the features."""
        return x.clone()


class Rotation(nn.Module):
    """The basis of a subspace under the name that CausalAbstraction's rotation has: ``weight``, ``(d, k)``.

    It is orthonormal whatever an optimizer does to the parameter behind it, at O(d k²) a step.
    """

    def __init__(self, subspace: SubspaceFeaturizer) -> None:
        super().__init__()
        self.subspace = subspace

    @property
    def weight(self) -> Tensor:
        """The basis, with a gradient along the manifold of orthonormal matrices."""
        return self.subspace.orthonormal_basis()


class SubspaceFeaturizerModule(nn.Module):
    """x → (Wᵀx, x − WWᵀx) with W the ``weight`` of a rotation layer, in the dtype of W.

    Args:
        rotate_layer: a `Rotation`, or any layer whose ``weight`` is ``(d, k)`` with orthonormal columns.
    """

    def __init__(self, rotate_layer: nn.Module) -> None:
        super().__init__()
        self.rotate = rotate_layer

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Coordinates in the subspace, and the part of x outside it."""
        basis = _weight(self.rotate, x)
        x = x.to(basis.dtype)
        features = x @ basis
        return features, x - features @ basis.mT


class SubspaceInverseFeaturizerModule(nn.Module):
    """The inverse of `SubspaceFeaturizerModule`; without an error it gives the point in the subspace."""

    def __init__(self, rotate_layer: nn.Module) -> None:
        super().__init__()
        self.rotate = rotate_layer

    def forward(self, f: Tensor, error: Tensor | None = None) -> Tensor:
        """The point with these coordinates, and that part outside the subspace."""
        basis = _weight(self.rotate, f)
        inside = f.to(basis.dtype) @ basis.mT
        return inside if error is None else inside + error.to(basis.dtype)


class SAEFeaturizerModule(nn.Module):
    """x → (encode(x), x − decode(encode(x))) of a sparse autoencoder, in its own dtype.

    Some of SAELens' leave on themselves, between ``encode`` and ``decode``, by what they divided x. They are told of x
    again before each decoding, which is why the error of these carries x.

    Args:
        sae: has ``encode``, ``decode`` and ``dtype``, as a `sae_lens.SAE` has.
    """

    def __init__(self, sae: Any) -> None:
        super().__init__()
        self.sae = sae

    def forward(self, x: Tensor) -> tuple[Tensor, Error]:
        """Features of x, and what the autoencoder does not reconstruct of it."""
        own = x.to(self.sae.dtype)
        features = self.sae.encode(own)
        residual = own - self.sae.decode(features)
        return features, (residual, own) if depends_on_x(self.sae) else residual


class SAEInverseFeaturizerModule(nn.Module):
    """The inverse of `SAEFeaturizerModule`; without an error it is the decoder."""

    def __init__(self, sae: Any) -> None:
        super().__init__()
        self.sae = sae

    def forward(self, features: Tensor, error: Error = None) -> Tensor:
        """What the features decode to, and what was not reconstructed."""
        residual, x = error if isinstance(error, tuple) else (error, None)
        if depends_on_x(self.sae):
            if x is None:
                raise UsageError(
                    "this autoencoder normalizes each x, so that its features decode to nothing without the error"
                )
            self.sae.encode(x)
        decoded: Tensor = self.sae.decode(features.to(self.sae.dtype))
        return decoded if residual is None else decoded + residual


class CoreFeaturizerModule(nn.Module):
    """Any featurizer of this library as such a module."""

    def __init__(self, core: Featurizer[Any]) -> None:
        super().__init__()
        self.core = core

    def forward(self, x: Tensor) -> tuple[Tensor, Error]:
        """Features and error of x."""
        return self.core.featurize(x)


class CoreInverseFeaturizerModule(nn.Module):
    """The inverse of `CoreFeaturizerModule`."""

    def __init__(self, core: Featurizer[Any]) -> None:
        super().__init__()
        self.core = core

    def forward(self, features: Tensor, error: Error = None) -> Tensor:
        """The activations with these features and this error."""
        return self.core.inverse_featurize(features, error)


def depends_on_x(sae: Any) -> bool:
    """Whether a sparse autoencoder decodes by what it divided x with."""
    config = sae.cfg.to_dict()
    return "normalize_activations" in config and config["normalize_activations"] in ("layer_norm", RESCALED)


def checked_sae(sae: Any, trainable: bool) -> tuple[Any, int]:
    """A sparse autoencoder with the parameters of the caller's, which learn or do not; and its number of features.

    The caller's own keeps the flags that it has: the two share their memory until one of them is moved.

    Raises:
        UsageError: it is not one, or it writes where it does not read.
    """
    if not all(hasattr(sae, name) for name in ("encode", "decode", "dtype", "cfg")):
        raise UsageError(f"an SAEFeaturizer takes a sparse autoencoder as SAELens has them, not a {type(sae).__name__}")
    config, architecture = sae.cfg.to_dict(), getattr(sae.cfg, "architecture", None)
    name = str(architecture() if callable(architecture) else architecture)
    if "transcoder" in name or ("d_out" in config and config["d_out"] is not None):
        raise UsageError("a transcoder reads one site and writes another: it is no featurizer of one site")
    if isinstance(sae, nn.Module):
        own = {id(p): nn.Parameter(p.detach(), requires_grad=trainable) for p in sae.parameters()}
        sae = copy.deepcopy(sae, cast("dict[int, Any]", own))
    return sae, config["d_sae"]


def _weight(layer: nn.Module, like: Tensor) -> Tensor:
    """The rotation of a layer, where the activations are."""
    weight = layer.weight
    if not isinstance(weight, torch.Tensor) or weight.dim() != 2:
        raise UsageError(f"the weight of a rotation layer is a matrix (d, k), not {type(weight).__name__}")
    return weight.to(like.device)
