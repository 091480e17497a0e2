"""transformer-debugger's enumerations: passes, places within a layer, scalars and raw locations."""

from __future__ import annotations

from enum import IntEnum, StrEnum
from typing import Final, cast

from featurizers.errors import UsageError
from featurizers_derived_scalars.circuit import KINDS
from featurizers_derived_scalars.nodes import NodeAxis

from featurizers_transformer_debugger.table import ROWS


class PassType(StrEnum):
    """Activations, or the gradient in them."""

    FORWARD = "forward"
    BACKWARD = "backward"


class LocationWithinLayer(IntEnum):
    """Position in a block's order of computation; a tensor that feeds another has the smaller number."""

    END_OF_PREV_LAYER = 1
    ATTN = 2
    RESID_POST_ATTN = 3
    MLP = 4
    RESID_POST_MLP = 5


class NodeType(StrEnum):
    """Kind of the nodes along the last axis of a scalar."""

    ATTENTION_HEAD = "attention_head"
    QK_CHANNEL = "qk_channel"
    V_CHANNEL = "v_channel"
    MLP_NEURON = "mlp_neuron"
    AUTOENCODER_LATENT = "autoencoder_latent"
    MLP_AUTOENCODER_LATENT = "mlp_autoencoder_latent"
    ATTENTION_AUTOENCODER_LATENT = "attention_autoencoder_latent"
    LAYER = "layer"
    RESIDUAL_STREAM_CHANNEL = "residual_stream_channel"
    VOCAB_TOKEN = "vocab_token"

    @property
    def is_autoencoder_latent(self) -> bool:
        """True for features of any autoencoder."""
        return self.value.endswith("autoencoder_latent")

    @property
    def location_within_layer(self) -> LocationWithinLayer | None:
        """Location in a block, where all such nodes have the same."""
        if self is NodeType.MLP_NEURON:
            return LocationWithinLayer.MLP
        heads = (NodeType.ATTENTION_HEAD, NodeType.QK_CHANNEL, NodeType.V_CHANNEL)
        return LocationWithinLayer.ATTN if self in heads else None


_NODE_TYPES: Final[dict[NodeAxis, NodeType]] = {
    "head": NodeType.ATTENTION_HEAD,
    "d_head": NodeType.V_CHANNEL,
    "neuron": NodeType.MLP_NEURON,
    "feature": NodeType.AUTOENCODER_LATENT,
    "one": NodeType.LAYER,
    "d_model": NodeType.RESIDUAL_STREAM_CHANNEL,
    "vocab": NodeType.VOCAB_TOKEN,
}
_OF_AUTOENCODERS: Final = {
    "mlp": NodeType.MLP_AUTOENCODER_LATENT,
    "attention": NodeType.ATTENTION_AUTOENCODER_LATENT,
}
_OF_GRADIENTS: Final = frozenset(
    {"act_times_grad", "write_to", "node_write_to", "edge_to", "edge_from", "attribution_direction"}
)
_LOCATIONS: Final = {
    "resid_post_embedding": "resid.post_emb",
    "resid_delta_attn": "resid.delta_attn",
    "resid_post_attn": "resid.post_attn",
    "resid_delta_mlp": "resid.delta_mlp",
    "resid_post_mlp": "resid.post_mlp",
    "mlp_input_layer_norm_scale": "mlp_ln.scale",
    "attn_input_layer_norm_scale": "attn_ln.scale",
    "resid_final_layer_norm_scale": "resid.ln_f.scale",
    "attn_query": "attn.q",
    "attn_key": "attn.k",
    "attn_value": "attn.v",
    "attn_qk_logits": "attn.qk_logits",
    "attn_qk_probs": "attn.qk_probs",
    "attn_weighted_sum_of_values": "attn.v_out",
    "mlp_pre_act": "mlp.pre_act",
    "mlp_post_act": "mlp.post_act",
    "logits": "logits",
}
"""Raw locations: the name of the scalar, and the location's value in transformer-debugger."""


def location_of(kind: str) -> LocationWithinLayer | None:
    """Return the location of a kind of place; None for a kind that the model has once."""
    return LocationWithinLayer(KINDS[kind].stage + 1) if KINDS[kind].layered else None


class NamedScalar(StrEnum):
    """Base of `DerivedScalarType`, without members."""

    @property
    def shape_spec_per_token_sequence(self) -> tuple[NodeAxis, ...]:
        """Axes, tokens first."""
        return ROWS[self.value].shape

    @property
    def spelled(self) -> str:
        """Scalar as a quantity, a basis and reductions."""
        return ROWS[self.value].spelled

    @property
    def ndim_per_token_sequence(self) -> int:
        """Number of axes."""
        return len(self.shape_spec_per_token_sequence)

    @property
    def sequence_dim_is_sequence_token_pairs(self) -> bool:
        """True if its first axis is pairs of tokens."""
        return self.shape_spec_per_token_sequence[0] == "pair"

    @property
    def is_raw_activation_type(self) -> bool:
        """True if it is the value of a raw location."""
        return self.value in _LOCATIONS

    @property
    def is_autoencoder_latent(self) -> bool:
        """True for latents, and for all scalars of the features of an MLP's or an attention's autoencoder."""
        return ROWS[self.value].kind in _OF_AUTOENCODERS or self.value.endswith("autoencoder_latent")

    @property
    def node_type(self) -> NodeType:
        """Kind of the nodes along its last axis; for features that are written, the features."""
        if ROWS[self.value].kind in _OF_AUTOENCODERS:
            return _OF_AUTOENCODERS[ROWS[self.value].kind]
        if self.value in ("attn_query", "attn_key"):
            return NodeType.QK_CHANNEL
        return _NODE_TYPES[self.shape_spec_per_token_sequence[-1]]

    @property
    def location_within_layer(self) -> LocationWithinLayer | None:
        """Location in a block, as far as the name alone tells."""
        if self.is_raw_activation_type:
            return self.to_activation_location_type().location_within_layer
        return self.node_type.location_within_layer

    @property
    def has_no_layers(self) -> bool:
        """True if the model has it once.

        Raises:
            UsageError: it is not the value of a raw location.
        """
        return self.to_activation_location_type().has_no_layers

    @property
    def requires_grad_for_forward_pass(self) -> bool:
        """True if it is computed from a gradient."""
        return ROWS[self.value].quantity in _OF_GRADIENTS

    def requires_grad_for_pass_type(self, pass_type: PassType) -> bool:
        """Return True if one of its passes needs a gradient."""
        return pass_type is PassType.BACKWARD or self.requires_grad_for_forward_pass

    @classmethod
    def from_activation_location_type(cls, activation_location_type: NamedLocation) -> NamedScalar:
        """Return the scalar of a raw location's values."""
        return activation_location_type.dst

    def to_activation_location_type(self) -> NamedLocation:
        """Return the raw location that it is the value of.

        Raises:
            UsageError: it is of none.
        """
        if not self.is_raw_activation_type:
            raise UsageError(f"{self.value} is not the value of a raw location; ActivationLocationType has those")
        return ActivationLocationType(_LOCATIONS[self.value])

    def update_from_autoencoder_node_type(self, node_type: NodeType | None) -> NamedScalar:
        """Return the same scalar of an MLP's or an attention's autoencoder; itself for the autoencoder of any place.

        Raises:
            UsageError: there is no such scalar.
        """
        if node_type is None or node_type is NodeType.AUTOENCODER_LATENT:
            return self
        name = self.value.replace("autoencoder", node_type.value.removesuffix("_latent"))
        if name == self.value or name not in ROWS:
            raise UsageError(f"{self.value} is not there for {node_type.value}")
        return DerivedScalarType(name)


class NamedLocation(StrEnum):
    """Base of `ActivationLocationType`, without members."""

    @property
    def kind(self) -> str:
        """Kind of place."""
        return ROWS[self.dst.value].kind

    @property
    def dst(self) -> NamedScalar:
        """Scalar of its values."""
        return DerivedScalarType(self.name.lower())

    @property
    def shape_spec_per_token_sequence(self) -> tuple[NodeAxis, ...]:
        """Axes, tokens first."""
        return self.dst.shape_spec_per_token_sequence

    @property
    def ndim_per_token_sequence(self) -> int:
        """Number of axes."""
        return self.dst.ndim_per_token_sequence

    @property
    def node_type(self) -> NodeType:
        """Kind of the nodes along its last axis."""
        return self.dst.node_type

    @property
    def has_no_layers(self) -> bool:
        """True if the model has it once."""
        return not KINDS[self.kind].layered

    @property
    def location_within_layer(self) -> LocationWithinLayer | None:
        """Location in a block; None for a kind that the model has once."""
        return location_of(self.kind)

    @property
    def exists_by_default(self) -> bool:
        """True: a run of the model computes every location, since features are no locations here."""
        return True


DerivedScalarType: type[NamedScalar] = cast(
    "type[NamedScalar]",
    NamedScalar("DerivedScalarType", {name.upper(): name for name in ROWS}),  # type: ignore[call-arg]
)
"""All 106 names; the value of each is its name in lower case."""

ActivationLocationType: type[NamedLocation] = cast(
    "type[NamedLocation]",
    NamedLocation("ActivationLocationType", {name.upper(): value for name, value in _LOCATIONS.items()}),  # type: ignore[call-arg]
)
"""Raw locations, under the names of the scalars of their values."""
