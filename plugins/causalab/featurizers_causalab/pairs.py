"""From a pair of CausalAbstraction's modules to a featurizer of this library, whose operations act through them."""

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
    """Configuration of a `PairFeaturizer`: nothing that could be stored."""

    model_config = ConfigDict(strict=True, extra="forbid")


@final
class PairFeaturizer(Featurizer[PairConfig]):
    """The map of two modules of the caller's, ``x → (features, error)`` and back.

    It has the laws of a featurizer so far as the inverse undoes the module. It is of this process alone: its kind is
    not registered, since nothing could build the modules anew.
    """

    kind: ClassVar[str] = "causalab.pair"
    Config: ClassVar[type[BaseModel]] = PairConfig

    def __init__(self, featurizer: nn.Module, inverse: nn.Module | None, n_features: int | None) -> None:
        super().__init__(PairConfig())
        self.d_in, self.n_features, self.said = None, n_features, n_features
        self.forward_module = featurizer
        # what both modules are made of is one module's child, so that a state dict holds it once
        shared = inverse is None or set(inverse.children()) <= set(featurizer.modules())
        self._inverse = (inverse if shared else None,)
        self.inverse_module = None if shared else inverse

    def featurize(self, x: Tensor) -> tuple[Tensor, Error]:
        """What the module gives; its error may be a list, as that of a composition is.

        Raises:
            ShapeError: its features are not as many as was said.
        """
        features, error = self.forward_module(x)
        if self.said not in (None, features.shape[-1]):
            raise ShapeError(
                f"{self.id!r} was said to have {self.said} features, but its module gives {features.shape[-1]}"
            )
        return features, tuple(error) if isinstance(error, list) else error

    def inverse_featurize(self, features: Tensor, error: Error) -> Tensor:
        """What the inverse gives.

        Raises:
            ShapeError: there is none.
        """
        inverse = self.inverse_module or self._inverse[0]
        if inverse is None:
            raise ShapeError(f"{self.id!r} has no inverse: its features can be collected, not changed")
        return cast("Tensor", inverse(features, error))

    def select(self, indices: Indices, x: Tensor) -> Selection:
        """See `Featurizer.select`; how many features there are is asked of the module if it was not said."""
        if self.said is None and indices is not None:
            with torch.no_grad():
                self.n_features = self.featurize(x[:1])[0].shape[-1]
        return super().select(indices, x)


def featurizer_of_modules(
    featurizer: nn.Module, inverse: nn.Module | None, n_features: int | None, name: str
) -> Featurizer[Any]:
    """The featurizer whose map a pair of modules is: that in closed form where they are this library's own.

    Args:
        featurizer: x → (features, error).
        inverse: (features, error) → x, None where features are only read.
        n_features: number of features, if it is known.
        name: its id.

    Raises:
        ShapeError: it is known to be another.
    """
    core = _closed_form(featurizer, inverse)
    if core is None and isinstance(featurizer, IdentityFeaturizerModule):
        core = IdentityFeaturizer(IdentityConfig(d_in=n_features))
    if core is None:
        core = PairFeaturizer(featurizer, inverse, n_features)
    if n_features is not None and core.n_features not in (None, n_features):
        raise ShapeError(f"{name!r} is said to have {n_features} features, but has {core.n_features}")
    core.id = name
    return core


def _closed_form(featurizer: nn.Module, inverse: nn.Module | None) -> Featurizer[Any] | None:
    """The featurizer that both modules hold."""
    if isinstance(featurizer, SubspaceFeaturizerModule) and isinstance(featurizer.rotate, Rotation):
        undone = isinstance(inverse, SubspaceInverseFeaturizerModule) and inverse.rotate is featurizer.rotate
        return featurizer.rotate.subspace if undone or inverse is None else None
    if isinstance(featurizer, CoreFeaturizerModule):
        undone = isinstance(inverse, CoreInverseFeaturizerModule) and inverse.core is featurizer.core
        return featurizer.core if undone or inverse is None else None
    return None
