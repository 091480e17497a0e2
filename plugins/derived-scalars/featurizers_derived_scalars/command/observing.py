"""`observed`: scalars that are summed for plots while they are ranked, so that each is computed once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from featurizers_derived_scalars.nodes import NodeAxis, pair_of
from featurizers_derived_scalars.results import Ranked, Scalar, Scalars
from featurizers_derived_scalars.results.ranking import node_at
from featurizers_derived_scalars.results.scalar import Key


@dataclass
class Observation:
    """Sums of the tensors that were looked up.

    Attributes:
        by_token: for each name and layer, the sum at each token.
        by_head: for each name and layer with heads, the sum of each head.
    """

    by_token: dict[Key, list[float]] = field(default_factory=dict)
    by_head: dict[Key, list[float]] = field(default_factory=dict)

    def add(self, key: Key, tensor: Tensor, axes: tuple[str, ...]) -> None:
        """Sum one tensor over all axes but tokens, and over all axes but heads."""
        for axis, sums in (("token", self.by_token), ("head", self.by_head)):
            if axis in axes:
                others = [i for i, name in enumerate(axes) if name != axis]
                sums[key] = (tensor.sum(others) if others else tensor).tolist()


def observed(scalars: Scalars, observation: Observation, tick: Callable[[], None], masked: int = 0) -> Scalars:
    """Return the same scalars; each that is looked up is added to the observation, and ``tick`` is called.

    Logits of masked pairs, which are minus infinity, become zero.

    Args:
        scalars: the scalars.
        observation: takes the sums.
        tick: called after each tensor.
        masked: number of tokens to leave out at the start, as tokens and as keys. `unmasked` puts entries of a
            ranking back to where they are in the whole prompt.
    """
    return Scalars(
        {key: functools.partial(_look_up, scalars, key, observation, tick, masked) for key in scalars}, scalars.about
    )


def unmasked(entry: Ranked, about: Scalar, masked: int) -> Ranked:
    """Return an entry of a ranking without the first tokens as one of the whole prompt."""

    def moved(axis: NodeAxis, i: int) -> int:
        if axis == "pair":
            token, key = (at + masked for at in pair_of(i))
            return token * (token + 1) // 2 + key
        return i + masked if axis in ("token", "key") else i

    at = tuple(moved(axis, i) for axis, i in zip(about.axes, entry.at, strict=True))
    node = None if about.basis is None else node_at(about.basis, entry.layer, about.axes, at)
    return entry._replace(at=at, node=node)


def _look_up(scalars: Scalars, key: Key, observation: Observation, tick: Callable[[], None], masked: int) -> Tensor:
    axes = scalars.about[key[0]].axes
    tensor = scalars[key]
    for dim, axis in enumerate(axes if masked else ()):
        if axis in ("token", "key"):
            tensor = tensor.narrow(dim, masked, tensor.shape[dim] - masked)
        elif axis == "pair":
            kept = [pair for pair in range(tensor.shape[dim]) if min(pair_of(pair)) >= masked]
            tensor = tensor.index_select(dim, torch.tensor(kept, device=tensor.device))
    hidden = torch.isneginf(tensor)
    tensor = tensor.masked_fill(hidden, 0.0) if hidden.any() else tensor
    observation.add(key, tensor, axes)
    tick()
    return tensor
