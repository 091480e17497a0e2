"""Quantities of one node: what it writes, and its direct effect."""

from __future__ import annotations

import torch
from featurizers.errors import UsageError
from torch import Tensor

from featurizers_derived_scalars.circuit import Place
from featurizers_derived_scalars.nodes import HEADS, Node, View, at_least_float32
from featurizers_derived_scalars.nodes.dependencies import check_writes, reaches
from featurizers_derived_scalars.quantities.derivers import Context, Deriver
from featurizers_derived_scalars.quantities.directions import Direction, as_direction
from featurizers_derived_scalars.quantities.layer_maps import At, LayerMap, Unlayered
from featurizers_derived_scalars.quantities.sources import RawSource
from featurizers_derived_scalars.quantities.tracing import inside


def node_write(node: Node) -> Deriver:
    """Return what one node writes at its token, and zero at others: ``(token, d_model)``, without layer.

    Raises:
        UsageError: the kind does not write to the residual stream.
    """
    check_writes(node.basis)
    index, heads = node.numbers(), node.basis.kind == HEADS
    here: LayerMap = Unlayered() if node.layer is None else At(node.layer)
    sources = (RawSource(node.basis.kind, at=here), *([RawSource("attn.v", at=here)] if heads else []))

    def fn(context: Context, x: Tensor, *values: Tensor) -> Tensor:
        raw = context.raw
        if heads:
            token, key, head = inside(node, index, tuple(x.shape))
            output = torch.zeros(len(x), *values[0].shape[1:], dtype=x.dtype, device=x.device)
            output[token, head] = x[token, key, head] * values[0][key, head]
            return at_least_float32(raw.write(Place("attn.z", node.layer), output))
        view = View(node.basis, raw, node.layer, x)
        where = index[:-1] if node.basis.axes[-1] == "one" else index
        inside(node, index, view.values.shape[: len(where)] + (1,) * (len(index) - len(where)))
        alone = torch.zeros_like(view.values)
        alone[where] = view.values[where]
        return at_least_float32(raw.write(view.place, view.lift(alone)))

    return Deriver(f"node_write:{node}", sources, ("token", "d_model"), fn, {"node": node})


def node_write_to(node: Node, direction: Direction | Node | Tensor | None = None) -> Deriver:
    """Return the direct effect of one node at each token, ``(token, one)``, without layer; arguments as in `write_to`.

    Raises:
        UsageError: as `write_to`; when it is computed, if the node is not upstream of the direction.
    """
    along = as_direction(direction)

    def fn(context: Context, written: Tensor, vector: Tensor) -> Tensor:
        if not reaches(context.circuit, node.place, along.place(context.circuit)):
            raise UsageError(f"{node} has no direct effect along {along}: it is not upstream of it")
        return (written * vector).sum(-1, keepdim=True)

    name = f"node_write_to:{node}"
    return node_write(node).combine(along, fn, name=name, axes=("token", "one"), direction=along)
