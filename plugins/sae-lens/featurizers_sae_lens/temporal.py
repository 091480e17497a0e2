"""`TemporalMap`: features of what earlier tokens do not predict, and of what they predict."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, ClassVar, final

import torch
from featurizers import SiteMap
from featurizers.errors import ConfigError, ShapeError
from featurizers.features import Group
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn import functional

NOVEL, PREDICTED = "novel", "predicted"
_Count = Annotated[int, Field(gt=0, le=2**31)]


class TemporalConfig(BaseModel):
    """Configuration of a `TemporalMap`.

    Attributes:
        d_in: width of the activations.
        n_features: number of features of each group.
        n_heads: of the attention.
        n_attn_layers: number of attention layers.
        bottleneck_factor: factor by which queries and keys are narrower than features.
        k: number of novel features of a token, None for all that are positive.
        tied: whether the decoder is the encoder too.
        pre_bias: whether the bias is subtracted before encoding.
        input_scale: factor of the activations before encoding, which decoding undoes.
        special_tokens: ids of tokens that interventions do not change.
    """

    model_config = ConfigDict(strict=True, extra="forbid")
    d_in: Annotated[int, Field(gt=0, le=2**24)]
    n_features: _Count
    n_heads: _Count = 8
    n_attn_layers: Annotated[int, Field(ge=0, le=1000)] = 1
    bottleneck_factor: _Count = 64
    k: _Count | None = None
    tied: bool = True
    pre_bias: bool = True
    input_scale: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    special_tokens: list[Annotated[int, Field(ge=0, lt=2**31)]] = []


@final
class TemporalMap(SiteMap[TemporalConfig]):
    """Temporal autoencoder of SAELens (arXiv:2511.01836), whose read and write are one site.

    With u = s x - b and E the encoder, each attention layer predicts codes from the earlier tokens' relu(λ E u), scales
    them to the projection of u on what they decode to, and takes that off u. ``predicted`` is their sum, and ``novel``
    the k largest of relu(λ E u) of what is left. The reconstruction is (Dᵀ(novel + predicted) + b) / s.

    Features of a token depend on earlier tokens, so sequences are encoded whole; padding is not attended to. Cost of a
    token: O(n²) for each attention layer, with n features.
    """

    kind: ClassVar[str] = "sae-lens.temporal"
    Config: ClassVar[type[BaseModel]] = TemporalConfig
    encodes_sequences: ClassVar[bool] = True

    def __init__(self, config: TemporalConfig) -> None:
        if config.n_features % (config.bottleneck_factor * config.n_heads):
            raise ConfigError(
                f"n_features is {config.n_features}; it must be a multiple of bottleneck_factor times n_heads, "
                f"{config.bottleneck_factor * config.n_heads}"
            )
        if config.k is not None and config.k > config.n_features:
            raise ConfigError(f"k must be at most the {config.n_features} features, got {config.k}")
        groups = {name: Group(("in",), config.n_features) for name in (NOVEL, PREDICTED)}
        super().__init__(config, groups=groups, reads={"in": config.d_in}, writes={"out": config.d_in})
        self.special_tokens = tuple(config.special_tokens)
        shape = (config.n_features, config.d_in)
        self.W_dec = nn.Parameter(torch.zeros(shape))
        self.b_dec = nn.Parameter(torch.zeros(config.d_in))
        if not config.tied:
            self.W_enc = nn.Parameter(torch.zeros(shape))
        n, narrow = config.n_features, config.n_features // config.bottleneck_factor
        widths = {"k_ctx": narrow, "q_target": narrow, "v_ctx": n, "c_proj": n}
        self.attn_layers = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(n, width) for name, width in widths.items()})
            for _ in range(config.n_attn_layers)
        )
        self.requires_grad_(False)

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
            ShapeError: the activations are not ``(batch, sequence, width)``.
        """
        if x["in"].dim() != 3:
            raise ShapeError(
                f"{self.id!r} encodes whole sequences, (batch, sequence, {self.config.d_in}), "
                f"not {tuple(x['in'].shape)}"
            )
        residual = x["in"].to(self.W_dec.dtype) * self.config.input_scale
        residual = residual - self.b_dec if self.config.pre_bias else residual
        predicted = torch.zeros((), dtype=residual.dtype, device=residual.device)
        for layer in self.attn_layers:
            codes = self._attend(layer, self._codes(residual), is_token)  # type: ignore[arg-type]
            decoded = codes @ self.W_dec
            norm = decoded.norm(dim=-1, keepdim=True) + 1e-6
            scale = (decoded * residual).sum(dim=-1, keepdim=True) / norm.pow(2)
            predicted, residual = predicted + codes * scale, residual - scale * decoded
        if group == PREDICTED:
            features = predicted.expand(*residual.shape[:-1], self.config.n_features)
        else:
            features = self._codes(residual)
            if self.config.k is not None:
                top = features.topk(self.config.k, dim=-1)
                features = torch.zeros_like(features).scatter(-1, top.indices, top.values)
        return features if columns is None else features[..., columns]

    def _codes(self, residual: Tensor) -> Tensor:
        encoder = self.W_dec if self.config.tied else self.W_enc
        return functional.linear(residual * (1 / (4 * self.config.d_in)), encoder).relu()

    def _attend(self, layer: nn.ModuleDict, codes: Tensor, is_token: Tensor | None) -> Tensor:
        """Return the codes that a layer predicts for each token from those of earlier tokens."""
        real = codes if is_token is None else codes * is_token[..., None]
        earlier = functional.pad(real[:, :-1], (0, 0, 1, 0))
        length = codes.shape[1]
        mask = torch.ones(length, length, dtype=torch.bool, device=codes.device).tril()
        if is_token is not None:  # padding attends to itself alone: a row without any key would be NaN
            own = torch.eye(length, dtype=torch.bool, device=codes.device)
            mask = ((mask & is_token[:, None].bool()) | own)[:, None]
        q, k, v = layer["q_target"](codes), layer["k_ctx"](earlier), layer["v_ctx"](earlier)
        q, k, v = (part.unflatten(-1, (self.config.n_heads, -1)).transpose(1, 2) for part in (q, k, v))
        scores = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).masked_fill(~mask, -math.inf)
        mixed = (scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(-2)
        attended: Tensor = layer["c_proj"](mixed)
        return attended.relu()

    def decode(
        self, write: str, features: Mapping[str, Tensor], x: Mapping[str, Tensor]
    ) -> Float[Tensor, "*batch d_in"]:
        """Return the reconstruction from both groups."""
        total = (features[NOVEL] + features[PREDICTED]).to(self.W_dec.dtype) @ self.W_dec
        biased = self.config.pre_bias or not self.config.tied
        return (total + self.b_dec if biased else total) / self.config.input_scale

    def decode_change(
        self, write: str, group: str, change: Float[Tensor, "*batch k"], columns: Tensor | None = None
    ) -> Float[Tensor, "*batch d_in"]:
        """Return the change of the reconstruction."""
        rows = self.W_dec if columns is None else self.W_dec[columns]
        return change.to(rows.dtype) @ rows / self.config.input_scale
