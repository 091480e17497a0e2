"""`DiagonalFeaturizer`: each coordinate times a number of its own."""

from __future__ import annotations

from typing import Annotated, ClassVar, final

import torch
from featurizers import Error, Featurizer
from featurizers.errors import ConfigError, ShapeError
from featurizers.features import FeatureRows
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor


class DiagonalConfig(BaseModel):
    """Configuration of a `DiagonalFeaturizer`.

    Attributes:
        d_in: width of the activations.
    """

    model_config = ConfigDict(strict=True, extra="forbid")
    d_in: Annotated[int, Field(gt=0, le=2**24)]


@final
class DiagonalFeaturizer(Featurizer[DiagonalConfig]):
    """Multiplies each coordinate by its gain: f = gain * x, error = x where the gain is zero and 0 elsewhere.

    Lossless. Signed write norms and direct effects along one direction are such maps. A coordinate whose gain is zero
    has a feature that is always zero, and no edit changes it. Stored as ``gain (d_in)``, not trained. Cost: one pass
    over the activations.

    Examples:
        >>> import torch
        >>> f = DiagonalFeaturizer.from_gain(torch.tensor([2.0, 0.0]))
        >>> f.featurize(torch.tensor([3.0, 5.0]))
        (tensor([6., 0.]), tensor([0., 5.]))
    """

    kind: ClassVar[str] = "derived-scalars.diagonal"
    Config: ClassVar[type[BaseModel]] = DiagonalConfig

    gain: Tensor

    def __init__(self, config: DiagonalConfig) -> None:
        super().__init__(config)
        self.d_in = self.n_features = config.d_in
        self.register_buffer("gain", torch.ones(config.d_in))

    @classmethod
    def from_gain(cls, gain: Float[Tensor, " d_in"]) -> DiagonalFeaturizer:
        """Return the featurizer of these gains.

        Raises:
            ShapeError: they are not a vector of real numbers.
            ConfigError: a gain is not finite.
        """
        if gain.dim() != 1 or not gain.is_floating_point() or not len(gain):
            raise ShapeError(f"gains are a vector of real numbers, not {gain.dtype} {tuple(gain.shape)}")
        self = cls(DiagonalConfig(d_in=len(gain)))
        self.gain = gain.detach().clone()
        self.check()
        return self

    def featurize(self, x: Float[Tensor, "*batch d_in"]) -> tuple[Float[Tensor, "*batch d_in"], Error]:
        """Return coordinates times their gains, and the coordinates that a gain of zero would lose."""
        return x * self.gain, torch.where(self.gain == 0, x, 0.0)

    def inverse_featurize(self, features: Float[Tensor, "*batch d_in"], error: Error) -> Float[Tensor, "*batch d_in"]:
        """Return the coordinates.

        Raises:
            ShapeError: the error is not a tensor.
        """
        if not isinstance(error, Tensor):
            raise ShapeError(f"the error of {self.id!r} is a tensor, not {type(error).__name__}")
        return features * self._inverse + error

    def encode(self, x: Float[Tensor, "*batch d_in"], columns: Tensor | None = None) -> Float[Tensor, "*batch k"]:
        """Return coordinates times their gains, all or some."""
        return x * self.gain if columns is None else x[..., columns] * self.gain[columns]

    def apply_edit(
        self,
        base: Float[Tensor, "*batch d_in"],
        features: Float[Tensor, "*batch k"],
        edited: Float[Tensor, "*batch k"],
        columns: Tensor | None = None,
    ) -> Float[Tensor, "*batch d_in"]:
        """Return ``base + (edited - features) / gain``."""
        change = edited - features
        if columns is None:
            return (base + change * self._inverse).to(base.dtype)
        change = change * self._inverse[columns]
        return base.to(change.dtype).index_add(-1, columns, change).to(base.dtype)

    def feature_rows(self, columns: Tensor | None = None) -> FeatureRows:
        """See `Featurizer.feature_rows`."""
        where = slice(None) if columns is None else columns
        units = torch.eye(len(self.gain), dtype=self.gain.dtype, device=self.gain.device)[where]
        return FeatureRows.linear(units * self.gain[where][:, None], units * self._inverse[where][:, None])

    @property
    def _inverse(self) -> Tensor:
        return torch.where(self.gain == 0, 0.0, 1 / self.gain)

    def check(self) -> None:
        """Raise `ConfigError` unless every gain is finite."""
        if not bool(self.gain.isfinite().all()):
            raise ConfigError("a gain is not finite")
