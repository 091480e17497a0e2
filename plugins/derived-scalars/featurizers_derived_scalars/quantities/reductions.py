"""Reductions: derivers with fewer axes, and derivers of the difference from another prompt."""

from __future__ import annotations

import torch
from featurizers.errors import ShapeError, UsageError
from torch import Tensor

from featurizers_derived_scalars.capturing import RawActivations
from featurizers_derived_scalars.nodes import NodeAxis
from featurizers_derived_scalars.quantities.derivers import Context, Deriver


def sum_over(deriver: Deriver, *axes: NodeAxis) -> Deriver:
    """Sum over some axes; where only tokens (or pairs) are left, the axis ``one`` follows.

    Raises:
        UsageError: the scalar lacks an axis, or no axis is given.
    """
    if missing := [axis for i, axis in enumerate(axes) if axis not in deriver.axes or axis in axes[:i]]:
        raise UsageError(
            f"{deriver.name} has no axis {', '.join(missing)}; its axes are {', '.join(deriver.axes)}, each summed once"
        )
    if not axes:
        raise UsageError(f"which axes of {deriver.name} are to be summed? They are {', '.join(deriver.axes)}")
    left = tuple(axis for axis in deriver.axes if axis not in axes)
    bare = all(axis in ("token", "key", "pair") for axis in left)
    where = tuple(deriver.axes.index(axis) for axis in axes)

    def fn(_: Context, tensor: Tensor) -> Tensor:
        summed = tensor.sum(where)
        return summed.unsqueeze(-1) if bare else summed

    return deriver.map(fn, name=deriver.name, axes=(*left, "one") if bare else left, summed=axes)


def sum_keys(deriver: Deriver) -> Deriver:
    """Sum over keys: what each head does at each token."""
    return sum_over(deriver, "key")


def sum_heads(deriver: Deriver) -> Deriver:
    """Sum over heads."""
    return sum_over(deriver, "head")


def sum_nodes(deriver: Deriver) -> Deriver:
    """Sum over all nodes of a token: ``(token, one)``, or ``(token, d_model)`` for writes.

    Examples:
        >>> from featurizers_derived_scalars.nodes import Basis
        >>> from featurizers_derived_scalars.quantities import act_times_grad, write
        >>> sum_nodes(act_times_grad(Basis("attn.probs"))).axes, sum_nodes(write(Basis("mlp.neurons"))).axes
        (('token', 'one'), ('token', 'd_model'))
    """
    nodes = () if deriver.basis is None else deriver.basis.axes
    return sum_over(deriver, *(axis for axis in deriver.axes if axis in nodes and axis != "token"))


def sum_channels(deriver: Deriver) -> Deriver:
    """Sum over the entries of vectors: the last axis, ``d_model``, ``d_head`` or ``neuron``.

    Raises:
        UsageError: the last axis is another.
    """
    if deriver.axes[-1] not in ("d_model", "d_head", "neuron"):
        raise UsageError(f"{deriver.name} is of no vectors: its axes are {', '.join(deriver.axes)}")
    return sum_over(deriver, deriver.axes[-1])


def pairs(deriver: Deriver) -> Deriver:
    """Merge the axes token and key into ``pair``: rows of the lower triangle, (0, 0), (1, 0), (1, 1), (2, 0) and so on.

    Raises:
        UsageError: its first two axes are not token and key.

    Examples:
        >>> from featurizers_derived_scalars.nodes import Basis
        >>> from featurizers_derived_scalars.quantities import write_norm
        >>> pairs(write_norm(Basis("attn.probs"))).axes
        ('pair', 'head')
    """
    if deriver.axes[:2] != ("token", "key"):
        raise UsageError(f"{deriver.name} is not of pairs of tokens: its axes are {', '.join(deriver.axes)}")

    def fn(_: Context, tensor: Tensor) -> Tensor:
        token, key = torch.tril_indices(*tensor.shape[:2], device=tensor.device)
        return tensor[token, key]

    return deriver.map(fn, name=deriver.name, axes=("pair", *deriver.axes[2:]))


def minus_baseline(deriver: Deriver, baseline: RawActivations) -> Deriver:
    """Subtract the same scalar of another prompt with as many tokens, position by position.

    Args:
        deriver: the scalar; what it needs must be captured of both prompts.
        baseline: captured tensors of the other prompt.
    """

    def fn(context: Context, tensor: Tensor) -> Tensor:
        other = deriver.tensor(baseline, context.layer)
        if other.shape != tensor.shape:
            raise ShapeError(
                f"{deriver.name} is {tuple(tensor.shape)} of the prompt and {tuple(other.shape)} of the baseline, "
                f"which has {len(baseline.tokens)} tokens, not {len(context.raw.tokens)}; give prompts of one length"
            )
        return tensor - other.to(tensor.device)

    return deriver.map(fn, name=deriver.name, baseline=baseline)
