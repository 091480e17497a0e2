"""Tracing: a node as a scalar of the residual stream before it, and as the metric of a capture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import torch
from featurizers import DictionaryFeaturizer, Featurizer
from featurizers.builtin import normalize
from featurizers.errors import FeatureIndexError, PositionError, UsageError
from jaxtyping import Float
from torch import Tensor

from featurizers_derived_scalars.capturing import Metric, RawActivations
from featurizers_derived_scalars.circuit import Circuit, Need, Place
from featurizers_derived_scalars.nodes import HEADS, Node, View, at_least_float32
from featurizers_derived_scalars.nodes.dependencies import read_by
from featurizers_derived_scalars.nodes.views import flat


def through_values(node: Node) -> bool:
    """Return True for a head that is traced through its values."""
    return node.basis.kind == HEADS and node.basis.via == "v"


def traced_place(node: Node) -> Place:
    """Return the place whose tensor is computed for a node; that of its pre-activation, if the node is one.

    Raises:
        UsageError: the node has no pre-activation, or is a whole vector.
    """
    basis = node.basis
    if basis.whole:
        raise UsageError(f"{node} is a vector; a target is one entry of it, or one feature")
    if not node.pre_activation or basis.featurizer is not None:
        return node.place
    kinds = {"mlp.neurons": "mlp.pre", "mlp.pre": "mlp.pre", HEADS: "attn.logits", "attn.logits": "attn.logits"}
    if basis.kind not in kinds:
        raise UsageError(f"{basis.kind} has no pre-activation; kinds that have one are {', '.join(kinds)}, and latents")
    if basis.via == "v":
        raise UsageError("a head has no pre-activation through its values; leave pre_activation or via='v' out")
    return Place(kinds[basis.kind], node.layer)


def residual_of(node: Node, circuit: Circuit) -> Place:
    """Return the residual stream that a node is traced to: the one before it, or the one that it is a coordinate of."""
    return read_by(circuit, node.place)


def node_needs(node: Node, circuit: Circuit) -> frozenset[Need]:
    """Return what must be captured to trace a node.

    Raises:
        SiteError: the model has no such place; the message says why.
    """
    circuit.check(traced_place(node))
    return frozenset({Need.at(residual_of(node, circuit))})


def node_value(
    node: Node,
    resid: Float[Tensor, "token d_model"],
    raw: RawActivations,
    *,
    freeze_norm: bool = True,
    output: Float[Tensor, " d_head"] | None = None,
) -> Float[Tensor, ""]:
    """Compute one node from the residual stream before it, differentiably.

    Args:
        node: the node; every index is a number.
        resid: residual stream at `residual_of` the node.
        raw: captured tensors of the sequence.
        freeze_norm: hold the scales of norms between the residual stream and the node.
        output: for a head through ``v``, a direction at its output ``attn.z`` at the node's token. The scalar is then
            probability * (value . output), the probability held.

    Raises:
        UsageError: a head through ``v`` was given no output.
        PositionError: the sequence has no such token.
        FeatureIndexError: the basis has no such node.
    """
    index, place, via = node.numbers(), traced_place(node), node.basis.via
    if through_values(node):
        if output is None:
            raise UsageError(f"{node} is no scalar without a direction at the head's output: its values are a vector")
        token, key, head = inside(node, index, (len(raw.tokens), len(raw.tokens), raw.circuit.n_heads))
        values = raw.recompute(Place("attn.v", node.layer), resid, through="v", freeze_norm=freeze_norm)
        probability = at_least_float32(raw[node.place, "forward"])[token, key, head].detach()
        return probability * (at_least_float32(values[key, head]) * output).sum()
    at_node = place.kind.startswith("resid.")
    x = resid if at_node else raw.recompute(place, resid, through=via, freeze_norm=freeze_norm)
    tensor = _in_basis(node, raw, at_least_float32(x))
    return tensor[inside(node, index, tuple(tensor.shape))]


def _in_basis(node: Node, raw: RawActivations, x: Tensor) -> Tensor:
    featurizer = node.basis.featurizer_at(node.layer)
    if featurizer is None:
        return x
    if node.pre_activation:
        return pre_activations(featurizer, flat(x, node.place))
    return View(node.basis, raw, node.layer, x).values


def pre_activations(featurizer: Featurizer[Any], x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch n_features"]:
    """Return the input of a dictionary's activation rule.

    Raises:
        UsageError: the featurizer is no dictionary, so its features have no known pre-activations.
    """
    if not isinstance(featurizer, DictionaryFeaturizer):
        raise UsageError(
            f"the features of a {featurizer.kind!r} have no known pre-activation; leave pre_activation out, or take a "
            "featurizer of kind 'dictionary'"
        )
    normal, _ = normalize(x, featurizer.config.normalize, featurizer.config.input_scale)
    normal = normal - featurizer.b_dec if featurizer.config.pre_bias else normal
    bias = featurizer.get_parameter("b_enc") if featurizer.rule.encoder_bias else None
    return torch.nn.functional.linear(normal.to(featurizer.W_enc.dtype), featurizer.W_enc, bias)


def inside(node: Node, index: tuple[int, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the index of a node, checked to be within the shape of its basis's tensor.

    Raises:
        PositionError: the sequence has no such token.
        FeatureIndexError: the basis has no such node.
    """
    for axis, i, size in zip(node.basis.axes, index, shape, strict=True):
        if not -size <= i < size:
            error = PositionError if axis in ("token", "key") else FeatureIndexError
            raise error(f"{node}: {axis} {i} is not there; there are {size}")
    return index


@final
@dataclass(frozen=True, eq=False)
class NodeMetric(Metric):
    """A node as the metric of a capture: gradients are the node's, and zero in everything after it.

    Attributes:
        node: the node.
        circuit: circuit of the model.
        freeze_norm: hold the scale of the norm before the node.
        output: for a head through ``v``; see `node_value`. It needs ``attn.probs`` of the layer too.

    Raises:
        SiteError: the model does not have the node.
    """

    node: Node
    circuit: Circuit
    freeze_norm: bool = True
    output: Tensor | None = None

    def __post_init__(self) -> None:
        """Check that the model has the node."""
        node_needs(self.node, self.circuit)

    @property
    def needs(self) -> frozenset[Need]:
        """Residual stream before the node, and the probabilities of a head through ``v``."""
        needs = node_needs(self.node, self.circuit)
        return needs | {Need.at(self.node.place)} if through_values(self.node) else needs

    def __call__(self, raw: RawActivations) -> Float[Tensor, ""]:
        """Return the node's value."""
        resid = at_least_float32(raw[residual_of(self.node, self.circuit), "forward"])
        return node_value(self.node, resid, raw, freeze_norm=self.freeze_norm, output=self.output)
