"""`LorsaMap`: low-rank sparse attention, whose features are heads that move one number from token to token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self, final

import torch
from featurizers import SiteMap
from featurizers.builtin import rule_with_options
from featurizers.errors import ConfigError, ShapeError
from featurizers.features import Group
from featurizers_transcoder import ReadConfig, normalized_read
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn import functional

from featurizers_llamascopium.tensors import check_tensors, zeros

GROUP = "features"
_Count = Annotated[int, Field(gt=0, le=2**31)]
_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class LorsaConfig(BaseModel):
    """Configuration of a `LorsaMap`.

    Attributes:
        read: width and normalisation of what is read.
        d_out: width of what is written.
        n_features: number of features.
        n_patterns: number of attention patterns; as many features in a row share one.
        d_head: width of queries and keys.
        scale: divisor of attention scores.
        rotary: whether queries and keys are rotated by their positions: neighbouring coordinates with each other, or
            the first half with the second.
        rotary_dim: number of coordinates that are rotated.
        n_positions: number of positions that the tables of the rotation have.
        norm_eps: of the normalisation of queries and keys by their root mean squares, None without.
        rule: name of the activation rule.
        rule_options: numbers of the rule.
        special_tokens: ids of tokens that interventions do not change.
    """

    model_config = ConfigDict(strict=True, extra="forbid")
    read: ReadConfig
    d_out: Annotated[int, Field(gt=0, le=2**24)]
    n_features: _Count
    n_patterns: _Count
    d_head: Annotated[int, Field(gt=0, le=2**24)]
    scale: _Positive
    rotary: Literal["none", "adjacent", "halves"] = "none"
    rotary_dim: Annotated[int, Field(ge=0, le=2**24)] = 0
    n_positions: Annotated[int, Field(ge=0, le=2**31)] = 0
    norm_eps: _Positive | None = None
    rule: Annotated[str, Field(min_length=1, max_length=128)] = "relu"
    rule_options: dict[str, int | float] = {}
    special_tokens: list[Annotated[int, Field(ge=0, lt=2**31)]] = []


@final
class LorsaMap(SiteMap[LorsaConfig]):
    """Low-rank sparse attention (He et al. 2025, arXiv:2504.20938), which reads and writes around an attention module.

    With n the normalisation of the read, ρ the rule, and h the pattern of feature s,

        q_h = rotate(n(x) W_Q_h + b_Q_h), k_h alike        A_h = softmax(q_h · k_h / scale) over the tokens up to q's
        z_s = ρ(Σ_k A_h[·, k] v_s[k]), v_s = n(x) · W_V_s + b_V_s        ŷ = W_Oᵀ z + b_D

    Features of a token depend on earlier tokens, so sequences are encoded whole; padding is not attended to, and
    positions count tokens. Cost of a token in a sequence of length t: O(n d) and O(t n) for all features.
    """

    kind: ClassVar[str] = "llamascopium.lorsa"
    Config: ClassVar[type[BaseModel]] = LorsaConfig
    encodes_sequences: ClassVar[bool] = True

    def __init__(self, config: LorsaConfig) -> None:
        if config.n_features % config.n_patterns:
            raise ConfigError(f"{config.n_features} features do not share {config.n_patterns} patterns equally")
        rotates = config.rotary != "none"
        if rotates != (config.rotary_dim > 0) or rotates != (config.n_positions > 0):
            raise ConfigError("rotary_dim and n_positions belong to a rotation, and every rotation has both")
        if config.rotary_dim % 2 or config.rotary_dim > config.d_head:
            raise ConfigError(f"rotary_dim must be even and at most d_head, {config.d_head}, not {config.rotary_dim}")
        if config.read.centre:
            raise ConfigError("the read of a sparse attention has no centre")
        groups = {GROUP: Group(("in",), config.n_features)}
        super().__init__(config, groups=groups, reads={"in": config.read.width}, writes={"out": config.d_out})
        self.special_tokens = tuple(config.special_tokens)
        self.rule = rule_with_options(config.rule, config.rule_options, config.n_features)
        d, n, heads = config.read.width, config.n_features, (config.n_patterns, config.d_head)
        self.W_Q, self.W_K = zeros(heads[0], d, heads[1]), zeros(heads[0], d, heads[1])
        self.b_Q, self.b_K = zeros(*heads), zeros(*heads)
        self.W_V, self.b_V = zeros(n, d), zeros(n)
        self.W_O, self.b_D = zeros(n, config.d_out), zeros(config.d_out)
        if config.norm_eps is not None:
            self.norm_Q, self.norm_K = zeros(*heads), zeros(*heads)
        if rotates:
            self.cos = zeros(config.n_positions, config.rotary_dim)
            self.sin = zeros(config.n_positions, config.rotary_dim)
        self.rule_tensors = nn.ParameterDict({name: zeros(n) for name in self.rule.tensors})

    @classmethod
    def from_tensors(cls, config: LorsaConfig, tensors: Mapping[str, Tensor]) -> Self:
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

    # ------------------------------------------------------------------ the map
    def encode(
        self, group: str, x: Mapping[str, Float[Tensor, "*batch d_in"]], columns: Tensor | None = None
    ) -> Float[Tensor, "*batch k"]:
        """Return features of whole sequences without padding."""
        return self.encode_sequences(group, x, None, columns)

    def encode_sequences(
        self, group: str, x: Mapping[str, Tensor], is_token: Tensor | None, columns: Tensor | None = None
    ) -> Float[Tensor, "batch sequence k"]:
        """Return features of whole sequences; see `featurizers.SiteMap`.

        Raises:
            ShapeError: the activations are not ``(batch, sequence, width)``, or the sequence is longer than the tables
                of the rotation.
        """
        if x["in"].dim() != 3:
            raise ShapeError(
                f"{self.id!r} encodes whole sequences, (batch, sequence, {self.config.read.width}), "
                f"not {tuple(x['in'].shape)}"
            )
        u = normalized_read(self.config.read, x["in"].to(self.W_V.dtype))
        patterns = self._patterns(u, is_token)
        share = self.config.n_features // self.config.n_patterns
        rows = columns if self.rule.elementwise else None
        if rows is None:
            values = functional.linear(u, self.W_V, self.b_V)
            values = values.reshape(*values.shape[:-1], self.config.n_patterns, share)
            pre = (patterns @ values.transpose(1, 2)).transpose(1, 2).flatten(-2)
        else:
            values, heads = functional.linear(u, self.W_V[rows], self.b_V[rows]), rows // share
            pre = torch.zeros_like(values)
            for head in sorted(set(heads.tolist())):
                own = (heads == head).nonzero().squeeze(-1)
                pre = pre.index_copy(-1, own, patterns[:, head] @ values[..., own])
        tensors = {name: tensor if rows is None else tensor[rows] for name, tensor in self.rule_tensors.items()}
        features = self.rule(pre, tensors, self.config.rule_options)
        return features if columns is None or self.rule.elementwise else features[..., columns]

    def _patterns(self, u: Tensor, is_token: Tensor | None) -> Float[Tensor, "batch pattern query key"]:
        length = u.shape[1]
        mask = torch.ones(length, length, dtype=torch.bool, device=u.device).tril()
        places = torch.arange(length, device=u.device)[None]
        if is_token is not None:  # padding attends to itself alone: a row without any key would be NaN
            own = torch.eye(length, dtype=torch.bool, device=u.device)
            mask = ((mask & is_token[:, None].bool()) | own)[:, None]
            places = (is_token.long().cumsum(dim=1) - 1).clamp(min=0)
        if self.config.rotary != "none" and places.numel() and int(places.max()) >= self.config.n_positions:
            raise ShapeError(
                f"{self.id!r} knows {self.config.n_positions} positions, and the sequence has {int(places.max()) + 1}"
            )
        queries = self._heads(u, "Q", places)
        keys = self._heads(u, "K", places)
        scores = (queries @ keys.transpose(-2, -1) / self.config.scale).masked_fill(~mask, -torch.inf)
        patterns: Tensor = scores.softmax(dim=-1)
        return patterns

    def _heads(self, u: Tensor, which: str, places: Tensor) -> Float[Tensor, "batch pattern sequence d_head"]:
        """Return queries or keys, normalised and rotated."""
        weight, bias = getattr(self, f"W_{which}"), getattr(self, f"b_{which}")
        heads: Tensor = torch.einsum("bsd,hdq->bhsq", u, weight) + bias[:, None]
        if self.config.norm_eps is not None:
            scale = (heads.pow(2).mean(dim=-1, keepdim=True) + self.config.norm_eps).sqrt()
            heads = heads / scale * getattr(self, f"norm_{which}")[:, None]
        if self.config.rotary == "none":
            return heads
        turned, kept = heads[..., : self.config.rotary_dim], heads[..., self.config.rotary_dim :]
        half, axis = self.config.rotary_dim // 2, -1 if self.config.rotary == "adjacent" else -2
        pairs = turned.reshape(*turned.shape[:-1], *((half, 2) if axis == -1 else (2, half)))
        first, second = pairs.unbind(axis)
        flipped = torch.stack([-second, first], dim=axis).flatten(-2)
        cos, sin = self.cos[places][:, None], self.sin[places][:, None]
        return torch.cat([turned * cos + flipped * sin, kept], dim=-1)

    def decode(
        self, write: str, features: Mapping[str, Tensor], x: Mapping[str, Tensor]
    ) -> Float[Tensor, "*batch d_out"]:
        """Return the reconstruction."""
        return features[GROUP].to(self.W_O.dtype) @ self.W_O + self.b_D

    def decode_change(
        self, write: str, group: str, change: Float[Tensor, "*batch k"], columns: Tensor | None = None
    ) -> Float[Tensor, "*batch d_out"]:
        """Return the change of the reconstruction."""
        rows = self.W_O if columns is None else self.W_O[columns]
        return change.to(rows.dtype) @ rows

    # ------------------------------------------------------------------ pickling
    def __getstate__(self) -> dict[str, Any]:
        """Return the state without the rule, whose name is in the config."""
        return {name: value for name, value in self.__dict__.items() if name != "rule"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore the state, and look up the rule among the installed plugins."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.rule = rule_with_options(self.config.rule, self.config.rule_options, self.config.n_features)
