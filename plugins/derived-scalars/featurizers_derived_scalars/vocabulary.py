"""The tokens that one node reads and writes."""

from __future__ import annotations

import torch
from torch import Tensor

from featurizers_derived_scalars.activations import RawActivations
from featurizers_derived_scalars.axes import exact
from featurizers_derived_scalars.bases import WRITERS
from featurizers_derived_scalars.capturing import capture
from featurizers_derived_scalars.circuit import Circuit
from featurizers_derived_scalars.derivers import Deriver
from featurizers_derived_scalars.node_writes import node_write
from featurizers_derived_scalars.nodes import Node
from featurizers_derived_scalars.places import Need
from featurizers_derived_scalars.quantities import vocab_read

Ends = tuple[list[int], list[int]]


def writes_tokens(node: Node) -> bool:
    """Whether a node writes to the residual stream by itself: it is one, with an index on every axis."""
    return node.basis.kind in WRITERS and None not in node.index


def reads_tokens(node: Node) -> bool:
    """Whether a node is computed from the residual stream: a head, a neuron or a feature, not a bias or a sum."""
    kind, features = node.basis.kind, node.basis.featurizer is not None and node.basis.part == "features"
    unit = features or (node.basis.featurizer is None and kind in ("attn.probs", "mlp.pre", "mlp.neurons"))
    return unit and kind != "resid.embed" and not node.basis.whole and None not in node.index


def tokens_written(circuit: Circuit, raw: RawActivations, node: Node, most: int = 6) -> Ends:
    """Ids of the tokens whose logits a node raises most and lowers most, directly and with the final norm held.

    Raises:
        FeaturizerError: the node does not write to the residual stream.
    """
    token = node.numbers()[0]
    ran = _run(circuit, raw, node_write(node), Need("norm.final.scale"))
    vector = node_write(node).tensor(ran)[token]
    return _ends(circuit.unembed(vector / exact(ran.scale("final"))[token]), most)


def tokens_read(circuit: Circuit, raw: RawActivations, node: Node, most: int = 6) -> Ends:
    """Ids of the tokens whose embeddings raise a node most and lower it most, the norm before it held.

    Raises:
        FeaturizerError: the node is not computed from the residual stream.
    """
    return _ends(vocab_read(node).tensor(_run(circuit, raw, vocab_read(node))), most)


def _run(circuit: Circuit, raw: RawActivations, deriver: Deriver, *more: Need) -> RawActivations:
    """The same prompt with what a deriver needs, forward."""
    (ran,) = capture(circuit, raw.tokens, [*deriver.needs(circuit), *more])
    return ran


def _ends(scores: Tensor, most: int) -> Ends:
    with torch.no_grad():
        most = min(most, len(scores))
        best, least = scores.topk(most).indices, scores.topk(most, largest=False).indices
    return best.tolist(), least.tolist()
