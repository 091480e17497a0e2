"""Sums and gathers over the processes of a mesh, with gradients.

Every process computes the same loss from the same activations, and holds some of the features. So the gradient of what
all of them have is the same everywhere, and the gradient of what one of them has is known to it alone. Each function is
linear, and its gradient is the function of the opposite direction.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd import Function

from featurizers_sharded.ranks import Ranks


class _Sum(Function):
    @staticmethod
    def forward(part: Tensor, ranks: Ranks) -> Tensor:
        return ranks.sum(part)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.ranks = inputs[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return spread(grads[0], ctx.ranks), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        return total(tangents[0], ctx.ranks)


class _Spread(Function):
    @staticmethod
    def forward(whole: Tensor, ranks: Ranks) -> Tensor:
        return whole.view_as(whole)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.ranks = inputs[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return total(grads[0], ctx.ranks), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        return spread(tangents[0], ctx.ranks)


class _Gather(Function):
    @staticmethod
    def forward(part: Tensor, sizes: list[int], ranks: Ranks) -> Tensor:
        return ranks.gather(part, sizes)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.sizes, ctx.ranks = inputs[1:]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return own_part(grads[0], ctx.sizes, ctx.ranks), None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        return gather(tangents[0], ctx.sizes, ctx.ranks)


class _OwnPart(Function):
    @staticmethod
    def forward(whole: Tensor, sizes: list[int], ranks: Ranks) -> Tensor:
        start = sum(sizes[: ranks.rank])
        return whole[..., start : start + sizes[ranks.rank]].clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.sizes, ctx.ranks = inputs[1:]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return gather(grads[0], ctx.sizes, ctx.ranks), None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        return own_part(tangents[0], ctx.sizes, ctx.ranks)


def total(part: Tensor, ranks: Ranks) -> Tensor:
    """Return the sum of the parts of all processes; its gradient goes to each part as it is."""
    return _Sum.apply(part, ranks)  # type: ignore[no-any-return, no-untyped-call]


def spread(whole: Tensor, ranks: Ranks) -> Tensor:
    """Return what all processes have, for each to compute a part from; the gradients of the parts are summed."""
    return _Spread.apply(whole, ranks)  # type: ignore[no-any-return, no-untyped-call]


def gather(part: Tensor, sizes: list[int], ranks: Ranks) -> Tensor:
    """Return the parts side by side along the last axis; each gets its own part of the gradient."""
    return _Gather.apply(part, sizes, ranks)  # type: ignore[no-any-return, no-untyped-call]


def own_part(whole: Tensor, sizes: list[int], ranks: Ranks) -> Tensor:
    """Return this process's part along the last axis of what all have; the gradients are put side by side."""
    return _OwnPart.apply(whole, sizes, ranks)  # type: ignore[no-any-return, no-untyped-call]
