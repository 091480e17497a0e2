"""Edges: the attribution of one node's effect on another through the residual stream between them.

With r the residual stream before a node j, w the write of a node i, and G the metric's gradient,

    edge(i → j) = (∂ j / ∂ r · w_i) G_j        norms before j held at their scales

`edge_to` computes it for many i by one VJP, `edge_from` for many j by one JVP per layer. Both give the same numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from featurizers.errors import UsageError
from torch import Tensor

from featurizers_derived_scalars.capturing import RawActivations
from featurizers_derived_scalars.circuit import Circuit, Need, Place
from featurizers_derived_scalars.nodes import Basis, Node, NodeAxis, View, at_least_float32
from featurizers_derived_scalars.nodes.dependencies import after, read_by
from featurizers_derived_scalars.quantities.derivers import Context, DerivedSource, Deriver
from featurizers_derived_scalars.quantities.directions import NodeGrad
from featurizers_derived_scalars.quantities.layer_maps import Layers, Unlayered
from featurizers_derived_scalars.quantities.of_bases import write_to
from featurizers_derived_scalars.quantities.of_nodes import node_write
from featurizers_derived_scalars.quantities.sources import RawSource, ScalarSource
from featurizers_derived_scalars.quantities.writing import summed_if_whole


def edge_to(basis: Basis, node: Node) -> Deriver:
    """Return the attribution of the edge from each node of a basis into one node.

    It is the write times the gradient of the node's attribution: one VJP of the target's block. Nodes at or after the
    target have no result. With every upstream node and bias it sums to the inner product of the residual stream with
    that gradient (`direction` of ``NodeGrad(node, True)``).

    Raises:
        UsageError: the kind does not write to the residual stream, or the target is a whole vector.
    """
    return write_to(basis, NodeGrad(node, times_metric=True)).renamed(f"edge_to:{basis}")


def edge_from(node: Node, basis: Basis) -> Deriver:
    """Return the attribution of the edge from one node into each node of a basis.

    It is the change of each node with the write, times its gradient: one JVP per layer. Layers that the write does not
    reach have no result. For heads ``basis.via`` says through which of q, k and v; None is through q and k at once.

    Raises:
        UsageError: the kind of the source does not write to the residual stream.
    """
    through_v = basis.via == "v"

    def fn(context: Context, written: Tensor, resid: Tensor, x: Tensor, gradient: Tensor) -> Tensor:
        if through_v:
            values = _change(context, Place("attn.v", context.layer), resid, written, basis)
            return x * torch.einsum("khd,qhd->qkh", values, gradient)
        view = View(basis, context.raw, context.layer, x)
        change = view.follow(_change(context, view.place, resid, written, basis))
        return summed_if_whole(view, change * view.pull(gradient))

    gradient = RawSource("attn.z" if through_v else basis.kind, "backward")
    sources = (
        DerivedSource(node_write(node), Unlayered()),
        _ResidualBefore(basis.kind),
        RawSource(basis.kind),
        gradient,
    )
    params, within = {"node": node, "basis": basis}, after(basis, node.place)
    return Deriver(f"edge_from:{basis}", sources, basis.axes, fn, params, basis, within)


def activation_from(node: Node, basis: Basis) -> Deriver:
    """Return the change of each node of a basis with the write of one node, norms held; layers as in `edge_from`.

    Raises:
        UsageError: the kind of the source does not write to the residual stream; or the basis is heads through ``v``,
            whose probabilities do not change; or it is a whole vector.
    """
    if basis.via == "v":
        raise UsageError("probabilities do not change with values; take the basis attn.v for the change of these")
    if basis.whole:
        raise UsageError(f"{basis} is a vector; take it without whole for the change of its entries")

    def fn(context: Context, written: Tensor, resid: Tensor, x: Tensor) -> Tensor:
        view = View(basis, context.raw, context.layer, x)
        return view.follow(_change(context, view.place, resid, written, basis))

    sources = (DerivedSource(node_write(node), Unlayered()), _ResidualBefore(basis.kind), RawSource(basis.kind))
    params, within = {"node": node, "basis": basis}, after(basis, node.place)
    return Deriver(f"activation_from:{basis}", sources, basis.axes, fn, params, basis, within)


def _change(context: Context, place: Place, resid: Tensor, written: Tensor, basis: Basis) -> Tensor:
    """Return the change of a place's tensor as the residual stream before it moves along a write."""
    if place.kind.startswith("resid."):
        return written

    def compute(x: Tensor) -> Tensor:
        return context.raw.recompute(place, x, through=basis.via)

    return at_least_float32(torch.func.jvp(compute, (resid,), (written.to(resid.dtype),))[1])


@final
@dataclass(frozen=True)
class _ResidualBefore(ScalarSource):
    """Residual stream that a kind of place is computed from, at the same layer."""

    kind: str
    axes: ClassVar[tuple[NodeAxis, ...]] = ("token", "d_model")
    constant: ClassVar[bool] = False

    def needs(self, circuit: Circuit, layers: Layers | None = None) -> frozenset[Need]:
        places = circuit.places(self.kind) if layers is None else [Place(self.kind, layer) for layer in layers]
        return frozenset(Need.at(read_by(circuit, place)) for place in places)

    def layers(self, raw: RawActivations) -> Layers | None:
        circuit, places = raw.circuit, raw.circuit.places(self.kind)
        return frozenset(place.layer for place in places if (read_by(circuit, place), "forward") in raw)

    def derive(self, raw: RawActivations, layer: int | None) -> Tensor:
        return at_least_float32(raw[read_by(raw.circuit, Place(self.kind, layer)), "forward"])
