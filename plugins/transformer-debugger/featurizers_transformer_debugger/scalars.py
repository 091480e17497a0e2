"""Scalars of transformer-debugger under their own names, with its numbers; `table` lists them.

Where its number is not what its name says, the name keeps the number, and a quantity beside it is what the name says:

- ``…_write_norm`` of neurons and latents is signed there; `write_norm` is a length.
- ``resid_post_…_proj_to_final_residual_grad`` is zero where the residual stream is that of the gradient itself.
- ``attn_query`` and ``attn_key`` are each multiplied by ``d_head ** -0.25``.
- ``vocab_token_write_to_input_direction`` puts each token's embedding in place of the residual stream and repeats the
  result for every token; `vocab_read` is linear in the embedding.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple, cast

import torch
from featurizers.errors import UsageError, shown
from featurizers_derived_scalars import (
    Basis,
    Deriver,
    MetricGrad,
    Node,
    NodeGrad,
    Place,
    RawActivations,
    ScalarSpec,
    quantities,
)
from featurizers_derived_scalars.nodes import at_least_float32
from featurizers_derived_scalars.quantities import Context, Direction, RawSource
from torch import Tensor

from featurizers_transformer_debugger.table import FEATURIZED, NEED_A_LATENT, NEED_A_NODE, ROWS, TAKE_A_NODE, Row

PREFIX: Final = "transformer-debugger"


def upstream(
    name: str,
    *,
    featurizers: Mapping[str, Any] | None = None,
    node: Node | None = None,
    latent: int | None = None,
) -> Deriver:
    """Return the scalar of a name of transformer-debugger, in lower case.

    Args:
        name: a key of `table.ROWS`.
        featurizers: for names of autoencoders: by kind of place, a featurizer or a mapping from layers.
        node: for names of traced nodes and edges. The ``…_final_residual_grad`` names take one too; without it they go
            to the metric.
        latent: for names of one feature, its number.

    Raises:
        UsageError: the name is unknown, or it needs a featurizer, a node or a latent.

    Examples:
        >>> upstream("mlp_write_norm").axes
        ('token', 'neuron')
    """
    if name not in ROWS:
        near = difflib.get_close_matches(name, ROWS, n=3, cutoff=0.3)
        raise UsageError(f"transformer-debugger has no scalar {shown(name)}; like it: {', '.join(near) or 'none'}")
    row = ROWS[name]
    if row.quantity in NEED_A_NODE and node is None:
        raise UsageError(f"{name} is that of one node; give node=Node(basis, layer, index)")
    if row.quantity in NEED_A_LATENT and latent is None:
        raise UsageError(f"{name} is that of one feature; give latent=, its number")
    basis = Basis("resid.embed") if row.kind == "node" else _basis(row, featurizers or {})
    request = _Request(row, basis, node if row.quantity in TAKE_A_NODE else None, latent)
    deriver = _QUANTITIES[row.quantity](request)
    for twist in row.twists:
        if twist in _REDUCTIONS:
            deriver = _REDUCTIONS[twist](deriver)
    return deriver.renamed(name)


def _basis(row: Row, featurizers: Mapping[str, Any]) -> Basis:
    if row.featurized:
        kinds = FEATURIZED.get(row.kind, (row.kind,))
        matching = [kind for kind in featurizers if kind in kinds]
        if len(matching) != 1:
            raise UsageError(
                f"{row.name} is of the features of one featurizer at {' or '.join(kinds)}; there is "
                f"{', '.join(matching) or 'none of them'}. Give featurizers={{{kinds[0]!r}: {{layer: featurizer}}}}"
            )
        part = "error" if row.option == "error" else "features"
        return Basis(matching[0], featurizers[matching[0]], part=part)  # type: ignore[arg-type]
    via = row.option if row.option in ("q", "k", "v") else None
    return Basis(row.kind, via=via, whole=row.option == "whole")  # type: ignore[arg-type]


# ---------------------------------------------------------------------- quantities


class _Request(NamedTuple):
    """A name with its arguments."""

    row: Row
    basis: Basis
    target: Node | None
    feature: int | None

    @property
    def node(self) -> Node:
        """Target of a name that needs a node; `upstream` checked that it is there."""
        return cast(Node, self.target)

    @property
    def latent(self) -> int:
        """Number of the feature, likewise."""
        return cast(int, self.feature)


def _value(request: _Request) -> Deriver:
    def scaled(context: Context, x: Tensor) -> Tensor:
        factor: float = context.circuit.d_head**-0.25
        return x * factor

    deriver = quantities.value(request.basis)
    return deriver.map(scaled, name=request.row.name) if "scaled" in request.row.twists else deriver


def _write_to(request: _Request) -> Deriver:
    along: Direction = MetricGrad() if request.target is None else NodeGrad(request.target)
    deriver = quantities.write_to(request.basis, along)
    if "strict" not in request.row.twists:
        return deriver

    def strict(context: Context, x: Tensor) -> Tensor:
        order, place = context.circuit.order, Place(request.basis.kind, context.layer)
        return x if order(place) < order(along.place(context.circuit)) else torch.zeros_like(x)

    return deriver.map(strict, name=request.row.name)


def _write_sum(request: _Request) -> Deriver:
    """Return the sum of the writes of all neurons or of all heads, without a tensor of each write."""

    def neurons(context: Context, x: Tensor) -> Tensor:
        return at_least_float32(context.raw.write(Place("mlp.neurons", context.layer), x))

    def heads(context: Context, probabilities: Tensor, values: Tensor) -> Tensor:
        place = Place("attn.z", context.layer)
        matrix = at_least_float32(cast(Tensor, context.circuit.write_matrix(place)))
        written = torch.einsum("khe,hed->khd", values, matrix)
        total = torch.einsum("qkh,khd->qkd", probabilities, written)
        scale = context.raw.write_scale(place)
        return total if scale is None else total / at_least_float32(scale).unsqueeze(1)

    name, axes = request.row.name, request.row.shape
    if request.basis.kind == "mlp.neurons":
        return Deriver(name, (RawSource("mlp.neurons"),), axes, neurons)
    return Deriver(name, (RawSource("attn.probs"), RawSource("attn.v")), axes, heads)


def _vocab_activation(request: _Request) -> Deriver:
    target = request.node
    if target.basis.kind not in ("mlp.pre", "mlp.neurons", "mlp.out", "mlp.delta"):
        raise UsageError(
            f"{request.row.name} puts an embedding in place of the residual stream before a node of an MLP, not of "
            f"{target}; vocab_read takes any node"
        )
    pre = target if target.basis.kind == "mlp.pre" else dataclasses.replace(target, pre_activation=True)

    def activations(context: Context, embedding: Tensor) -> Tensor:
        values = _in_place_of_residual(pre, context.circuit.token_embeddings(), context.raw)
        return values.expand(len(embedding), -1)

    return Deriver(request.row.name, (RawSource("resid.embed"),), request.row.shape, activations, {"node": str(target)})


def _in_place_of_residual(node: Node, residuals: Tensor, raw: RawActivations) -> Tensor:
    """Return the node's value for each of many residual streams, norms not held; an MLP sees one token at a time."""
    size, place = len(raw.tokens), quantities.traced_place(node)
    featurizer = node.basis.featurizer_at(node.layer)
    columns = []
    with torch.no_grad():
        for rows in torch.split(residuals, size):
            filled = torch.nn.functional.pad(rows, (0, 0, 0, size - len(rows)))
            x = at_least_float32(raw.recompute(place, filled, freeze_norm=False))[: len(rows)]
            x = x if featurizer is None else at_least_float32(quantities.pre_activations(featurizer, x))
            columns.append(x[:, node.numbers()[-1]])
    return torch.cat(columns)


_QUANTITIES: Final[dict[str, Callable[[_Request], Deriver]]] = {
    "value": _value,
    "act_times_grad": lambda request: quantities.act_times_grad(request.basis),
    "norm": lambda request: quantities.norm(request.basis),
    "write": lambda request: quantities.write(request.basis),
    "write_sum": _write_sum,
    "write_norm": lambda request: quantities.write_norm(request.basis, signed="signed" in request.row.twists),
    "write_to": _write_to,
    "write_to_node": _write_to,
    "weighted_value": lambda request: quantities.weighted_value(request.basis),
    "latent_direction": lambda request: quantities.latent_direction(request.basis, request.latent),
    "write_to_latent": lambda request: quantities.write_to_latent(request.basis, request.latent),
    "token_write_to_latent": lambda request: quantities.token_write_to_latent(request.basis, request.latent),
    "token_write_to_latents": lambda request: quantities.token_write_to_latents(request.basis),
    "pair_attribution": lambda request: quantities.pair_attribution(request.basis),
    "node_write": lambda request: quantities.node_write(request.node),
    "node_write_to": lambda request: quantities.node_write_to(request.node),
    "attribution_direction": lambda request: quantities.direction(NodeGrad(request.node, times_metric=True)),
    "edge_to": lambda request: quantities.edge_to(request.basis, request.node),
    "edge_from": lambda request: quantities.edge_from(request.node, request.basis),
    "activation_from": lambda request: quantities.activation_from(request.node, request.basis),
    "vocab_activation": _vocab_activation,
    "ones": lambda request: quantities.ones(request.basis),
}

_REDUCTIONS: Final[dict[str, Callable[[Deriver], Deriver]]] = {
    "pairs": quantities.pairs,
    "sum_keys": quantities.sum_keys,
    "sum_heads": quantities.sum_heads,
}

SPECS: Final = tuple(
    ScalarSpec.of(
        functools.partial(upstream, row.name),
        group=f"{PREFIX} {row.quantity}",
        text=f"transformer-debugger's, {row.spelled}",
        name=f"{PREFIX}.{row.name}",
    )
    for row in ROWS.values()
)
"""Specs of all names, with the prefix that `ScalarSpec` asks of plugins."""
