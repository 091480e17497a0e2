"""`IdentityFeaturizer`: activations are their own features."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, final

import torch
from featurizers import Error, Featurizer, hookimpl
from featurizers.features import FeatureRows
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

__all__ = ["IdentityConfig", "IdentityFeaturizer"]


class IdentityConfig(BaseModel):
    """Configuration of an `IdentityFeaturizer`.

    Attributes:
        d_in: width of the activations, None for any width.
    """

    model_config = ConfigDict(strict=True, extra="forbid")
    d_in: Annotated[int, Field(gt=0, le=2**24)] | None = None


@final
class IdentityFeaturizer(Featurizer[IdentityConfig]):
    """Activations as their own features: featurize(x) = (x, None).

    Lossless and exact: an interchange swaps the chosen coordinates bit for bit, so an interchange of all features is
    activation patching (Vig et al. 2020, arXiv:2004.12265) with the result of a plain torch hook. Cost: one pass over
    the activations.

    Examples:
        >>> import torch, featurizers
        >>> f = featurizers.create("identity", d_in=3)
        >>> f.interchange(torch.zeros(1, 3), torch.ones(1, 3), indices=[2])
        tensor([[0., 0., 1.]])
    """

    kind: ClassVar[str] = "identity"
    Config: ClassVar[type[BaseModel]] = IdentityConfig

    def __init__(self, config: IdentityConfig) -> None:
        super().__init__(config)
        self.d_in = self.n_features = config.d_in

    def featurize(self, x: Float[Tensor, "*batch d_in"]) -> tuple[Float[Tensor, "*batch d_in"], Error]:
        """Return a copy of x and no error."""
        return x.clone(), None

    def inverse_featurize(self, features: Float[Tensor, "*batch d_in"], error: Error) -> Float[Tensor, "*batch d_in"]:
        """Return a copy of the features."""
        return features.clone()

    def encode(self, x: Float[Tensor, "*batch d_in"], columns: Tensor | None = None) -> Float[Tensor, "*batch k"]:
        """Return x itself, or the given columns of it."""
        return x if columns is None else x[..., columns]

    def apply_edit(
        self,
        base: Float[Tensor, "*batch d_in"],
        features: Float[Tensor, "*batch k"],
        edited: Float[Tensor, "*batch k"],
        columns: Tensor | None = None,
    ) -> Float[Tensor, "*batch d_in"]:
        """Put the edited coordinates in their columns of ``base``; no difference is computed, so nothing is rounded."""
        edited = edited.to(base.dtype)
        return edited if columns is None else base.index_copy(-1, columns, edited)

    def feature_rows(self, columns: Tensor | None = None) -> FeatureRows:
        """See `Featurizer.feature_rows`.

        Raises:
            LoweringError: the width is not known.
        """
        if self.d_in is None:
            return super().feature_rows(columns)
        eye = torch.eye(self.d_in)
        rows = eye if columns is None else eye[columns]
        return FeatureRows.linear(rows, rows)


@hookimpl
def featurizers_register(register: Any) -> None:
    """Register the kind ``identity``."""
    register(IdentityFeaturizer)
