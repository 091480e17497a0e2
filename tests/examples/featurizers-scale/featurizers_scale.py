from collections.abc import Callable
from typing import Any

import torch
from featurizers import Error, Featurizer, hookimpl
from pydantic import BaseModel, ConfigDict


class ScaleConfig(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    d_in: int


class ScaleFeaturizer(Featurizer[ScaleConfig]):
    """Divides each coordinate by a learned positive scale: lossless."""

    kind = "scale"
    Config = ScaleConfig

    def __init__(self, config: ScaleConfig) -> None:
        super().__init__(config)
        self.d_in = self.n_features = config.d_in
        self.log_scale = torch.nn.Parameter(torch.zeros(config.d_in))

    def featurize(self, x: torch.Tensor) -> tuple[torch.Tensor, Error]:
        return x / self.log_scale.exp(), None

    def inverse_featurize(self, features: torch.Tensor, error: Error) -> torch.Tensor:
        return features * self.log_scale.exp()


@hookimpl
def featurizers_register(register: Callable[[type[Featurizer[Any]]], None]) -> None:
    register(ScaleFeaturizer)
