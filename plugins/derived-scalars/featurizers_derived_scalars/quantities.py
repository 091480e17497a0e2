"""Quantities: what is measured of the nodes of a basis. Each returns a `Deriver`."""

from __future__ import annotations

from torch import Tensor

from featurizers_derived_scalars.bases import Basis
from featurizers_derived_scalars.derivers import Deriver
from featurizers_derived_scalars.directions import Direction
from featurizers_derived_scalars.nodes import Node


def value(basis: Basis) -> Deriver:
    """The activations (forward)."""
    raise NotImplementedError


def grad(basis: Basis) -> Deriver:
    """The metric's gradient in the activations (backward)."""
    raise NotImplementedError


def act_times_grad(basis: Basis) -> Deriver:
    """Activation times gradient; of a whole vector their inner product."""
    raise NotImplementedError


def norm(basis: Basis) -> Deriver:
    """Euclidean length of each vector, ``(token, one)`` or ``(token, head)``; the basis is taken whole."""
    raise NotImplementedError


def write(basis: Basis) -> Deriver:
    """What each node adds to the residual stream, basis axes and ``d_model``; big for all but small models."""
    raise NotImplementedError


def write_norm(basis: Basis, *, signed: bool = False) -> Deriver:
    """Length of what each node writes; with ``signed``, times the sign of the activation."""
    raise NotImplementedError


def write_to(basis: Basis, direction: Direction | Node | Tensor | None = None) -> Deriver:
    """Direct effect of each node along a direction: `MetricGrad` if None, `NodeGrad` of a node, `Fixed` of a tensor."""
    raise NotImplementedError


def direction(target: Direction | Node) -> Deriver:
    """The direction itself, ``(token, d_model)``, without layer."""
    raise NotImplementedError


def weighted_value(basis: Basis) -> Deriver:
    """Values times probabilities, ``(token, key, head, d_head)``; basis ``attn.probs``."""
    raise NotImplementedError


def vocab_write(basis: Basis | Node) -> Deriver:
    """Logits that each node writes directly, final norm held, less their mean over the vocabulary: (…, vocab)."""
    raise NotImplementedError


def vocab_read(node: Node) -> Deriver:
    """How far each token's embedding would move a node: ``(vocab,)``, without layer."""
    raise NotImplementedError


def node_write(node: Node) -> Deriver:
    """What one node writes at its token, zero elsewhere, ``(token, d_model)``, without layer."""
    raise NotImplementedError


def node_write_to(node: Node, direction: Direction | Node | Tensor | None = None) -> Deriver:
    """Direct effect of one node, ``(token, one)``, without layer."""
    raise NotImplementedError


def edge_to(basis: Basis, node: Node) -> Deriver:
    """Attribution of the edge from each node of the basis into one node (VJP): write . gradient of the attribution."""
    raise NotImplementedError


def edge_from(node: Node, basis: Basis) -> Deriver:
    """Attribution of the edge from one node into each node of the basis (JVP), times the metric's gradient there."""
    raise NotImplementedError


def activation_from(node: Node, basis: Basis) -> Deriver:
    """Change of each node of the basis with one node's write (JVP)."""
    raise NotImplementedError


def pair_attribution(basis: Basis) -> Deriver:
    """Write of all heads at each pair of tokens along every feature's gradient, ``(token, key, feature)``.

    The basis is a featurizer's features at ``attn.delta`` or ``attn.out``.
    """
    raise NotImplementedError


def ones(basis: Basis) -> Deriver:
    """One at each token, ``(token, one)``."""
    raise NotImplementedError
