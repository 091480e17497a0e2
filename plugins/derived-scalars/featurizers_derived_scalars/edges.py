"""Edges: attributions of what one node does to another through the residual stream between them.

With r the residual stream before a node j, w the write of a node i, and G the metric's gradient,

    edge(i → j) = (∂ j / ∂ r · w_i) G_j        norms before j held at their scales

`edge_to` computes it for many i by one VJP, `edge_from` for many j by one JVP a layer. Both say the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import torch
from featurizers.errors import UsageError
from torch import Tensor

from featurizers_derived_scalars.activations import RawActivations
from featurizers_derived_scalars.axes import Axis, exact
from featurizers_derived_scalars.bases import Basis
from featurizers_derived_scalars.derivers import Context, Deriver
from featurizers_derived_scalars.directions import NodeGrad
from featurizers_derived_scalars.layer_maps import Unlayered
from featurizers_derived_scalars.node_writes import node_write
from featurizers_derived_scalars.nodes import Node
from featurizers_derived_scalars.places import Need, Place
from featurizers_derived_scalars.quantities import write_to
from featurizers_derived_scalars.reach import after, read_by
from featurizers_derived_scalars.sources import DerivedSource, RawSource, need
from featurizers_derived_scalars.views import View
from featurizers_derived_scalars.writing import total

if TYPE_CHECKING:
    from featurizers_derived_scalars.circuit import Circuit


def edge_to(basis: Basis, node: Node) -> Deriver:
    """Attribution of the edge from each node of a basis into one node: write · gradient of the node's attribution.

    One VJP of the target's block. Nodes at or after the target have no result. With every upstream node and bias it
    sums to the inner product of the residual stream with that gradient (`direction` of ``NodeGrad(node, True)``).

    Raises:
        UsageError: the kind does not write to the residual stream, or the target is no scalar.
    """
    return write_to(basis, NodeGrad(node, times_metric=True)).renamed(f"edge_to:{basis}")


def edge_from(node: Node, basis: Basis) -> Deriver:
    """Attribution of the edge from one node into each node of a basis: change with its write, times the gradient.

    One JVP a layer. Layers that the node's write does not reach have no result. For heads ``basis.via`` says through
    which of q, k and v; None is through q and k at once.

    Raises:
        UsageError: the kind of the source does not write to the residual stream.
    """
    through_v = basis.via == "v"

    def fn(context: Context, written: Tensor, resid: Tensor, x: Tensor, gradient: Tensor) -> Tensor:
        if through_v:
            values = _moved(context, Place("attn.v", context.layer), resid, written, basis)
            return x * torch.einsum("khd,qhd->qkh", values, gradient)
        view = View(basis, context.raw, context.layer, x)
        change = view.follow(_moved(context, view.place, resid, written, basis))
        return total(view, change * view.pull(gradient))

    gradient = RawSource("attn.z" if through_v else basis.kind, "backward")
    sources = (DerivedSource(node_write(node), Unlayered()), Before(basis.kind), RawSource(basis.kind), gradient)
    params, within = {"node": node, "basis": basis}, after(basis, node.place)
    return Deriver(f"edge_from:{basis}", sources, basis.axes, fn, params, basis, within)


def activation_from(node: Node, basis: Basis) -> Deriver:
    """Change of each node of a basis with the write of one node, norms held; layers as in `edge_from`.

    Raises:
        UsageError: the kind of the source does not write to the residual stream; the change is of heads through ``v``,
            which change no probability; or it is of a whole vector.
    """
    if basis.via == "v":
        raise UsageError("probabilities do not change with values; take the basis attn.v for the change of these")
    if basis.whole:
        raise UsageError(f"{basis} is a vector; take it without whole for the change of its entries")

    def fn(context: Context, written: Tensor, resid: Tensor, x: Tensor) -> Tensor:
        view = View(basis, context.raw, context.layer, x)
        return view.follow(_moved(context, view.place, resid, written, basis))

    sources = (DerivedSource(node_write(node), Unlayered()), Before(basis.kind), RawSource(basis.kind))
    params, within = {"node": node, "basis": basis}, after(basis, node.place)
    return Deriver(f"activation_from:{basis}", sources, basis.axes, fn, params, basis, within)


def _moved(context: Context, place: Place, resid: Tensor, written: Tensor, basis: Basis) -> Tensor:
    """How a place's tensor changes as the residual stream before it moves along a write."""
    if place.kind.startswith("resid."):
        return written

    def compute(x: Tensor) -> Tensor:
        return context.circuit.recompute(place, x, context.raw, through=basis.via)

    return exact(torch.func.jvp(compute, (resid,), (written.to(resid.dtype),))[1])


@final
@dataclass(frozen=True)
class Before:
    """The residual stream that a kind of place is computed from, at its layer, as a scalar source.

    Attributes:
        kind: of place.
    """

    kind: str

    @property
    def axes(self) -> tuple[Axis, ...]:
        """Token and ``d_model``."""
        return ("token", "d_model")

    @property
    def constant(self) -> bool:
        """No."""
        return False

    def needs(self, circuit: Circuit, layers: frozenset[int | None] | None) -> frozenset[Need]:
        """The residual stream.

        Raises:
            SiteError: the model lacks the place that is computed from it; the message says why.
        """
        places = circuit.places(self.kind) if layers is None else [Place(self.kind, layer) for layer in layers]
        read = [read_by(circuit, place) for place in places]
        return frozenset(need(place.kind, "forward", [place.layer]) for place in read)

    def layers(self, raw: RawActivations) -> frozenset[int | None] | None:
        """The layers of which it was captured."""
        circuit, places = raw.circuit, raw.circuit.places(self.kind)
        return frozenset(place.layer for place in places if (read_by(circuit, place), "forward") in raw)

    def derive(self, raw: RawActivations, layer: int | None) -> Tensor:
        """The residual stream before the place of a layer.

        Raises:
            SiteError: it was not captured.
        """
        return exact(raw[read_by(raw.circuit, Place(self.kind, layer)), "forward"])
