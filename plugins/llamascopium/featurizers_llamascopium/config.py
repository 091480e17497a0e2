"""``config.json`` of llamascopium, of each of its types, checked strictly."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from featurizers.errors import ManifestError, explain, shown
from pydantic import BaseModel, ConfigDict, Field, ValidationError

MAX_LAYERS = 1000
VERSION = "2.0.0b34"
"""Version of llamascopium whose configurations are known."""
Hook = Annotated[str, Field(min_length=1, max_length=200)]
Hooks = Annotated[list[Hook], Field(min_length=1, max_length=MAX_LAYERS)]
Count = Annotated[int, Field(gt=0, le=2**31)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Base(BaseModel):
    """Keys of every type. Those that a model only needs to be trained, or to run fast, are read and not used.

    Attributes:
        sae_type: the type.
        d_model: width of the activations.
        expansion_factor: number of features for each of these.
        use_decoder_bias: whether there is a bias of the decoder.
        act_fn: activation function.
        norm_activation: how activations are brought to the norm √d_model before they are encoded; ``inference``: not.
        sparsity_include_decoder_norm: whether the activation function compares pre-activations times the norms of
            decoder rows.
        top_k: of ``topk``.
    """

    model_config = ConfigDict(strict=True, extra="forbid", protected_namespaces=())
    sae_type: str
    d_model: Annotated[int, Field(gt=0, le=2**24)]
    expansion_factor: Annotated[float, Field(gt=0, le=2**24, allow_inf_nan=False)]
    use_decoder_bias: bool = True
    act_fn: Literal["relu", "jumprelu", "topk", "batchtopk", "batchlayertopk", "layertopk"] = "relu"
    norm_activation: Literal["token-wise", "batch-wise", "dataset-wise", "inference"] = "dataset-wise"
    sparsity_include_decoder_norm: bool = True
    top_k: int = 50
    use_triton_kernel: bool = False
    sparsity_threshold_for_triton_spmm_kernel: float = 0.996
    jumprelu_threshold_window: float = 2.0
    dtype: str | None = None
    device: str | None = None

    @property
    def n_features(self) -> int:
        """Number of features, of each layer if there are several."""
        return int(self.d_model * self.expansion_factor)


class OneSite(Base):
    """Keys of an autoencoder or a transcoder.

    Attributes:
        hook_point_in: hook that is read.
        hook_point_out: hook that is written.
        use_glu_encoder: whether pre-activations are multiplied by the sigmoids of others.
    """

    sae_type: Literal["sae"]
    hook_point_in: Hook
    hook_point_out: Hook
    use_glu_encoder: bool = False

    @property
    def hooks(self) -> list[str]:
        """All hooks."""
        return [self.hook_point_in, self.hook_point_out]


class CrossLayer(Base):
    """Keys of a cross-layer transcoder.

    Attributes:
        hook_points_in: hook that is read in each layer.
        hook_points_out: hook that is written in each layer.
    """

    sae_type: Literal["clt"]
    hook_points_in: Hooks
    hook_points_out: Hooks
    init_cross_layer_decoder_all_zero: bool = False
    decode_with_csr: bool = False
    sparsity_threshold_for_csr: float = 0.05

    @property
    def hooks(self) -> list[str]:
        """All hooks."""
        return [*self.hook_points_in, *self.hook_points_out]


class ManySites(Base):
    """Keys of a crosscoder.

    Attributes:
        hook_points: hooks that are read and written, one for each head.
    """

    sae_type: Literal["crosscoder"]
    hook_points: Hooks

    @property
    def hooks(self) -> list[str]:
        """All hooks."""
        return self.hook_points


class Attention(Base):
    """Keys of a low-rank sparse attention (Lorsa), whose features are output heads that share attention patterns.

    Attributes:
        hook_point_in: hook that is read.
        hook_point_out: hook that is written.
        n_qk_heads: number of attention patterns.
        d_qk_head: width of queries and keys.
        positional_embedding_type: whether queries and keys are rotated by their positions.
        rotary_dim: number of coordinates that are rotated.
        rotary_adjacent_pairs: whether neighbours are rotated with each other, and not the halves.
        rotary_scale: how often each coordinate is repeated before.
        n_ctx: number of positions that the tables of the rotation have.
        attn_scale: divisor of the scores; None for √d_qk_head.
        use_post_qk_ln: whether queries and keys are normalised.
        normalization_type: how.
        eps: of this normalisation.
    """

    sae_type: Literal["lorsa"]
    hook_point_in: Hook
    hook_point_out: Hook
    n_qk_heads: Count
    d_qk_head: Count
    positional_embedding_type: Literal["rotary", "none"] = "rotary"
    rotary_dim: Annotated[int, Field(ge=0, le=2**24)]
    rotary_base: int = 10000
    rotary_adjacent_pairs: bool = True
    rotary_scale: int = 1
    use_NTK_by_parts_rope: bool = False
    NTK_by_parts_factor: float = 1.0
    NTK_by_parts_low_freq_factor: float = 1.0
    NTK_by_parts_high_freq_factor: float = 1.0
    old_context_len: int = 2048
    n_ctx: Count
    attn_scale: Positive | None = None
    use_post_qk_ln: bool = False
    normalization_type: Literal["LN", "RMS"] | None = None
    eps: Positive = 1e-6

    @property
    def hooks(self) -> list[str]:
        """All hooks."""
        return [self.hook_point_in, self.hook_point_out]


Config: TypeAlias = OneSite | CrossLayer | ManySites | Attention
TYPES: dict[str, type[Config]] = {
    "sae": OneSite,
    "clt": CrossLayer,
    "crosscoder": ManySites,
    "lorsa": Attention,
}


def parse(raw: dict[str, Any], where: str) -> Config:
    """Check a ``config.json``, and that its model can be read exactly.

    Raises:
        ManifestError: it is not valid, or features depend on more than this library can give them.
    """
    kind = raw["sae_type"]
    if not isinstance(kind, str) or kind not in TYPES:
        raise ManifestError(where, f"sae_type is {shown(kind)}; known are {', '.join(TYPES)}")
    try:
        config = TYPES[kind].model_validate(raw)
    except ValidationError as error:
        raise ManifestError(
            where, f"config.json: {explain(error)}; known are the keys of llamascopium {VERSION}"
        ) from error
    if reason := _reason_against(config):
        raise ManifestError(where, f"it cannot be read exactly: {reason}")
    return config


def _reason_against(config: Config) -> str | None:
    if config.act_fn in ("batchtopk", "batchlayertopk"):
        return (
            f"with {config.act_fn} the features of a token depend on the others of its batch; llamascopium can convert "
            "such a model to jumprelu"
        )
    if config.act_fn == "layertopk":
        return "layertopk compares the features of all layers, so that early ones depend on what comes later"
    if config.norm_activation == "batch-wise":
        return "batch-wise normalisation makes the features of a token depend on the others of its batch"
    one_site = isinstance(config, OneSite) and config.hook_point_in == config.hook_point_out
    gated = isinstance(config, OneSite) and config.use_glu_encoder
    if config.norm_activation == "token-wise" and (gated or not one_site):
        return (
            "token-wise normalisation scales what is written by the norms of the activations that are there, which is "
            "known for an autoencoder of one site without a gated encoder alone"
        )
    if config.act_fn == "topk" and not 1 <= config.top_k <= config.n_features:
        return f"top_k is {config.top_k}, and there are {config.n_features} features"
    if isinstance(config, CrossLayer) and len(config.hook_points_in) != len(config.hook_points_out):
        return "there are not as many hook_points_out as hook_points_in"
    if isinstance(config, ManySites) and not (config.sparsity_include_decoder_norm and config.use_decoder_bias):
        return "llamascopium knows crosscoders with sparsity_include_decoder_norm and use_decoder_bias alone"
    return _reason_against_attention(config) if isinstance(config, Attention) else None


def _reason_against_attention(config: Attention) -> str | None:
    if config.rotary_scale != 1:
        return f"rotary_scale is {config.rotary_scale}, only 1 is known"
    if config.use_post_qk_ln and config.normalization_type != "RMS":
        return f"queries and keys are normalised by {shown(config.normalization_type)}, only 'RMS' is known"
    if config.n_features % config.n_qk_heads:
        return f"{config.n_features} features do not share {config.n_qk_heads} attention patterns equally"
    if config.positional_embedding_type == "rotary" and not (
        0 < config.rotary_dim <= config.d_qk_head and config.rotary_dim % 2 == 0
    ):
        return f"rotary_dim is {config.rotary_dim}; it must be even, and at most d_qk_head, {config.d_qk_head}"
    return None
