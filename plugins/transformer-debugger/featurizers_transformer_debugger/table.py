"""All 106 scalars of OpenAI's transformer-debugger, each as a quantity, a basis and reductions.

Source: the enum ``DerivedScalarType`` of github.com/openai/transformer-debugger, commit 87e6db7b. Names, shapes and
formulas are facts of that project; no code was copied.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from featurizers_derived_scalars.nodes import NodeAxis

AXES: Final[dict[str, NodeAxis]] = {
    "T": "token",
    "K": "key",
    "P": "pair",
    "H": "head",
    "C": "d_head",
    "M": "neuron",
    "D": "d_model",
    "V": "vocab",
    "Z": "feature",
    "1": "one",
}
"""Axis that each letter of a shape in the table below stands for."""

_TABLE: Final = """
logits                                       TV   value              logits
resid_post_embedding                         TD   value              resid.embed
mlp_pre_act                                  TM   value              mlp.pre
mlp_post_act                                 TM   value              mlp.neurons
resid_delta_mlp                              TD   value              mlp.delta
resid_post_mlp                               TD   value              resid.post
attn_query                                   THC  value              attn.q              scaled
attn_key                                     KHC  value              attn.k              scaled
attn_value                                   KHC  value              attn.v
attn_qk_logits                               TKH  value              attn.logits
attn_qk_probs                                TKH  value              attn.probs
attn_weighted_sum_of_values                  THC  value              attn.z
resid_delta_attn                             TD   value              attn.delta
resid_post_attn                              TD   value              resid.mid
resid_final_layer_norm_scale                 T1   value              norm.final.scale
attn_input_layer_norm_scale                  T1   value              norm.attn.scale
mlp_input_layer_norm_scale                   T1   value              norm.mlp.scale
online_autoencoder_latent                    TZ   value              any
attn_write_norm                              PH   write_norm         attn.probs          pairs
flattened_attn_post_softmax                  PH   value              attn.probs          pairs
attn_act_times_grad                          PH   act_times_grad     attn.probs          pairs
resid_delta_mlp_from_mlp_post_act            TD   write_sum          mlp.neurons
mlp_write_norm                               TM   write_norm         mlp.neurons         signed
mlp_act_times_grad                           TM   act_times_grad     mlp.neurons
autoencoder_latent                           TZ   value              any
autoencoder_write_norm                       TZ   write_norm         any                 signed
mlp_write_to_final_residual_grad             TM   write_to           mlp.neurons
attn_write_norm_per_sequence_token           TH   write_norm         attn.z/whole
attn_write_to_final_residual_grad_per_sequence_token TH write_to     attn.z/whole
attn_act_times_grad_per_sequence_token       TH   act_times_grad     attn.probs          sum_keys
resid_post_embedding_norm                    T1   norm               resid.embed
resid_post_mlp_norm                          T1   norm               resid.post
mlp_layer_write_norm                         T1   norm               mlp.delta
resid_post_attn_norm                         T1   norm               resid.mid
attn_layer_write_norm                        T1   norm               attn.delta
resid_post_embedding_proj_to_final_residual_grad T1 write_to         resid.embed/whole
resid_post_mlp_proj_to_final_residual_grad   T1   write_to           resid.post/whole    strict
mlp_layer_write_to_final_residual_grad       T1   write_to           mlp.delta/whole
resid_post_attn_proj_to_final_residual_grad  T1   write_to           resid.mid/whole     strict
attn_layer_write_to_final_residual_grad      T1   write_to           attn.delta/whole
unflattened_attn_act_times_grad              TKH  act_times_grad     attn.probs
unflattened_attn_write_norm                  TKH  write_norm         attn.probs
unflattened_attn_write_to_final_residual_grad TKH write_to           attn.probs
attn_write_to_final_residual_grad            PH   write_to           attn.probs          pairs
online_autoencoder_act_times_grad            TZ   act_times_grad     any
online_autoencoder_write_norm                TZ   write_norm         any                 signed
online_autoencoder_write_to_final_residual_grad TZ write_to          any
online_mlp_autoencoder_error                 TM   value              mlp.neurons/error
online_residual_mlp_autoencoder_error        TD   value              mlp.delta/error
online_residual_attention_autoencoder_error  TD   value              attn.delta/error
online_mlp_autoencoder_error_act_times_grad  TM   act_times_grad     mlp.neurons/error
online_mlp_autoencoder_error_write_norm      TM   write_norm         mlp.neurons/error   signed
online_mlp_autoencoder_error_write_to_final_residual_grad TM write_to mlp.neurons/error
attn_write                                   TKHD write              attn.probs
attn_write_sum_heads                         TKD  write_sum          attn.probs
mlp_write                                    TMD  write              mlp.neurons
online_autoencoder_write                     TZD  write              any
attn_weighted_value                          TKHC weighted_value     attn.probs
previous_layer_resid_post_mlp                TD   value              resid.pre
mlp_write_to_final_activation_residual_grad  TM   write_to_node      mlp.neurons
unflattened_attn_write_to_final_activation_residual_grad TKH write_to_node attn.probs
online_autoencoder_write_to_final_activation_residual_grad TZ write_to_node any
resid_post_embedding_proj_to_final_activation_residual_grad T1 write_to_node resid.embed/whole
autoencoder_latent_grad_wrt_residual_input   TD   latent_direction   residual
autoencoder_latent_grad_wrt_mlp_post_act_input TM latent_direction   mlp.neurons/features
attn_write_to_latent                         TKH  write_to_latent    attn.delta/features
attn_write_to_latent_summed_over_heads       TK1  write_to_latent    attn.delta/features sum_heads
flattened_attn_write_to_latent_summed_over_heads P1 write_to_latent  attn.delta/features sum_heads,pairs
flattened_attn_write_to_latent_summed_over_heads_batched PZ pair_attribution attn.delta/features pairs
attn_write_to_latent_per_sequence_token      TH   token_write_to_latent  attn.delta/features
attn_write_to_latent_per_sequence_token_batched THZ token_write_to_latents attn.delta/features
token_attribution                            T1   act_times_grad     resid.embed/whole
single_node_write                            TD   node_write         node
grad_of_single_subnode_attribution           TD   attribution_direction node
attn_out_edge_attribution                    TKH  edge_to            attn.probs
mlp_out_edge_attribution                     TM   edge_to            mlp.neurons
online_autoencoder_out_edge_attribution      TZ   edge_to            any
attn_query_in_edge_attribution               TKH  edge_from          attn.probs/q
attn_key_in_edge_attribution                 TKH  edge_from          attn.probs/k
attn_value_in_edge_attribution               TKH  edge_from          attn.probs/v
mlp_in_edge_attribution                      TM   edge_from          mlp.neurons
online_autoencoder_in_edge_attribution       TZ   edge_from          any
token_out_edge_attribution                   T1   edge_to            resid.embed/whole
single_node_write_to_final_residual_grad     T1   node_write_to      node
vocab_token_write_to_input_direction         TV   vocab_activation   node
always_one                                   T1   ones               resid.embed
attn_query_in_edge_activation                TKH  activation_from    attn.probs/q
attn_key_in_edge_activation                  TKH  activation_from    attn.probs/k
mlp_in_edge_activation                       TM   activation_from    mlp.neurons
online_autoencoder_in_edge_activation        TZ   activation_from    any
mlp_autoencoder_latent                       TZ   value              mlp
mlp_autoencoder_write_norm                   TZ   write_norm         mlp                 signed
online_mlp_autoencoder_latent                TZ   value              mlp
online_mlp_autoencoder_write                 TZD  write              mlp
online_mlp_autoencoder_write_norm            TZ   write_norm         mlp                 signed
online_mlp_autoencoder_act_times_grad        TZ   act_times_grad     mlp
online_mlp_autoencoder_write_to_final_residual_grad TZ write_to      mlp
online_mlp_autoencoder_write_to_final_activation_residual_grad TZ write_to_node mlp
attention_autoencoder_latent                 TZ   value              attention
attention_autoencoder_write_norm             TZ   write_norm         attention           signed
online_attention_autoencoder_latent          TZ   value              attention
online_attention_autoencoder_write           TZD  write              attention
online_attention_autoencoder_write_norm      TZ   write_norm         attention           signed
online_attention_autoencoder_act_times_grad  TZ   act_times_grad     attention
online_attention_autoencoder_write_to_final_residual_grad TZ write_to attention
online_attention_autoencoder_write_to_final_activation_residual_grad TZ write_to_node attention
"""

NEED_A_NODE: Final = frozenset(
    {
        *("write_to_node", "node_write", "node_write_to", "attribution_direction", "vocab_activation"),
        *("edge_to", "edge_from", "activation_from"),
    }
)
"""Quantities of a node, or along a node's gradient."""

TAKE_A_NODE: Final = NEED_A_NODE | {"write_to"}
"""These, and quantities that are along the metric's gradient unless a node is given."""

NEED_A_LATENT: Final = frozenset({"latent_direction", "write_to_latent", "token_write_to_latent"})
"""Quantities of one feature."""

FEATURIZED: Final[dict[str, tuple[str, ...]]] = {
    "any": ("mlp.neurons", "mlp.delta", "mlp.out", "attn.delta", "attn.out", "attn.z", "resid.mid", "resid.post"),
    "mlp": ("mlp.neurons", "mlp.delta", "mlp.out"),
    "attention": ("attn.delta", "attn.out", "attn.z"),
    "residual": ("mlp.delta", "attn.delta", "mlp.out", "attn.out", "resid.mid", "resid.post"),
}
"""Kinds of place that the featurizer of a basis may be at, by the word for them in the table."""


class Row(NamedTuple):
    """A scalar of transformer-debugger.

    Attributes:
        name: name in lower case.
        shape: its axes, for one sequence.
        quantity: name of the quantity.
        kind: kind of place of the basis; a key of `FEATURIZED` for the place of a featurizer; ``node`` for a node.
        option: option of the basis: ``whole``, ``features`` or ``error`` of a featurizer, ``q``, ``k`` or ``v``.
        twists: reductions, and where the number is not what the name says: ``signed``, ``strict``, ``scaled``.
    """

    name: str
    shape: tuple[NodeAxis, ...]
    quantity: str
    kind: str
    option: str
    twists: tuple[str, ...]

    @property
    def featurized(self) -> bool:
        """True if it is of a featurizer's features or error term."""
        return self.kind in FEATURIZED or self.option in ("features", "error")

    @property
    def spelled(self) -> str:
        """Scalar as reductions of a quantity of a basis."""
        basis = f"{self.kind} features" if self.kind in FEATURIZED else f"{self.kind} {self.option}".strip()
        text = f"{self.quantity}({basis})"
        for twist in self.twists:
            text = f"{twist}({text})"
        return text


def _row(line: str) -> Row:
    name, shape, quantity, basis, *twists = line.split()
    kind, _, option = basis.partition("/")
    words = tuple(twists[0].split(",")) if twists else ()
    return Row(name, tuple(AXES[letter] for letter in shape), quantity, kind, option, words)


ROWS: Final = {row.name: row for row in map(_row, _TABLE.strip().splitlines())}
"""Scalars by name."""
