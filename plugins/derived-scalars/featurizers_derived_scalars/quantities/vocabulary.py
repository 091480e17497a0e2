"""Quantities of tokens of the vocabulary: the logits that nodes write, and the embeddings that they read."""

from __future__ import annotations

from torch import Tensor

from featurizers_derived_scalars.nodes import Basis, Node, at_least_float32
from featurizers_derived_scalars.quantities.derivers import Context, Deriver
from featurizers_derived_scalars.quantities.directions import NodeGrad
from featurizers_derived_scalars.quantities.layer_maps import Unlayered
from featurizers_derived_scalars.quantities.of_bases import write
from featurizers_derived_scalars.quantities.of_nodes import node_write
from featurizers_derived_scalars.quantities.sources import RawSource


def vocab_write(basis: Basis | Node) -> Deriver:
    """Return the logits that each node writes directly, the final norm held, minus their mean over the vocabulary.

    The final norm's bias and a softcap of the logits are left out.

    Args:
        basis: the nodes; the axes are those of its `write` with ``vocab`` for ``d_model``. Take it whole, or expect a
            big tensor. For one node instead of a basis they are ``(token, vocab)``, zero except at its token.

    Raises:
        UsageError: the kind does not write to the residual stream.
    """
    written = node_write(basis) if isinstance(basis, Node) else write(basis)

    def fn(context: Context, vectors: Tensor, scale: Tensor) -> Tensor:
        scale = scale.reshape(-1, *[1] * (vectors.dim() - 1))
        logits = at_least_float32(context.circuit.unembed(vectors / scale))
        return logits - logits.mean(-1, keepdim=True)

    final_scale, axes = RawSource("norm.final.scale", at=Unlayered()), (*written.axes[:-1], "vocab")
    return written.combine(final_scale, fn, name=f"vocab_write:{basis}", axes=axes)


def node_vocab_write(node: Node) -> Deriver:
    """Return `vocab_write` of one node."""
    return vocab_write(node)


def vocab_read(node: Node) -> Deriver:
    """Return how far each token's embedding would move a node, the norm before it held: ``(vocab,)``, without layer.

    It is the gradient of the node at its own token of the residual stream (for a head through ``k`` or ``v``, at its
    key), times the embedding of every token of the vocabulary.
    """
    token = node.numbers()[1 if node.basis.via in ("k", "v") else 0]

    def fn(context: Context, vector: Tensor) -> Tensor:
        return at_least_float32(context.circuit.token_embeddings()).to(vector.device) @ vector[token]

    return Deriver("vocab_read", (NodeGrad(node),), ("vocab",), fn, {"node": node})
