"""What one node writes, and its direct effect."""

from __future__ import annotations

import torch
from featurizers.errors import UsageError
from torch import Tensor

from featurizers_derived_scalars.axes import exact
from featurizers_derived_scalars.bases import HEADS
from featurizers_derived_scalars.derivers import Context, Deriver
from featurizers_derived_scalars.directions import Direction, DirectionSource, as_direction
from featurizers_derived_scalars.layer_maps import At, LayerMap, Unlayered
from featurizers_derived_scalars.nodes import Node
from featurizers_derived_scalars.places import Place
from featurizers_derived_scalars.reach import reaches, writes
from featurizers_derived_scalars.sources import RawSource
from featurizers_derived_scalars.tracing import inside
from featurizers_derived_scalars.views import View


def node_write(node: Node) -> Deriver:
    """What one node writes, at its token and zero elsewhere: ``(token, d_model)``, without layer.

    Raises:
        UsageError: the kind does not write to the residual stream.
    """
    writes(node.basis)
    index, layer, heads = node.numbers(), node.layer, node.basis.kind == HEADS
    here: LayerMap = Unlayered() if layer is None else At(layer)
    sources = (RawSource(node.basis.kind, at=here), *([RawSource("attn.v", at=here)] if heads else []))

    def fn(context: Context, x: Tensor, *values: Tensor) -> Tensor:
        circuit, raw = context.circuit, context.raw
        if heads:
            token, key, head = inside(node, index, tuple(x.shape))
            output = torch.zeros(len(x), *values[0].shape[1:], dtype=x.dtype, device=x.device)
            output[token, head] = x[token, key, head] * values[0][key, head]
            return exact(circuit.write(Place("attn.z", layer), output, raw))
        view = View(node.basis, raw, layer, x)
        where = index[:-1] if node.basis.axes[-1] == "one" else index
        inside(node, index, view.values.shape[: len(where)] + (1,) * (len(index) - len(where)))
        kept = torch.zeros_like(view.values)
        kept[where] = view.values[where]
        return exact(circuit.write(view.place, view.lift(kept), raw))

    return Deriver(f"node_write:{node}", sources, ("token", "d_model"), fn, {"node": node})


def node_write_to(node: Node, direction: Direction | Node | Tensor | None = None) -> Deriver:
    """Direct effect of one node at each token, ``(token, one)``, without layer.

    Raises:
        UsageError: as `write_to`; when it is computed, if the node is not upstream of the direction.
    """
    along = as_direction(direction)

    def fn(context: Context, written: Tensor, vector: Tensor) -> Tensor:
        if not reaches(context.circuit, node.place, along.place(context.circuit)):
            raise UsageError(f"{node} has no direct effect along {along}: it is not upstream of it")
        return (written * vector).sum(-1, keepdim=True)

    return node_write(node).combine(
        DirectionSource(along), fn, name=f"node_write_to:{node}", axes=("token", "one"), direction=along
    )
