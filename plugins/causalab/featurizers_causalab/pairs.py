"""Convert a pair of CausalAbstraction's modules to a featurizer of this library."""

from __future__ import annotations

from typing import Any, ClassVar, cast, final

import torch
from featurizers import Error, Featurizer
from featurizers.errors import ShapeError
from featurizers.features import Indices, Selection
from featurizers_identity import IdentityConfig, IdentityFeaturizer
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from featurizers_causalab.modules import (
    CoreFeaturizerModule,
    CoreInverseFeaturizerModule,
    IdentityFeaturizerModule,
    Rotation,
    SubspaceFeaturizerModule,
    SubspaceInverseFeaturizerModule,
)


class PairConfig(BaseModel):
    """Empty configuration of a `PairFeaturizer`, which is never stored."""

    model_config = ConfigDict(strict=True, extra="forbid")


@final
class PairFeaturizer(Featurizer[PairConfig]):
    """Featurizer that calls two modules of the caller: ``x → (features, error)`` and its inverse.

    The laws of a featurizer hold if the second module inverts the first. The kind is not registered, so no file can
    name it: nothing could rebuild the modules.
    """

    kind: ClassVar[str] = "causalab.pair"
    Config: ClassVar[type[BaseModel]] = PairConfig

    def __init__(self, featurizer: nn.Module, inverse: nn.Module | None, n_features: int | None) -> None:
        super().__init__(PairConfig())
        self.d_in, self.n_features, self.declared = None, n_features, n_features
        self.forward_module = featurizer
        # if the modules share their children, register only the first, so that a state dict holds them once
        shared = inverse is None or set(inverse.children()) <= set(featurizer.modules())
        self._inverse = (inverse if shared else None,)
        self.inverse_module = None if shared else inverse

    def featurize(self, x: Tensor) -> tuple[Tensor, Error]:
        """Call the module. Its error may be a list, as that of a composition is.

        Raises:
            ShapeError: the number of features differs from the declared one.
        """
        features, error = self.forward_module(x)
        if self.declared not in (None, features.shape[-1]):
            raise ShapeError(
                f"{self.id!r} was given n_features={self.declared}, but its module returns {features.shape[-1]}"
            )
        return features, tuple(error) if isinstance(error, list) else error

    def inverse_featurize(self, features: Tensor, error: Error) -> Tensor:
        """Call the inverse.

        Raises:
            ShapeError: there is no inverse.
        """
        inverse = self.inverse_module or self._inverse[0]
        if inverse is None:
            raise ShapeError(f"{self.id!r} has no inverse module, so its features can be collected but not edited")
        return cast("Tensor", inverse(features, error))

    def select(self, indices: Indices, x: Tensor) -> Selection:
        """See `Featurizer.select`; the module is called to count the features if their number was not declared."""
        if self.declared is None and indices is not None:
            with torch.no_grad():
                self.n_features = self.featurize(x[:1])[0].shape[-1]
        return super().select(indices, x)


def featurizer_of_modules(
    featurizer: nn.Module, inverse: nn.Module | None, n_features: int | None, name: str
) -> Featurizer[Any]:
    """Build the featurizer of a pair of modules: the one that they wrap, else an identity or a `PairFeaturizer`.

    Args:
        featurizer: maps x to (features, error).
        inverse: maps (features, error) to x; None if features are only read.
        n_features: number of features, if known.
        name: id of the result.

    Raises:
        ShapeError: the modules have another number of features.
    """
    core = _wrapped(featurizer, inverse)
    if core is None and isinstance(featurizer, IdentityFeaturizerModule):
        core = IdentityFeaturizer(IdentityConfig(d_in=n_features))
    if core is None:
        core = PairFeaturizer(featurizer, inverse, n_features)
    if n_features is not None and core.n_features not in (None, n_features):
        raise ShapeError(f"{name!r} was given n_features={n_features}, but has {core.n_features} features")
    core.id = name
    return core


def _wrapped(featurizer: nn.Module, inverse: nn.Module | None) -> Featurizer[Any] | None:
    """Return the featurizer that both modules wrap, None if they wrap none or different ones."""
    if isinstance(featurizer, SubspaceFeaturizerModule) and isinstance(featurizer.rotate, Rotation):
        matches = isinstance(inverse, SubspaceInverseFeaturizerModule) and inverse.rotate is featurizer.rotate
        return featurizer.rotate.subspace if matches or inverse is None else None
    if isinstance(featurizer, CoreFeaturizerModule):
        matches = isinstance(inverse, CoreInverseFeaturizerModule) and inverse.core is featurizer.core
        return featurizer.core if matches or inverse is None else None
    return None
