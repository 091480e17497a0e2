"""`ranked`: the largest of many scalars, one layer at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from featurizers.errors import UsageError
from torch import Tensor

from featurizers_derived_scalars.axes import Axis, pair_of
from featurizers_derived_scalars.bases import Basis
from featurizers_derived_scalars.nodes import Node

if TYPE_CHECKING:
    from featurizers_derived_scalars.results import Scalars


class Ranked(NamedTuple):
    """One scalar among the largest.

    Attributes:
        value: of the scalar.
        node: which node; None if the scalar is of no nodes.
        name: of the scalar.
        layer: of the tensor.
        at: index into the tensor.
    """

    value: float
    node: Node | None
    name: str
    layer: int | None
    at: tuple[int, ...]


def ranked(scalars: Scalars, k: int, *orders: Callable[[Tensor], Tensor]) -> list[Ranked]:
    """The k scalars that are largest by each order, largest first, in one pass; ties by name, layer and index.

    Raises:
        UsageError: one is not a number.
    """
    kept: list[list[tuple[float, Ranked]]] = [[] for _ in orders]
    for key in scalars:
        tensor = scalars[key]
        if bool(tensor.isnan().any()):
            raise UsageError(f"{key[0]} at layer {key[1]} is in places not a number, which has no rank")
        for best, order in zip(kept, orders, strict=True):
            rank = order(tensor).flatten()
            for place in _largest(rank, k):
                index = tuple(int(i) for i in torch.unravel_index(torch.tensor(place), tensor.shape))
                best.append((float(rank[place]), _entry(scalars, key, tensor, index)))
            best.sort(key=lambda pair: -pair[0])
            del best[k:]
    return [entry for best in kept for _, entry in best]


def _largest(rank: Tensor, k: int) -> list[int]:
    """Where the k largest are, largest first, ties as they come; `torch.topk` breaks them as it likes."""
    if not rank.numel():
        return []
    least = torch.topk(rank, min(k, rank.numel())).values[-1]
    candidates = (rank >= least).nonzero().squeeze(-1)
    chosen: list[int] = candidates[torch.sort(rank[candidates], descending=True, stable=True).indices[:k]].tolist()
    return chosen


def _entry(scalars: Scalars, key: tuple[str, int | None], tensor: Tensor, index: tuple[int, ...]) -> Ranked:
    name, layer = key
    about = scalars.about[name]
    node = None if about.basis is None else node_at(about.basis, layer, about.axes, index)
    return Ranked(float(tensor[index]), node, name, layer, index)


def node_at(basis: Basis, layer: int | None, axes: tuple[Axis, ...], index: tuple[int, ...]) -> Node:
    """The node of an index into a scalar; axes of the basis that were summed have none."""
    where: dict[str, int] = dict(zip(axes, index, strict=True))
    if "pair" in where:
        where["token"], where["key"] = pair_of(where["pair"])
    return Node(basis, layer, tuple(0 if axis == "one" else where.get(axis) for axis in basis.axes))
