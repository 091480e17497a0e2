"""CausalAbstraction's modules, x → (features, error) and back, and two that wrap a featurizer of this library."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from featurizers import Error, Featurizer
from featurizers.errors import UsageError
from featurizers_subspace import SubspaceFeaturizer
from torch import Tensor, nn

RESCALED = "constant_norm_rescale"
"""SAELens' name for dividing each x by its norm."""


class IdentityFeaturizerModule(nn.Module):
    """Identity: x → (a copy of x, None)."""

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """Return a copy of x and no error."""
        return x.clone(), None


class IdentityInverseFeaturizerModule(nn.Module):
    """Inverse of `IdentityFeaturizerModule`."""

    def forward(self, x: Tensor, error: None = None) -> Tensor:
        """Return a copy of the features."""
        return x.clone()


class Rotation(nn.Module):
    """Basis of a subspace as ``weight`` ``(d, k)``, the name that CausalAbstraction's rotation layer uses.

    It stays orthonormal while an optimizer trains the subspace, at O(d k²) a step.
    """

    def __init__(self, subspace: SubspaceFeaturizer) -> None:
        super().__init__()
        self.subspace = subspace

    @property
    def weight(self) -> Tensor:
        """Basis, with a gradient along the manifold of orthonormal matrices."""
        return self.subspace.orthonormal_basis()


class SubspaceFeaturizerModule(nn.Module):
    """Projection x → (Wᵀx, x − WWᵀx), where W is the ``weight`` of a rotation layer; computed in the dtype of W.

    Args:
        rotate_layer: a `Rotation`, or any layer whose ``weight`` is ``(d, k)`` with orthonormal columns.
    """

    def __init__(self, rotate_layer: nn.Module) -> None:
        super().__init__()
        self.rotate = rotate_layer

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the coordinates in the subspace and the part of x outside it."""
        basis = _weight(self.rotate, x)
        x = x.to(basis.dtype)
        features = x @ basis
        return features, x - features @ basis.mT


class SubspaceInverseFeaturizerModule(nn.Module):
    """Inverse of `SubspaceFeaturizerModule`; without an error it returns the point in the subspace."""

    def __init__(self, rotate_layer: nn.Module) -> None:
        super().__init__()
        self.rotate = rotate_layer

    def forward(self, f: Tensor, error: Tensor | None = None) -> Tensor:
        """Return the point with these coordinates plus the error."""
        basis = _weight(self.rotate, f)
        inside = f.to(basis.dtype) @ basis.mT
        return inside if error is None else inside + error.to(basis.dtype)


class SAEFeaturizerModule(nn.Module):
    """Sparse autoencoder: x → (encode(x), x − decode(encode(x))), in its own dtype.

    Some autoencoders of SAELens normalise x and keep the scale on themselves between ``encode`` and ``decode``. For
    these the error carries x too, and the inverse encodes x again before it decodes.

    Args:
        sae: object with ``encode``, ``decode``, ``dtype`` and ``cfg``, such as a `sae_lens.SAE`.
    """

    def __init__(self, sae: Any) -> None:
        super().__init__()
        self.sae = sae

    def forward(self, x: Tensor) -> tuple[Tensor, Error]:
        """Return the features of x and the reconstruction error."""
        x = x.to(self.sae.dtype)
        features = self.sae.encode(x)
        residual = x - self.sae.decode(features)
        return features, (residual, x) if depends_on_x(self.sae) else residual


class SAEInverseFeaturizerModule(nn.Module):
    """Inverse of `SAEFeaturizerModule`; without an error it is the decoder."""

    def __init__(self, sae: Any) -> None:
        super().__init__()
        self.sae = sae

    def forward(self, features: Tensor, error: Error = None) -> Tensor:
        """Return the decoded features plus the reconstruction error.

        Raises:
            UsageError: the autoencoder normalises x, and there is no error, which would carry x.
        """
        residual, x = error if isinstance(error, tuple) else (error, None)
        if depends_on_x(self.sae):
            if x is None:
                raise UsageError(
                    "this autoencoder normalizes each x, so its features cannot be decoded without the error; pass it"
                )
            self.sae.encode(x)
        decoded: Tensor = self.sae.decode(features.to(self.sae.dtype))
        return decoded if residual is None else decoded + residual


class CoreFeaturizerModule(nn.Module):
    """Featurizer of this library as a module x → (features, error)."""

    def __init__(self, core: Featurizer[Any]) -> None:
        super().__init__()
        self.core = core

    def forward(self, x: Tensor) -> tuple[Tensor, Error]:
        """Return the features and the error of x."""
        return self.core.featurize(x)


class CoreInverseFeaturizerModule(nn.Module):
    """Inverse of `CoreFeaturizerModule`."""

    def __init__(self, core: Featurizer[Any]) -> None:
        super().__init__()
        self.core = core

    def forward(self, features: Tensor, error: Error = None) -> Tensor:
        """Return the activations with these features and this error."""
        return self.core.inverse_featurize(features, error)


def depends_on_x(sae: Any) -> bool:
    """Return True if a sparse autoencoder decodes with a scale that it computed from x."""
    config = sae.cfg.to_dict()
    return "normalize_activations" in config and config["normalize_activations"] in ("layer_norm", RESCALED)


def checked_sae(sae: Any, trainable: bool) -> tuple[Any, int]:
    """Check a sparse autoencoder and copy it, sharing the memory of its parameters.

    The copy's parameters require gradients as ``trainable`` says; those of the original keep their flags. The memory is
    shared until one of the two is moved to another device or dtype.

    Returns:
        The copy and its number of features.

    Raises:
        UsageError: it is not a sparse autoencoder, or it is a transcoder.
    """
    if not all(hasattr(sae, name) for name in ("encode", "decode", "dtype", "cfg")):
        raise UsageError(f"an SAEFeaturizer takes a sparse autoencoder of SAELens, not a {type(sae).__name__}")
    config, architecture = sae.cfg.to_dict(), getattr(sae.cfg, "architecture", None)
    name = str(architecture() if callable(architecture) else architecture)
    if "transcoder" in name or ("d_out" in config and config["d_out"] is not None):
        raise UsageError("a transcoder reads one site and writes another; give an autoencoder, which has one site")
    if isinstance(sae, nn.Module):
        shared = {id(p): nn.Parameter(p.detach(), requires_grad=trainable) for p in sae.parameters()}
        sae = copy.deepcopy(sae, cast("dict[int, Any]", shared))
    return sae, config["d_sae"]


def _weight(layer: nn.Module, like: Tensor) -> Tensor:
    """Return the weight of a rotation layer, on the device of the activations."""
    weight = layer.weight
    if not isinstance(weight, torch.Tensor) or weight.dim() != 2:
        raise UsageError(f"the weight of a rotation layer is a matrix (d, k), not {type(weight).__name__}")
    return weight.to(like.device)
