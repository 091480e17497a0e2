"""Quantities of the nodes of a basis. Each returns a `Deriver` of one pass.

``value``, ``norm``, ``write``, ``write_norm`` and ``weighted_value`` are of the forward pass, and have no backward
pass: the gradient in a write's length is not the length of a write. ``grad`` is of the backward pass.
``act_times_grad``, and direct effects along the metric's gradient, are of both.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from featurizers.errors import UsageError
from torch import Tensor

from featurizers_derived_scalars.circuit import KINDS
from featurizers_derived_scalars.featurize.reverse import by_direction, by_gains, by_value
from featurizers_derived_scalars.nodes import HEADS, VECTORS, Basis, Node, NodeAxis, View
from featurizers_derived_scalars.nodes.dependencies import anywhere, before, check_writes
from featurizers_derived_scalars.quantities.derivers import Context, Deriver
from featurizers_derived_scalars.quantities.directions import Direction, as_direction
from featurizers_derived_scalars.quantities.sources import RawSource, ScalarSource
from featurizers_derived_scalars.quantities.writing import effects, lengths, summed_if_whole, unit_lengths, writes


def _view(basis: Basis, context: Context, x: Tensor | None = None) -> View:
    return View(basis, context.raw, context.layer, x)


def _inputs(basis: Basis) -> tuple[ScalarSource, ...]:
    """Return sources of the activations and, for heads, of the values that their probabilities weight."""
    source = RawSource(basis.kind)
    return (source, RawSource("attn.v")) if basis.kind == HEADS else (source,)


def value(basis: Basis) -> Deriver:
    """Return the activations: one for each unit or feature; for a whole vector, its entries.

    Examples:
        >>> value(Basis("mlp.neurons")).axes
        ('token', 'neuron')
    """

    def fn(context: Context, x: Tensor) -> Tensor:
        return _view(basis, context, x).values

    sources, params, reverse = (RawSource(basis.kind),), {"basis": basis}, by_value(basis)
    return Deriver(f"value:{basis}", sources, basis.entries, fn, params, basis, anywhere(basis), reverse)


def grad(basis: Basis) -> Deriver:
    """Return the metric's gradient in the activations; for features, the decoder's VJP of the place's gradient."""

    def fn(context: Context, gradient: Tensor, *x: Tensor) -> Tensor:
        return _view(basis, context, *x).pull(gradient)

    sources = [RawSource(basis.kind, "backward")]
    if basis.featurizer is not None:
        sources.append(RawSource(basis.kind))
    return Deriver(f"grad:{basis}", tuple(sources), basis.entries, fn, {"basis": basis}, basis, anywhere(basis))


def act_times_grad(basis: Basis) -> Deriver:
    """Return activation times gradient, the first-order total effect of each node; a whole vector's inner product.

    Over a basis's features, error and bias it sums to the value for the place.
    """

    def fn(context: Context, x: Tensor, gradient: Tensor) -> Tensor:
        view = _view(basis, context, x)
        return summed_if_whole(view, view.values * view.pull(gradient))

    sources = (RawSource(basis.kind), RawSource(basis.kind, "backward"))
    return Deriver(f"act_times_grad:{basis}", sources, basis.axes, fn, {"basis": basis}, basis, anywhere(basis))


def norm(basis: Basis) -> Deriver:
    """Return the Euclidean length of each vector, ``(token, one)`` or ``(token, head)``; the basis is taken whole.

    Raises:
        UsageError: the kind holds no vectors.
    """
    if basis.kind not in VECTORS:
        raise UsageError(f"{basis.kind} holds no vectors to take the length of; kinds that do are {', '.join(VECTORS)}")
    whole = replace(basis, whole=True)

    def fn(context: Context, x: Tensor) -> Tensor:
        norms: Tensor = torch.linalg.vector_norm(_view(basis, context, x).values, dim=-1)
        return norms if norms.dim() == 2 else norms.unsqueeze(-1)

    return Deriver(f"norm:{basis}", (RawSource(basis.kind),), whole.axes, fn, {"basis": basis}, whole, anywhere(basis))


def write(basis: Basis) -> Deriver:
    """Return what each node adds to the residual stream: the axes of the basis, then ``d_model``.

    For a whole vector there is one write for each token, or for each token and head. Norms behind the place are held
    at their scales, and biases are nodes of their own. The tensor is ``d_model`` times as big as other quantities:
    36 GiB per layer for the heads of GPT-2 at 1024 tokens. `write_to`, `write_norm` and `vocab_write` of one node make
    no such tensor.

    Raises:
        UsageError: the kind does not write to the residual stream.
    """
    check_writes(basis)

    def fn(context: Context, x: Tensor, *_: Tensor) -> Tensor:
        return writes(_view(basis, context, x))

    axes = (*(axis for axis in basis.axes if axis != "one"), "d_model")
    return Deriver(f"write:{basis}", _inputs(basis), axes, fn, {"basis": basis}, basis, anywhere(basis))


def write_norm(basis: Basis, *, signed: bool = False) -> Deriver:
    """Return the length of what each node writes.

    Args:
        basis: the nodes.
        signed: give it the sign of the activation, as activation times weight norm has.

    Raises:
        UsageError: the kind does not write to the residual stream, or a whole vector was to have a sign.
    """
    check_writes(basis)
    if signed and basis.whole:
        raise UsageError(f"{basis} is a vector, which has no sign; leave signed or whole out")

    def fn(context: Context, x: Tensor, *_: Tensor) -> Tensor:
        view = _view(basis, context, x)
        return lengths(view) * view.values.sign() if signed else lengths(view)

    params = {"basis": basis, "signed": signed}
    reverse = by_gains(basis, unit_lengths, "the length of a write") if signed else None
    return Deriver(f"write_norm:{basis}", _inputs(basis), basis.axes, fn, params, basis, anywhere(basis), reverse)


def write_to(basis: Basis, direction: Direction | Node | Tensor | None = None) -> Deriver:
    """Return the direct effect of each node: the inner product of its write with a direction of the residual stream.

    Layers at or after the direction's place have no result, since what is computed there does not reach it.

    Args:
        basis: the nodes.
        direction: None for the metric's gradient at the end of the residual stream; a `Node` for its gradient in the
            residual stream before it; a tensor for a vector at the end.

    Raises:
        UsageError: the kind does not write to the residual stream, or the direction has another type.
    """
    check_writes(basis)
    along = as_direction(direction)

    def fn(context: Context, x: Tensor, *rest: Tensor) -> Tensor:
        return effects(_view(basis, context, x), rest[-1])

    def gains(view: View) -> Tensor:
        return view.pull(view.raw.write_vjp(view.place, along.vector(view.raw)))

    sources, params = (*_inputs(basis), along), {"basis": basis, "direction": along}
    within, reverse = before(basis, along.place), by_gains(basis, gains, str(along))
    return Deriver(f"write_to:{basis}", sources, basis.axes, fn, params, basis, within, reverse)


def direction(direction: Direction | Node | Tensor | None = None) -> Deriver:
    """Return a direction itself, ``(token, d_model)``, without layer; arguments as in `write_to`."""
    along = as_direction(direction)

    def fn(_: Context, vector: Tensor) -> Tensor:
        return vector

    reverse = by_direction(along.vector, along.place, str(along))
    return Deriver("direction", (along,), along.axes, fn, {"direction": along}, reverse=reverse)


def weighted_value(basis: Basis | None = None) -> Deriver:
    """Return values times probabilities, ``(token, key, head, d_head)``, which sum over keys to ``attn.z``.

    Raises:
        UsageError: the basis is not ``attn.probs``.
    """
    basis = Basis(HEADS) if basis is None else basis
    if basis.kind != HEADS:
        raise UsageError(f"heads weight values, so the basis is {HEADS}, not {basis}")

    def fn(_: Context, probabilities: Tensor, values: Tensor) -> Tensor:
        return torch.einsum("qkh,khd->qkhd", probabilities, values)

    axes, params = (*basis.axes, "d_head"), {"basis": basis}
    return Deriver(f"weighted_value:{basis}", _inputs(basis), axes, fn, params, basis, anywhere(basis))


def ones(basis: Basis) -> Deriver:
    """Return a one at each token, ``(token, one)``: how often a node is counted."""

    def fn(_: Context, x: Tensor) -> Tensor:
        return torch.ones_like(x.reshape(len(x), -1)[:, :1])

    axes: tuple[NodeAxis, ...] = (KINDS[basis.kind].axes[0], "one")
    return Deriver(f"ones:{basis}", (RawSource(basis.kind),), axes, fn, {"basis": basis}, None, anywhere(basis))
