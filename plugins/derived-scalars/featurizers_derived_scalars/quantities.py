"""Quantities: what is measured of the nodes of a basis. Each returns a `Deriver`, of one pass.

``value``, ``norm``, ``write``, ``write_norm`` and ``weighted_value`` are of the forward pass, and have no backward
one: the gradient in a write's length is not the write's length. ``grad`` is of the backward pass; ``act_times_grad``
and the direct effects along the metric's gradient are of both.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from featurizers.errors import UsageError
from torch import Tensor

from featurizers_derived_scalars.axes import Axis, exact
from featurizers_derived_scalars.bases import HEADS, VECTORS, Basis
from featurizers_derived_scalars.derivers import Context, Deriver
from featurizers_derived_scalars.directions import Direction, DirectionSource, as_direction
from featurizers_derived_scalars.layer_maps import Unlayered
from featurizers_derived_scalars.node_writes import node_write
from featurizers_derived_scalars.nodes import Node
from featurizers_derived_scalars.places import KINDS
from featurizers_derived_scalars.reach import anywhere, before, writes
from featurizers_derived_scalars.reverse import by_direction, by_effect, by_length, by_value
from featurizers_derived_scalars.sources import RawSource, ScalarSource
from featurizers_derived_scalars.views import View
from featurizers_derived_scalars.writing import effect, sizes, total
from featurizers_derived_scalars.writing import writes as write_of


def _view(basis: Basis, context: Context, x: Tensor) -> View:
    return View(basis, context.raw, context.layer, x)


def _entries(basis: Basis) -> tuple[Axis, ...]:
    """The axes of the entries of a basis, a whole vector's among them."""
    return replace(basis, whole=False).axes


def _reads_values(basis: Basis) -> tuple[ScalarSource, ...]:
    """The activations, and for heads their values, which their probabilities weight."""
    source = RawSource(basis.kind)
    return (source, RawSource("attn.v")) if basis.kind == HEADS else (source,)


def value(basis: Basis) -> Deriver:
    """The activations: of a unit or a feature its own, of a whole vector its entries.

    Example:
        >>> value(Basis("mlp.neurons")).axes
        ('token', 'neuron')
    """

    def fn(context: Context, x: Tensor) -> Tensor:
        return _view(basis, context, x).values

    return Deriver(
        f"value:{basis}",
        (RawSource(basis.kind),),
        _entries(basis),
        fn,
        {"basis": basis},
        basis,
        anywhere(basis),
        by_value(basis),
    )


def grad(basis: Basis) -> Deriver:
    """The metric's gradient in the activations; of features the decoder's VJP of that in the place."""

    def fn(context: Context, gradient: Tensor, *x: Tensor) -> Tensor:
        return View(basis, context.raw, context.layer, *x).pull(gradient)

    sources = [RawSource(basis.kind, "backward")]
    if basis.featurizer is not None:
        sources.append(RawSource(basis.kind))
    return Deriver(f"grad:{basis}", tuple(sources), _entries(basis), fn, {"basis": basis}, basis, anywhere(basis))


def act_times_grad(basis: Basis) -> Deriver:
    """Activation times gradient, the first-order total effect of each node; of a whole vector the inner product.

    Over a basis's features, error and bias it sums to that of the place.
    """

    def fn(context: Context, x: Tensor, gradient: Tensor) -> Tensor:
        view = _view(basis, context, x)
        return total(view, view.values * view.pull(gradient))

    sources = (RawSource(basis.kind), RawSource(basis.kind, "backward"))
    return Deriver(f"act_times_grad:{basis}", sources, basis.axes, fn, {"basis": basis}, basis, anywhere(basis))


def norm(basis: Basis) -> Deriver:
    """Euclidean length of each vector, ``(token, one)`` or ``(token, head)``; the basis is taken whole.

    Raises:
        UsageError: the kind holds no vectors.
    """
    if basis.kind not in VECTORS:
        raise UsageError(f"{basis.kind} holds no vectors to take the length of; kinds that do are {', '.join(VECTORS)}")
    whole = replace(basis, whole=True)

    def fn(context: Context, x: Tensor) -> Tensor:
        lengths: Tensor = torch.linalg.vector_norm(_view(basis, context, x).values, dim=-1)
        return lengths if lengths.dim() == 2 else lengths.unsqueeze(-1)

    return Deriver(f"norm:{basis}", (RawSource(basis.kind),), whole.axes, fn, {"basis": basis}, whole, anywhere(basis))


def write(basis: Basis) -> Deriver:
    """What each node adds to the residual stream: the axes of the basis, and ``d_model``.

    Of a whole vector one for each token, or for each token and head. Norms behind the place are held at their scales,
    and biases are nodes of their own. It is ``d_model`` times as big as the other quantities: 36 GiB a layer for the
    heads of GPT-2 at 1024 tokens; `write_to`, `write_norm` and `vocab_write` of one node make no such tensor.

    Raises:
        UsageError: the kind does not write to the residual stream.
    """
    writes(basis)

    def fn(context: Context, x: Tensor, *_: Tensor) -> Tensor:
        return write_of(_view(basis, context, x))

    axes = tuple(axis for axis in basis.axes if axis != "one")
    return Deriver(
        f"write:{basis}", _reads_values(basis), (*axes, "d_model"), fn, {"basis": basis}, basis, anywhere(basis)
    )


def write_norm(basis: Basis, *, signed: bool = False) -> Deriver:
    """Length of what each node writes.

    Args:
        basis: which nodes.
        signed: give it the sign of the activation, as activation times weight norm has.

    Raises:
        UsageError: the kind does not write to the residual stream, or a whole vector was to have a sign.
    """
    writes(basis)
    if signed and basis.whole:
        raise UsageError(f"{basis} is a vector, which has no sign; leave signed or whole out")

    def fn(context: Context, x: Tensor, *_: Tensor) -> Tensor:
        view = _view(basis, context, x)
        return sizes(view) * view.values.sign() if signed else sizes(view)

    params, reverse = {"basis": basis, "signed": signed}, by_length(basis) if signed else None
    return Deriver(f"write_norm:{basis}", _reads_values(basis), basis.axes, fn, params, basis, anywhere(basis), reverse)


def write_to(basis: Basis, direction: Direction | Node | Tensor | None = None) -> Deriver:
    """Direct effect of each node: the inner product of its write with a direction of the residual stream.

    Layers at or after the direction's place have no result, since nothing computed there reaches it.

    Args:
        basis: which nodes.
        direction: None for the metric's gradient at the end of the residual stream; a `Node` for its gradient in the
            residual stream before it; a tensor for a vector at the end.

    Raises:
        UsageError: the kind does not write to the residual stream, or the direction is none.
    """
    writes(basis)
    along = as_direction(direction)

    def fn(context: Context, x: Tensor, *rest: Tensor) -> Tensor:
        return effect(_view(basis, context, x), rest[-1])

    sources = (*_reads_values(basis), DirectionSource(along))
    params = {"basis": basis, "direction": along}
    within, reverse = before(basis, along.place), by_effect(basis, along)
    return Deriver(f"write_to:{basis}", sources, basis.axes, fn, params, basis, within, reverse)


def direction(target: Direction | Node | None = None) -> Deriver:
    """The direction itself, ``(token, d_model)``, without layer."""
    along = as_direction(target)

    def fn(_: Context, vector: Tensor) -> Tensor:
        return vector

    axes: tuple[Axis, ...] = ("token", "d_model")
    params, reverse = {"direction": along}, by_direction(along)
    return Deriver("direction", (DirectionSource(along),), axes, fn, params, reverse=reverse)


def weighted_value(basis: Basis | None = None) -> Deriver:
    """Values times probabilities, ``(token, key, head, d_head)``, which sum over keys to ``attn.z``.

    Raises:
        UsageError: the basis is another than that of heads.
    """
    basis = Basis(HEADS) if basis is None else basis
    if basis.kind != HEADS:
        raise UsageError(f"heads weight values, so the basis is {HEADS}, not {basis}")

    def fn(_: Context, probabilities: Tensor, values: Tensor) -> Tensor:
        return torch.einsum("qkh,khd->qkhd", probabilities, values)

    axes: tuple[Axis, ...] = ("token", "key", "head", "d_head")
    return Deriver(f"weighted_value:{basis}", _reads_values(basis), axes, fn, {"basis": basis}, basis, anywhere(basis))


def ones(basis: Basis) -> Deriver:
    """One at each token, ``(token, one)``: how often a node is counted."""

    def fn(_: Context, x: Tensor) -> Tensor:
        return torch.ones_like(x.reshape(len(x), -1)[:, :1])

    axes: tuple[Axis, ...] = (KINDS[basis.kind].axes[0], "one")
    return Deriver(f"ones:{basis}", (RawSource(basis.kind),), axes, fn, {"basis": basis}, None, anywhere(basis))


def vocab_write(of: Basis | Node) -> Deriver:
    """Logits that each node writes directly, the final norm held, less their mean over the vocabulary.

    Of a basis, the axes of its `write` with ``vocab`` for ``d_model``: take it whole, or expect a big tensor. Of one
    node ``(token, vocab)``, zero but at its token. The final norm's bias and a softcap of the logits
    have no part in it.

    Raises:
        UsageError: the kind does not write to the residual stream.
    """
    written = node_write(of) if isinstance(of, Node) else write(of)

    def fn(context: Context, vectors: Tensor, scale: Tensor) -> Tensor:
        scale = scale.reshape(-1, *[1] * (vectors.dim() - 1))
        logits = exact(context.circuit.unembed(vectors / scale))
        return logits - logits.mean(-1, keepdim=True)

    return written.combine(
        RawSource("norm.final.scale", at=Unlayered()),
        fn,
        name=f"vocab_write:{of if isinstance(of, Node) else str(of)}",
        axes=(*written.axes[:-1], "vocab"),
    )


def vocab_read(node: Node) -> Deriver:
    """How far each token's embedding would move a node, the norm before it held: ``(vocab,)``, without layer.

    The gradient of the node at its own token of the residual stream (of a head through ``k`` or ``v``, at its key),
    times the embedding of every token of the vocabulary.
    """
    along = as_direction(node)
    token = node.numbers()[1 if node.basis.via in ("k", "v") else 0]

    def fn(context: Context, vector: Tensor) -> Tensor:
        return exact(context.circuit.token_embeddings()).to(vector.device) @ vector[token]

    return Deriver("vocab_read", (DirectionSource(along),), ("vocab",), fn, {"node": node})
