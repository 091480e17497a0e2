"""`StandardizeFeaturizer`: coordinates without their mean, in units of their standard deviation."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, final

import torch
from featurizers import Error, Featurizer, hookimpl
from featurizers.errors import BasisError, ShapeError
from featurizers.features import FeatureRows, Gate
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor


class StandardizeConfig(BaseModel):
    """Configuration of a `StandardizeFeaturizer`.

    Attributes:
        d_in: width of the activations.
    """

    model_config = ConfigDict(strict=True, extra="forbid")
    d_in: Annotated[int, Field(gt=0, le=2**24)]


@final
class StandardizeFeaturizer(Featurizer[StandardizeConfig]):
    """Standardized coordinates: f = (x - mean) / std, coordinate by coordinate.

    Lossless. Placed before a `SubspaceFeaturizer`, it centres principal components on the mean of the data that they
    were fitted to. Stored as ``mean (d_in)`` and ``std (d_in)``, which are not trained. Cost: one pass over the
    activations.

    Examples:
        >>> import torch
        >>> x = torch.tensor([[0.0, 1.0], [2.0, 5.0]])
        >>> StandardizeFeaturizer.fit(x).encode(x)
        tensor([[-1., -1.],
                [ 1.,  1.]])
    """

    kind: ClassVar[str] = "standardize"
    Config: ClassVar[type[BaseModel]] = StandardizeConfig

    mean: Tensor
    std: Tensor

    def __init__(self, config: StandardizeConfig) -> None:
        super().__init__(config)
        self.d_in = self.n_features = config.d_in
        self.register_buffer("mean", torch.zeros(config.d_in))
        self.register_buffer("std", torch.ones(config.d_in))

    @classmethod
    def fit(cls, x: Float[Tensor, "*n d_in"], *, scale: bool = True) -> StandardizeFeaturizer:
        """Fit to the mean and the population standard deviation of activations, computed in double precision.

        Args:
            x: activations; all axes but the last are examples.
            scale: divide by the standard deviation; if False, only subtract the mean. A coordinate that never varies
                is not divided.

        Raises:
            ShapeError: there are no examples.
        """
        rows = x.detach().reshape(-1, x.shape[-1]).double()
        if not len(rows):
            raise ShapeError(f"x has shape {tuple(x.shape)}, which holds no activations; give at least one")
        dtype = x.dtype if x.dtype in (torch.float32, torch.float64) else torch.float32
        std = rows.std(dim=0, correction=0) if scale else torch.ones_like(rows[0])
        return cls.from_statistics(rows.mean(dim=0).to(dtype), torch.where(std > 0, std, 1.0).to(dtype))

    @classmethod
    def from_statistics(cls, mean: Float[Tensor, " d_in"], std: Float[Tensor, " d_in"]) -> StandardizeFeaturizer:
        """Build a featurizer from a mean and a standard deviation.

        Raises:
            ShapeError: they are not two vectors of the same length.
            BasisError: a standard deviation is not positive.
        """
        if mean.dim() != 1 or mean.shape != std.shape:
            raise ShapeError(
                f"mean and std are vectors of one length, got shapes {tuple(mean.shape)}, {tuple(std.shape)}"
            )
        self = cls(StandardizeConfig(d_in=len(mean)))
        self.mean, self.std = mean.detach().clone(), std.detach().clone()
        self.check()
        return self

    def featurize(self, x: Float[Tensor, "*batch d_in"]) -> tuple[Float[Tensor, "*batch d_in"], Error]:
        """Return standardized coordinates and no error."""
        self.check_width(x)
        return (x - self.mean) / self.std, None

    def inverse_featurize(self, features: Float[Tensor, "*batch d_in"], error: Error) -> Float[Tensor, "*batch d_in"]:
        """Return the coordinates in the units of the activations."""
        self.check_features(features)
        return features * self.std + self.mean

    def encode(self, x: Float[Tensor, "*batch d_in"], columns: Tensor | None = None) -> Float[Tensor, "*batch k"]:
        """Return standardized coordinates, all or those in ``columns``."""
        self.check_width(x)
        if columns is None:
            return (x - self.mean) / self.std
        return (x[..., columns] - self.mean[columns]) / self.std[columns]

    def apply_edit(
        self,
        base: Float[Tensor, "*batch d_in"],
        features: Float[Tensor, "*batch k"],
        edited: Float[Tensor, "*batch k"],
        columns: Tensor | None = None,
    ) -> Float[Tensor, "*batch d_in"]:
        """Return ``base + std (edited - features)``; the mean cancels."""
        change = edited - features
        if columns is None:
            return (base + change * self.std).to(base.dtype)
        change = change * self.std[columns]
        return base.to(change.dtype).index_add(-1, columns, change).to(base.dtype)

    def feature_rows(self, columns: Tensor | None = None) -> FeatureRows:
        """See `Featurizer.feature_rows`."""
        std, mean = self.std[slice(None) if columns is None else columns], self.mean
        units = torch.eye(len(mean), dtype=std.dtype, device=std.device)[slice(None) if columns is None else columns]
        read = units / std[:, None]
        return FeatureRows(read, -read @ mean, Gate.of(std), units * std[:, None])

    def check(self) -> None:
        """Raise `BasisError` unless every standard deviation is positive."""
        if not (self.std > 0).all():
            raise BasisError(f"a standard deviation is not positive: the smallest is {float(self.std.min())}")


@hookimpl
def featurizers_register(register: Any) -> None:
    """Register the kind ``standardize``."""
    register(StandardizeFeaturizer)
