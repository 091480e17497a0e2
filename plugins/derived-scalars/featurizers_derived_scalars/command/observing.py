"""`observed`: scalars that are summed for plots while they are ranked, so that each is computed once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from featurizers_derived_scalars.results import Scalars
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


def observed(scalars: Scalars, observation: Observation, tick: Callable[[], None]) -> Scalars:
    """Return the same scalars; each that is looked up is added to the observation, and ``tick`` is called.

    Logits of masked pairs, which are minus infinity, become zero.
    """
    return Scalars(
        {key: functools.partial(_look_up, scalars, key, observation, tick) for key in scalars}, scalars.about
    )


def _look_up(scalars: Scalars, key: Key, observation: Observation, tick: Callable[[], None]) -> Tensor:
    tensor = scalars[key]
    masked = torch.isneginf(tensor)
    tensor = tensor.masked_fill(masked, 0.0) if masked.any() else tensor
    observation.add(key, tensor, scalars.about[key[0]].axes)
    tick()
    return tensor
