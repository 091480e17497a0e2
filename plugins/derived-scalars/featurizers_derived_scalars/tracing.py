"""Tracing: one node as a scalar of the residual stream before it, and as the metric of a capture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

import torch
from featurizers import DictionaryFeaturizer, Featurizer
from featurizers.builtin import normalize
from featurizers.errors import FeatureIndexError, PositionError, UsageError
from jaxtyping import Float
from torch import Tensor

from featurizers_derived_scalars.activations import RawActivations
from featurizers_derived_scalars.axes import exact
from featurizers_derived_scalars.bases import HEADS
from featurizers_derived_scalars.metrics import Metric
from featurizers_derived_scalars.nodes import Node
from featurizers_derived_scalars.places import Need, Place
from featurizers_derived_scalars.reach import read_by
from featurizers_derived_scalars.sources import need
from featurizers_derived_scalars.views import View, flat

if TYPE_CHECKING:
    from featurizers_derived_scalars.circuit import Circuit


def traced_place(node: Node) -> Place:
    """The place whose tensor is computed for a node: that of its pre-activation, if that is meant.

    Raises:
        UsageError: the node has no such pre-activation, or is no scalar.
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
    pre: Place = Place(kinds[basis.kind], node.layer)
    return pre


def residual_of(node: Node, circuit: Circuit) -> Place:
    """The residual stream that a node is traced to: the one before it, or that which it is a coordinate of."""
    return read_by(circuit, node.place)


def node_needs(node: Node, circuit: Circuit) -> frozenset[Need]:
    """What tracing a node needs captured.

    Raises:
        SiteError: the model has no such place; the message says why.
    """
    circuit.check(traced_place(node))
    residual = residual_of(node, circuit)
    return frozenset({need(residual.kind, "forward", [residual.layer])})


def node_value(
    node: Node,
    resid: Float[Tensor, "token d_model"],
    raw: RawActivations,
    *,
    freeze_norm: bool = True,
    output: Float[Tensor, " d_head"] | None = None,
) -> Float[Tensor, ""]:
    """One node, computed from the residual stream before it, differentiable in that.

    Args:
        node: which; every index a number.
        resid: the residual stream, `residual_of` the node.
        raw: of the sequence.
        freeze_norm: whether the scales of norms on the way are held.
        output: for a head through ``v``: direction at its output ``attn.z``, at the node's token. The scalar is then
            probability * (value . output), the probability held.

    Raises:
        UsageError: a head through ``v`` was given no output.
        PositionError, FeatureIndexError: the node is not in the sequence, or not in the basis.
    """
    index, place, via = node.numbers(), traced_place(node), node.basis.via
    if node.basis.kind == HEADS and via == "v":
        if output is None:
            raise UsageError(f"{node} is no scalar without a direction at the head's output: its values are a vector")
        token, key, head = inside(node, index, (len(raw.tokens), len(raw.tokens), raw.circuit.n_heads))
        of_value = Place("attn.v", node.layer)
        values = raw.circuit.recompute(of_value, resid, raw, through="v", freeze_norm=freeze_norm)
        weight = exact(raw[node.place, "forward"])[token, key, head].detach()
        return weight * (exact(values[key, head]) * output).sum()
    if place.kind.startswith("resid."):
        site = resid
    else:
        site = raw.circuit.recompute(place, resid, raw, through=via, freeze_norm=freeze_norm)
    tensor = _in_basis(node, raw, exact(site))
    return tensor[inside(node, index, tuple(tensor.shape))]


def _in_basis(node: Node, raw: RawActivations, site: Tensor) -> Tensor:
    featurizer = node.basis.featurizer_at(node.layer)
    if featurizer is None:
        return site
    if node.pre_activation:
        return pre_activations(featurizer, flat(site, node.place))
    return View(node.basis, raw, node.layer, site).values


def pre_activations(featurizer: Featurizer[Any], x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch n_features"]:
    """What the activation rule of a dictionary takes.

    Raises:
        UsageError: the featurizer is no dictionary, whose features have no pre-activations that are known.
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
    """The index of a node, if a tensor of its basis has it.

    Raises:
        PositionError, FeatureIndexError: it has not.
    """
    for axis, i, size in zip(node.basis.axes, index, shape, strict=True):
        if not -size <= i < size:
            error = PositionError if axis in ("token", "key") else FeatureIndexError
            raise error(f"{node}: {axis} {i} is not there; there are {size}")
    return index


@final
@dataclass(frozen=True, eq=False)
class NodeMetric(Metric):
    """One node as the metric of a capture: gradients are those of the node, and what is after it has none.

    Attributes:
        node: which.
        circuit: of the model.
        freeze_norm: whether the scale of the norm before the node is held.
        output: for a head through ``v``; see `node_value`. It needs ``attn.probs`` of the layer beside.
    """

    node: Node
    circuit: Circuit
    freeze_norm: bool = True
    output: Tensor | None = None

    def __post_init__(self) -> None:
        """Refuse a node that this model does not have."""
        node_needs(self.node, self.circuit)

    @property
    def needs(self) -> frozenset[Need]:
        """The residual stream before the node."""
        needs = node_needs(self.node, self.circuit)
        through_v = self.node.basis.kind == HEADS and self.node.basis.via == "v"
        return needs | {need(HEADS, "forward", [self.node.layer])} if through_v else needs

    def __call__(self, raw: RawActivations) -> Float[Tensor, ""]:
        """The node's value."""
        resid = raw[residual_of(self.node, self.circuit), "forward"]
        return node_value(self.node, exact(resid), raw, freeze_norm=self.freeze_norm, output=self.output)
