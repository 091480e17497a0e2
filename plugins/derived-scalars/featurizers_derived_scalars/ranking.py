"""`ranked`: the largest of many scalars, one layer at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    kept: list[list[_Found]] = [[] for _ in orders]
    for key in scalars:
        tensor = scalars[key]
        flat, shape = tensor.flatten(), tuple(tensor.shape)
        if bool(flat.isnan().any()):
            raise UsageError(f"{key[0]} at layer {key[1]} is in places not a number, which has no rank")
        for best, order in zip(kept, orders, strict=True):
            rank = order(flat)
            places = _largest(rank, k)
            best.extend(
                _Found(score, value, key, place, shape)
                for score, value, place in zip(rank[places].tolist(), flat[places].tolist(), places, strict=True)
            )
            best.sort(key=lambda found: -found.score)
            del best[k:]
    return [_entry(scalars, found) for best in kept for found in best]


class _Found(NamedTuple):
    """One scalar that may be among the largest."""

    score: float
    value: float
    key: tuple[str, int | None]
    place: int
    shape: tuple[int, ...]


def _largest(rank: Tensor, k: int) -> list[int]:
    """Where the k largest are, largest first, ties as they come; `torch.topk` breaks them as it likes."""
    if not rank.numel():
        return []
    least = torch.topk(rank, min(k, rank.numel())).values[-1]
    candidates = (rank >= least).nonzero().squeeze(-1)
    chosen: list[int] = candidates[torch.sort(rank[candidates], descending=True, stable=True).indices[:k]].tolist()
    return chosen


def _entry(scalars: Scalars, found: _Found) -> Ranked:
    (name, layer), rest = found.key, found.place
    index: list[int] = []
    for size in reversed(found.shape):
        rest, at = divmod(rest, size)
        index.insert(0, at)
    about = scalars.about[name]
    node = None if about.basis is None else node_at(about.basis, layer, about.axes, tuple(index))
    return Ranked(found.value, node, name, layer, tuple(index))


def beside(scalars: Scalars, entries: Sequence[Ranked]) -> list[dict[str, float]]:
    """For each entry of a ranking, the values of all scalars of the same node, by name; one layer at a time."""
    found: list[dict[str, float]] = [{} for _ in entries]
    for name, layer in scalars:
        about = scalars.about[name]
        same = [
            (values, entry.at)
            for values, entry in zip(found, entries, strict=True)
            if entry.node is not None
            and entry.layer == layer
            and str(entry.node.basis) == str(about.basis)
            and scalars.about[entry.name].axes == about.axes
        ]
        if same:
            tensor = scalars[name, layer]
            for values, at in same:
                values[name] = float(tensor[at])
    return found


def node_at(basis: Basis, layer: int | None, axes: tuple[Axis, ...], index: tuple[int, ...]) -> Node:
    """The node of an index into a scalar; axes of the basis that were summed have none."""
    where: dict[str, int] = dict(zip(axes, index, strict=True))
    if "pair" in where:
        where["token"], where["key"] = pair_of(where["pair"])
    return Node(basis, layer, tuple(0 if axis == "one" else where.get(axis) for axis in basis.axes))
