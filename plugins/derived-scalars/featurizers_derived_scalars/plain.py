"""The quantities of this package as registered specs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from featurizers import Featurizer
from pydantic import BaseModel, ConfigDict

from featurizers_derived_scalars import quantities
from featurizers_derived_scalars.bases import Basis, Part, Via
from featurizers_derived_scalars.derivers import Deriver
from featurizers_derived_scalars.edges import activation_from, edge_from, edge_to
from featurizers_derived_scalars.node_writes import node_write, node_write_to
from featurizers_derived_scalars.nodes import Node
from featurizers_derived_scalars.pair_attribution import pair_attribution
from featurizers_derived_scalars.specs import ScalarSpec

UNITS: Final = ("resid.embed", "attn.probs", "attn.bias", "mlp.neurons", "mlp.bias")
"""Bases that together are the residual stream: the embedding, heads, neurons, and biases, each by its units."""

NODES: Final = ("resid.embed whole", "attn.probs", "attn.bias whole", "mlp.neurons", "mlp.bias whole")
"""The same, where the embedding of a token and a bias are one node each, as they are ranked."""


class OfBasis(BaseModel):
    """Options of a quantity of the nodes of a basis.

    Attributes:
        kind: of place.
        featurizers: by kind, one or one for each layer; that of ``kind`` is the basis's.
        part: of the activations, if there is a featurizer.
        whole: whether a whole vector is one node.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")
    kind: str
    featurizers: Mapping[str, Featurizer[Any] | Mapping[int, Featurizer[Any]]] = {}
    part: Part = "features"
    whole: bool = False

    def basis(self) -> Basis:
        """The basis that they say."""
        return Basis(self.kind, self.featurizers.get(self.kind), self.part, whole=self.whole)


class Whole(OfBasis):
    """Options of `quantities.vocab_write`, of whole vectors unless told otherwise.

    Attributes:
        whole: whether a whole vector is one node.
    """

    whole: bool = True


class Signed(OfBasis):
    """Options of `quantities.write_norm`.

    Attributes:
        signed: whether the length has the sign of the activation.
    """

    signed: bool = False


class Towards(OfBasis):
    """Options of `quantities.write_to`.

    Attributes:
        direction: along which; None for the metric's gradient.
    """

    direction: Any = None


class Edge(OfBasis):
    """Options of an edge.

    Attributes:
        node: at its other end.
    """

    node: Node


class EdgeInto(Edge):
    """Options of an edge into the nodes of a basis.

    Attributes:
        via: which input of heads it goes through; it is nothing to nodes of another kind.
    """

    via: Via | None = None

    def into(self) -> Basis:
        """The basis that they say."""
        return replace(self.basis(), via=self.via if self.kind in ("attn.probs", "attn.logits") else None)


class OfNode(BaseModel):
    """Options of a quantity of one node.

    Attributes:
        node: which.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")
    node: Node


class NodeTowards(OfNode):
    """Options of `node_writes.node_write_to`.

    Attributes:
        direction: along which; None for the metric's gradient.
    """

    direction: Any = None


class Along(BaseModel):
    """Options of `quantities.direction`.

    Attributes:
        direction: which; None for the metric's gradient.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")
    direction: Any = None


def _write_norm(options: Signed) -> Deriver:
    return quantities.write_norm(options.basis(), signed=options.signed)


def _write_to(options: Towards) -> Deriver:
    return quantities.write_to(options.basis(), options.direction)


def _edge_to(options: Edge) -> Deriver:
    return edge_to(options.basis(), options.node)


def _edge_from(options: EdgeInto) -> Deriver:
    return edge_from(options.node, options.into())


def _activation_from(options: EdgeInto) -> Deriver:
    return activation_from(options.node, options.into())


def _node_write_to(options: NodeTowards) -> Deriver:
    return node_write_to(options.node, options.direction)


def plain_specs() -> list[ScalarSpec]:
    """The specs, in the order in which they are explained."""
    of, one = OfBasis, OfNode
    effect = "effect on the metric"
    targets = ("attn.probs", "mlp.neurons")
    return [
        ScalarSpec("value", lambda o: quantities.value(o.basis()), of, "activation", "the activations", UNITS),
        ScalarSpec(
            "grad", lambda o: quantities.grad(o.basis()), of, "gradient", "the metric's gradient in them", NODES
        ),
        ScalarSpec(
            "act_times_grad",
            lambda o: quantities.act_times_grad(o.basis()),
            of,
            effect,
            "activation times gradient: the first-order total effect",
            NODES,
        ),
        ScalarSpec("write_to", _write_to, Towards, effect, "direct effect: write times a direction", NODES),
        ScalarSpec("write_norm", _write_norm, Signed, "length", "length of what a node writes", NODES),
        ScalarSpec("write", lambda o: quantities.write(o.basis()), of, "write", "what a node writes", NODES),
        ScalarSpec(
            "norm",
            lambda o: quantities.norm(o.basis()),
            of,
            "length",
            "length of a vector",
            ("resid.embed", "attn.delta", "mlp.delta", "resid.post"),
        ),
        ScalarSpec(
            "weighted_value",
            lambda o: quantities.weighted_value(o.basis()),
            of,
            "activation",
            "values times probabilities",
            ("attn.probs",),
        ),
        ScalarSpec(
            "direction",
            lambda o: quantities.direction(o.direction),
            Along,
            "gradient",
            "the direction that direct effects are along",
        ),
        ScalarSpec(
            "vocab_write",
            lambda o: quantities.vocab_write(o.basis()),
            Whole,
            "logit",
            "logits that vectors write directly, less their mean",
            ("resid.embed", "attn.delta", "mlp.delta"),
        ),
        ScalarSpec(
            "node_vocab_write",
            lambda o: quantities.vocab_write(o.node),
            one,
            "logit",
            "logits that one node writes directly, less their mean",
        ),
        ScalarSpec(
            "vocab_read",
            lambda o: quantities.vocab_read(o.node),
            one,
            "activation",
            "how tokens' embeddings move a node",
        ),
        ScalarSpec("node_write", lambda o: node_write(o.node), one, "write", "what one node writes"),
        ScalarSpec("node_write_to", _node_write_to, NodeTowards, effect, "direct effect of one node"),
        ScalarSpec("edge_to", _edge_to, Edge, effect, "attribution of edges into one node", NODES),
        ScalarSpec("edge_from", _edge_from, EdgeInto, effect, "attribution of edges out of one node", targets),
        ScalarSpec(
            "activation_from",
            _activation_from,
            EdgeInto,
            "activation",
            "change of nodes with one node's write",
            targets,
        ),
        ScalarSpec(
            "pair_attribution",
            lambda o: pair_attribution(o.basis()),
            of,
            "activation",
            "what heads write at pairs of tokens, along each feature's gradient",
            ("attn.delta",),
        ),
        ScalarSpec("ones", lambda o: quantities.ones(o.basis()), of, "count", "one at each token", ("resid.embed",)),
    ]
