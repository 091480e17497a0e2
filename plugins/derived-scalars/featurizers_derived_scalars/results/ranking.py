"""`ranked`: the largest of many scalars, found one layer at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from featurizers.errors import UsageError
from torch import Tensor

from featurizers_derived_scalars.nodes import Basis, Node, NodeAxis, pair_of
from featurizers_derived_scalars.results.scalar import Key, Scalar


class Ranked(NamedTuple):
    """A scalar among the largest.

    Attributes:
        value: its value.
        node: the node; None if the scalar is not of nodes.
        name: name of the scalar.
        layer: layer of the tensor.
        at: index into the tensor.
    """

    value: float
    node: Node | None
    name: str
    layer: int | None
    at: tuple[int, ...]


class _Candidate(NamedTuple):
    score: float
    value: float
    key: Key
    position: int
    shape: tuple[int, ...]


def ranked(
    tensors: Mapping[Key, Tensor], about: Mapping[str, Scalar], k: int, *orders: Callable[[Tensor], Tensor]
) -> list[Ranked]:
    """Return the k scalars that are largest by each order, largest first; ties by name, layer and index.

    Args:
        tensors: each is looked up once, and released before the next.
        about: description of each name.
        k: how many for each order.
        orders: functions from values to scores.

    Raises:
        UsageError: a scalar is not a number.
    """
    best: list[list[_Candidate]] = [[] for _ in orders]
    for key in tensors:
        tensor = tensors[key]
        flat, shape = tensor.flatten(), tuple(tensor.shape)
        if bool(flat.isnan().any()):
            raise UsageError(f"{key[0]} at layer {key[1]} is in places not a number, which has no rank")
        for candidates, order in zip(best, orders, strict=True):
            scores = order(flat)
            positions = _largest(scores, k)
            candidates.extend(
                _Candidate(score, value, key, position, shape)
                for score, value, position in zip(
                    scores[positions].tolist(), flat[positions].tolist(), positions, strict=True
                )
            )
            candidates.sort(key=lambda candidate: -candidate.score)
            del candidates[k:]
    return [_entry(about, candidate) for candidates in best for candidate in candidates]


def _largest(scores: Tensor, k: int) -> list[int]:
    """Return positions of the k largest, largest first, ties in order; `torch.topk` breaks ties arbitrarily."""
    if not scores.numel():
        return []
    least = torch.topk(scores, min(k, scores.numel())).values[-1]
    candidates = (scores >= least).nonzero().squeeze(-1)
    chosen: list[int] = candidates[torch.sort(scores[candidates], descending=True, stable=True).indices[:k]].tolist()
    return chosen


def _entry(about: Mapping[str, Scalar], candidate: _Candidate) -> Ranked:
    (name, layer), rest = candidate.key, candidate.position
    index: list[int] = []
    for size in reversed(candidate.shape):
        rest, at = divmod(rest, size)
        index.insert(0, at)
    known = about[name]
    node = None if known.basis is None else node_at(known.basis, layer, known.axes, tuple(index))
    return Ranked(candidate.value, node, name, layer, tuple(index))


def node_at(basis: Basis, layer: int | None, axes: tuple[NodeAxis, ...], index: tuple[int, ...]) -> Node:
    """Return the node of an index into a scalar; it has None on axes of the basis that were summed."""
    where: dict[str, int] = dict(zip(axes, index, strict=True))
    if "pair" in where:
        where["token"], where["key"] = pair_of(where["pair"])
    return Node(basis, layer, tuple(0 if axis == "one" else where.get(axis) for axis in basis.axes))


def beside(
    tensors: Mapping[Key, Tensor], about: Mapping[str, Scalar], entries: Sequence[Ranked]
) -> list[dict[str, float]]:
    """Return for each entry of a ranking the values of all scalars of its node, by name; one layer at a time."""
    values: list[dict[str, float]] = [{} for _ in entries]
    for name, layer in tensors:
        same = [
            (beside_entry, entry.at)
            for beside_entry, entry in zip(values, entries, strict=True)
            if entry.node is not None
            and entry.layer == layer
            and str(entry.node.basis) == str(about[name].basis)
            and about[entry.name].axes == about[name].axes
        ]
        if same:
            tensor = tensors[name, layer]
            for beside_entry, at in same:
                beside_entry[name] = float(tensor[at])
    return values
