"""Tokens that one node reads and writes."""

from __future__ import annotations

from torch import Tensor

from featurizers_derived_scalars.capturing import RawActivations, capture
from featurizers_derived_scalars.circuit import Need
from featurizers_derived_scalars.nodes import HEADS, WRITERS, Node, at_least_float32
from featurizers_derived_scalars.quantities import Deriver, node_write, vocab_read

Ends = tuple[list[int], list[int]]
"""Ids of tokens: with the largest scores, largest first, and with the smallest, smallest first."""


def writes_tokens(node: Node) -> bool:
    """Return True if a node writes to the residual stream by itself: its kind does, and no axis was summed."""
    return node.basis.kind in WRITERS and None not in node.index


def reads_tokens(node: Node) -> bool:
    """Return True if a node is computed from the residual stream: a head, a neuron or a feature, not a bias or sum."""
    kind, basis = node.basis.kind, node.basis
    unit = basis.is_features or (basis.featurizer is None and kind in (HEADS, "mlp.pre", "mlp.neurons"))
    return unit and kind != "resid.embed" and not basis.whole and None not in node.index


def tokens_written(raw: RawActivations, node: Node, most: int = 6) -> Ends:
    """Return ids of the tokens whose logits a node raises most and lowers most, directly, with the final norm held.

    Raises:
        FeaturizerError: the node does not write to the residual stream.
    """
    deriver, token = node_write(node), node.numbers()[0]
    captured = _capture(raw, deriver, Need("norm.final.scale"))
    vector = deriver.tensor(captured)[token] / at_least_float32(captured.scale("final"))[token]
    return _ends(raw.circuit.unembed(vector), most)


def tokens_read(raw: RawActivations, node: Node, most: int = 6) -> Ends:
    """Return ids of the tokens whose embeddings raise a node most and lower it most, with the norm before it held.

    Raises:
        FeaturizerError: the node is not computed from the residual stream.
    """
    deriver = vocab_read(node)
    return _ends(deriver.tensor(_capture(raw, deriver)), most)


def _capture(raw: RawActivations, deriver: Deriver, *more: Need) -> RawActivations:
    """Capture what a deriver needs on the same prompt."""
    (captured,) = capture(raw.circuit, raw.tokens, [*deriver.needs(raw.circuit), *more])
    return captured


def _ends(scores: Tensor, most: int) -> Ends:
    most = min(most, len(scores))
    largest, smallest = (scores.topk(most, largest=largest).indices.tolist() for largest in (True, False))
    return largest, smallest
