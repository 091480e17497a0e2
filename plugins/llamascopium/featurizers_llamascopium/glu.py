"""`GluMap`: a transcoder whose pre-activations are multiplied by the sigmoids of a second encoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Self, final

import torch
from featurizers import SiteMap
from featurizers.builtin import rule_with_options
from featurizers.features import Group
from featurizers_transcoder import ReadConfig, normalized_read
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn import functional

from featurizers_llamascopium.tensors import check_tensors, zeros

GROUP = "features"


class GluConfig(BaseModel):
    """Configuration of a `GluMap`.

    Attributes:
        read: width and normalisation of what is read.
        d_out: width of what is written.
        n_features: number of features.
        rule: name of the activation rule.
        rule_options: numbers of the rule.
        special_tokens: ids of tokens that interventions do not change.
    """

    model_config = ConfigDict(strict=True, extra="forbid")
    read: ReadConfig
    d_out: Annotated[int, Field(gt=0, le=2**24)]
    n_features: Annotated[int, Field(gt=0, le=2**31)]
    rule: Annotated[str, Field(min_length=1, max_length=128)] = "relu"
    rule_options: dict[str, int | float] = {}
    special_tokens: list[Annotated[int, Field(ge=0, lt=2**31)]] = []


@final
class GluMap(SiteMap[GluConfig]):
    """Transcoder with a gated linear unit (Dauphin et al. 2017, arXiv:1612.08083) for an encoder.

    With n the normalisation of the read and ρ the rule,

        z = ρ((W_enc n(x) + b_enc) · sigmoid(W_gate n(x) + b_gate))        ŷ = W_decᵀ z + b_dec

    An edit of k features costs O(k d) a token, for a rule that acts on each feature alone.
    """

    kind: ClassVar[str] = "llamascopium.glu"
    Config: ClassVar[type[BaseModel]] = GluConfig

    def __init__(self, config: GluConfig) -> None:
        groups = {GROUP: Group(("in",), config.n_features)}
        super().__init__(config, groups=groups, reads={"in": config.read.width}, writes={"out": config.d_out})
        self.special_tokens = tuple(config.special_tokens)
        self.rule = rule_with_options(config.rule, config.rule_options, config.n_features)
        d, n = config.read.width, config.n_features
        self.W_enc, self.b_enc = zeros(n, d), zeros(n)
        self.W_gate, self.b_gate = zeros(n, d), zeros(n)
        self.W_dec, self.b_dec = zeros(n, config.d_out), zeros(config.d_out)
        if config.read.centre:
            self.centre = zeros(d)
        self.rule_tensors = nn.ParameterDict({name: zeros(n) for name in self.rule.tensors})

    @classmethod
    def from_tensors(cls, config: GluConfig, tensors: Mapping[str, Tensor]) -> Self:
        """Build a map from weights by the names of its parameters, without copying those that are contiguous.

        Raises:
            ConfigError: a tensor is missing or unknown.
            ShapeError: a tensor has another shape.
        """
        with torch.device("meta"):
            self = cls(config)
        check_tensors(cls.kind, self.state_dict(), tensors)
        self.load_state_dict({name: t.detach().contiguous() for name, t in tensors.items()}, assign=True)
        return self.requires_grad_(False).eval()

    def encode(
        self, group: str, x: Mapping[str, Float[Tensor, "*batch d_in"]], columns: Tensor | None = None
    ) -> Float[Tensor, "*batch k"]:
        """Return the features, or some of them; see `featurizers.SiteMap`."""
        u = x["in"].to(self.W_enc.dtype)
        u = normalized_read(self.config.read, u - self.centre if self.config.read.centre else u)
        rows = slice(None) if columns is None or not self.rule.elementwise else columns
        pre = functional.linear(u, self.W_enc[rows], self.b_enc[rows])
        pre = pre * functional.linear(u, self.W_gate[rows], self.b_gate[rows]).sigmoid()
        tensors = {name: tensor[rows] for name, tensor in self.rule_tensors.items()}
        features = self.rule(pre, tensors, self.config.rule_options)
        return features if columns is None or self.rule.elementwise else features[..., columns]

    def decode(
        self, write: str, features: Mapping[str, Tensor], x: Mapping[str, Tensor]
    ) -> Float[Tensor, "*batch d_out"]:
        """Return the reconstruction."""
        return features[GROUP].to(self.W_dec.dtype) @ self.W_dec + self.b_dec

    def decode_change(
        self, write: str, group: str, change: Float[Tensor, "*batch k"], columns: Tensor | None = None
    ) -> Float[Tensor, "*batch d_out"]:
        """Return the change of the reconstruction."""
        rows = self.W_dec if columns is None else self.W_dec[columns]
        return change.to(rows.dtype) @ rows

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without the rule, whose name is in the config."""
        return {name: value for name, value in self.__dict__.items() if name != "rule"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore the state, and look up the rule among the installed plugins."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.rule = rule_with_options(self.config.rule, self.config.rule_options, self.config.n_features)
