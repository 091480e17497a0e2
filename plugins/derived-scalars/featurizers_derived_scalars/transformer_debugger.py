"""The scalars of transformer-debugger under their own names, with its numbers; see `debugger_table` for the table.

Where its number is not what its name says, the name keeps it, and ours beside it is the honest one:

- ``…_write_norm`` of neurons and latents is signed there; `quantities.write_norm` is a length.
- ``resid_post_…_proj_to_final_residual_grad`` is zero where the residual stream is that of the gradient itself.
- ``attn_query`` and ``attn_key`` are each multiplied by ``d_head ** -0.25``.
- ``vocab_token_write_to_input_direction`` puts each token's embedding in place of the residual stream and repeats what
  comes out for every token; `quantities.vocab_read` is linear in the embedding.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple, cast

import torch
from featurizers.errors import UsageError, shown
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from featurizers_derived_scalars import edges, latents, node_writes, pair_attribution, quantities, reductions
from featurizers_derived_scalars.activations import RawActivations
from featurizers_derived_scalars.axes import exact
from featurizers_derived_scalars.bases import Basis
from featurizers_derived_scalars.debugger_table import FEATURIZED, NEED_A_LATENT, NEED_A_NODE, ROWS, TAKE_A_NODE, Row
from featurizers_derived_scalars.derivers import Context, Deriver
from featurizers_derived_scalars.directions import Direction, MetricGrad, NodeGrad
from featurizers_derived_scalars.nodes import Node
from featurizers_derived_scalars.places import Place
from featurizers_derived_scalars.sources import RawSource
from featurizers_derived_scalars.specs import ScalarSpec
from featurizers_derived_scalars.tracing import pre_activations, traced_place

Featurizers = Mapping[str, Any]


class UpstreamOptions(BaseModel):
    """What some of the names need beside the model."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, arbitrary_types_allowed=True)

    featurizers: Featurizers = Field(
        default={}, description="By kind of place: a featurizer, or one for each of some layers."
    )
    node: Node | None = Field(default=None, description="The node that it is traced to or from.")
    latent: int | None = Field(default=None, ge=0, description="Number of one feature.")


def upstream(
    name: str,
    *,
    featurizers: Featurizers | None = None,
    node: Node | None = None,
    latent: int | None = None,
) -> Deriver:
    """The scalar of a name of transformer-debugger, in lower case.

    Args:
        name: one of `debugger_table.ROWS`.
        featurizers: for the names of autoencoders: by kind of place, a featurizer or one for each of some layers.
        node: for the names of traced nodes and edges. The ``…_final_residual_grad`` names take one too; without it
            they go to the metric.
        latent: for the names of one feature.

    Raises:
        UsageError: there is no such name, or it lacks a featurizer, a node or a latent.

    Example:
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
    deriver = _QUANTITIES[row.quantity](_Asked(row, basis, node if row.quantity in TAKE_A_NODE else None, latent))
    for twist in row.twists:
        if twist in _REDUCTIONS:
            deriver = _REDUCTIONS[twist](deriver)
    return deriver.renamed(name)


def upstream_specs() -> list[ScalarSpec]:
    """A spec for each name."""
    return [
        ScalarSpec(
            name=row.name,
            make=functools.partial(_make, row.name),
            config=UpstreamOptions,
            group=f"transformer-debugger {row.quantity}",
            text=f"transformer-debugger's, {row.spelled}",
        )
        for row in ROWS.values()
    ]


def _make(name: str, options: UpstreamOptions) -> Deriver:
    return upstream(name, featurizers=options.featurizers, node=options.node, latent=options.latent)


# ---------------------------------------------------------------------- bases


def _basis(row: Row, featurizers: Featurizers) -> Basis:
    if row.featurized:
        kinds = FEATURIZED.get(row.kind, (row.kind,))
        found = [kind for kind in featurizers if kind in kinds]
        if len(found) != 1:
            given = ", ".join(found) or "none of them"
            raise UsageError(
                f"{row.name} is of the features of one featurizer at {' or '.join(kinds)}; there is {given}. "
                f"Give featurizers={{{kinds[0]!r}: {{layer: featurizer}}}}"
            )
        part = "error" if row.option == "error" else "features"
        return Basis(found[0], featurizers[found[0]], part=part)  # type: ignore[arg-type]
    via = row.option if row.option in ("q", "k", "v") else None
    return Basis(row.kind, via=via, whole=row.option == "whole")  # type: ignore[arg-type]


# ---------------------------------------------------------------------- quantities


class _Asked(NamedTuple):
    """One name, with what was given for it."""

    row: Row
    basis: Basis
    target: Node | None
    feature: int | None

    @property
    def node(self) -> Node:
        """The node, which `upstream` has seen to be there."""
        return cast(Node, self.target)

    @property
    def latent(self) -> int:
        """The latent, likewise."""
        return cast(int, self.feature)

    @property
    def signed(self) -> bool:
        """Whether a norm takes the sign of the activation."""
        return "signed" in self.row.twists


def _value(asked: _Asked) -> Deriver:
    deriver = quantities.value(asked.basis)
    return deriver.map(_scaled, name=asked.row.name) if "scaled" in asked.row.twists else deriver


def _scaled(context: Context, x: Tensor) -> Tensor:
    factor: float = context.circuit.d_head**-0.25
    return x * factor


def _write_to(asked: _Asked) -> Deriver:
    towards: Direction = MetricGrad() if asked.target is None else NodeGrad(asked.target)
    deriver = quantities.write_to(asked.basis, towards)
    if "strict" not in asked.row.twists:
        return deriver

    def strict(context: Context, x: Tensor) -> Tensor:
        order, place = context.circuit.order, Place(asked.basis.kind, context.layer)
        return x if order(place) < order(towards.place(context.circuit)) else torch.zeros_like(x)

    return deriver.map(strict, name=asked.row.name)


def _write_sum(asked: _Asked) -> Deriver:
    """The writes of all neurons or of all heads together, without those of each."""

    def neurons(context: Context, x: Tensor) -> Tensor:
        return exact(context.circuit.write(Place("mlp.neurons", context.layer), x, context.raw))

    def heads(context: Context, probs: Tensor, values: Tensor) -> Tensor:
        place = Place("attn.z", context.layer)
        matrix = exact(cast(Tensor, context.circuit.write_matrix(place)))
        written = torch.einsum("khe,hed->khd", values, matrix)
        total = torch.einsum("qkh,khd->qkd", probs, written)
        scale = context.circuit.write_scale(place, context.raw)
        return total if scale is None else total / exact(scale).unsqueeze(1)

    if asked.basis.kind == "mlp.neurons":
        return Deriver(asked.row.name, (RawSource("mlp.neurons"),), asked.row.shape, neurons)
    return Deriver(asked.row.name, (RawSource("attn.probs"), RawSource("attn.v")), asked.row.shape, heads)


def _vocab_activation(asked: _Asked) -> Deriver:
    target = asked.node
    if target.basis.kind not in ("mlp.pre", "mlp.neurons", "mlp.out", "mlp.delta"):
        raise UsageError(
            f"{asked.row.name} puts an embedding in place of the residual stream before a node of an MLP, not of "
            f"{target}; vocab_read takes any node"
        )
    pre = target if target.basis.kind == "mlp.pre" else dataclasses.replace(target, pre_activation=True)

    def activations(context: Context, embedding: Tensor) -> Tensor:
        every = _in_place_of_residual(pre, context.circuit.token_embeddings(), context.raw)
        return every.expand(len(embedding), -1)

    return Deriver(asked.row.name, (RawSource("resid.embed"),), asked.row.shape, activations, {"node": str(target)})


def _in_place_of_residual(node: Node, residuals: Tensor, raw: RawActivations) -> Tensor:
    """The node's value for each of many residual streams, norms not held; an MLP sees one token at a time."""
    size, place = len(raw.tokens), traced_place(node)
    featurizer = node.basis.featurizer_at(node.layer)
    found = []
    with torch.no_grad():
        for rows in torch.split(residuals, size):
            filled = torch.nn.functional.pad(rows, (0, 0, 0, size - len(rows)))
            site = exact(raw.circuit.recompute(place, filled, raw, freeze_norm=False))[: len(rows)]
            site = site if featurizer is None else exact(pre_activations(featurizer, site))
            found.append(site[:, node.numbers()[-1]])
    return torch.cat(found)


_QUANTITIES: Final[dict[str, Callable[[_Asked], Deriver]]] = {
    "value": _value,
    "act_times_grad": lambda asked: quantities.act_times_grad(asked.basis),
    "norm": lambda asked: quantities.norm(asked.basis),
    "write": lambda asked: quantities.write(asked.basis),
    "write_sum": _write_sum,
    "write_norm": lambda asked: quantities.write_norm(asked.basis, signed=asked.signed),
    "write_to": _write_to,
    "write_to_node": _write_to,
    "weighted_value": lambda asked: quantities.weighted_value(asked.basis),
    "latent_direction": lambda asked: latents.latent_direction(asked.basis, asked.latent),
    "write_to_latent": lambda asked: latents.write_to_latent(asked.basis, asked.latent),
    "token_write_to_latent": lambda asked: latents.token_write_to_latent(asked.basis, asked.latent),
    "token_write_to_latents": lambda asked: latents.token_write_to_latents(asked.basis),
    "pair_attribution": lambda asked: pair_attribution.pair_attribution(asked.basis),
    "node_write": lambda asked: node_writes.node_write(asked.node),
    "node_write_to": lambda asked: node_writes.node_write_to(asked.node),
    "attribution_direction": lambda asked: quantities.direction(NodeGrad(asked.node, times_metric=True)),
    "edge_to": lambda asked: edges.edge_to(asked.basis, asked.node),
    "edge_from": lambda asked: edges.edge_from(asked.node, asked.basis),
    "activation_from": lambda asked: edges.activation_from(asked.node, asked.basis),
    "vocab_activation": _vocab_activation,
    "ones": lambda asked: quantities.ones(asked.basis),
}


_REDUCTIONS: Final[dict[str, Callable[[Deriver], Deriver]]] = {
    "pairs": reductions.pairs,
    "sum_keys": reductions.sum_keys,
    "sum_heads": reductions.sum_heads,
}
