import torch
from featurizers import Featurizer, hookimpl
from pydantic import BaseModel, ConfigDict


class ScaleConfig(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    d_in: int


class ScaleFeaturizer(Featurizer):
    """Divides each coordinate by a learned positive scale: lossless."""

    kind = "scale"
    Config = ScaleConfig

    def __init__(self, config):
        super().__init__(config)
        self.d_in = self.n_features = config.d_in
        self.log_scale = torch.nn.Parameter(torch.zeros(config.d_in))

    def featurize(self, x):
        return x / self.log_scale.exp(), None

    def inverse_featurize(self, features, error):
        return features * self.log_scale.exp()


@hookimpl
def featurizers_register(register):
    register(ScaleFeaturizer)
