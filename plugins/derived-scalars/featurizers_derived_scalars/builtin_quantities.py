"""Quantities of this package, under their names."""

from __future__ import annotations

from typing import Final

from featurizers_derived_scalars.quantities import (
    act_times_grad,
    activation_from,
    direction,
    edge_from,
    edge_to,
    grad,
    node_vocab_write,
    node_write,
    node_write_to,
    norm,
    ones,
    pair_attribution,
    value,
    vocab_read,
    vocab_write,
    weighted_value,
    write,
    write_norm,
    write_to,
)
from featurizers_derived_scalars.specs import ScalarSpec

UNITS: Final = ("resid.embed", "attn.probs", "attn.bias", "mlp.neurons", "mlp.bias")
"""Bases that together are the residual stream: the embedding, heads, neurons and biases, each by its units."""

NODES: Final = ("resid.embed whole", "attn.probs", "attn.bias whole", "mlp.neurons", "mlp.bias whole")
"""Same bases, with a token's embedding and each bias as one node, as they are ranked."""

TARGETS: Final = ("attn.probs", "mlp.neurons")
VECTORS: Final = ("resid.embed", "attn.delta", "mlp.delta")
EFFECT: Final = "effect on the metric"

SPECS: Final[tuple[ScalarSpec, ...]] = (
    ScalarSpec.of(value, "activation", "the activations", UNITS),
    ScalarSpec.of(grad, "gradient", "the metric's gradient in them", NODES),
    ScalarSpec.of(act_times_grad, EFFECT, "activation times gradient: the first-order total effect", NODES),
    ScalarSpec.of(write_to, EFFECT, "direct effect: write times a direction", NODES),
    ScalarSpec.of(write_norm, "length", "length of what a node writes", NODES),
    ScalarSpec.of(write, "write", "what a node writes", NODES),
    ScalarSpec.of(norm, "length", "length of a vector", (*VECTORS, "resid.post")),
    ScalarSpec.of(weighted_value, "activation", "values times probabilities", ("attn.probs",)),
    ScalarSpec.of(direction, "gradient", "the direction that direct effects are along"),
    ScalarSpec.of(vocab_write, "logit", "logits that vectors write directly, minus their mean", VECTORS, whole=True),
    ScalarSpec.of(node_vocab_write, "logit", "logits that one node writes directly, minus their mean"),
    ScalarSpec.of(vocab_read, "activation", "how tokens' embeddings move a node"),
    ScalarSpec.of(node_write, "write", "what one node writes"),
    ScalarSpec.of(node_write_to, EFFECT, "direct effect of one node"),
    ScalarSpec.of(edge_to, EFFECT, "attribution of edges into one node", NODES),
    ScalarSpec.of(edge_from, EFFECT, "attribution of edges out of one node", TARGETS, via=True),
    ScalarSpec.of(activation_from, "activation", "change of nodes with one node's write", TARGETS, via=True),
    ScalarSpec.of(
        pair_attribution,
        "activation",
        "what heads write at pairs of tokens, along each feature's gradient",
        ("attn.delta",),
    ),
    ScalarSpec.of(ones, "count", "one at each token", ("resid.embed",)),
)
"""Specs in the order in which they are explained."""
