"""`watched`: scalars that are summed up for pictures while they are ranked, so that each is computed once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from featurizers_derived_scalars.results import Scalars

Key = tuple[str, int | None]


@dataclass
class Seen:
    """Sums of the tensors that were looked up.

    Attributes:
        by_token: of each name and layer, the sum at each token.
        by_head: of each name and layer that has heads, the sum of each head.
    """

    by_token: dict[Key, list[float]] = field(default_factory=dict)
    by_head: dict[Key, list[float]] = field(default_factory=dict)

    def take(self, key: Key, tensor: Tensor, axes: tuple[str, ...]) -> None:
        """Sum up one tensor."""
        for axis, kept in (("token", self.by_token), ("head", self.by_head)):
            if axis in axes:
                others = [i for i, name in enumerate(axes) if name != axis]
                summed = tensor.sum(others) if others else tensor
                kept[key] = [float(x) for x in summed]

    @property
    def names(self) -> list[str]:
        """Names that have tokens, in order."""
        return list(dict.fromkeys(name for name, _ in self.by_token))


def watched(scalars: Scalars, seen: Seen, tick: Callable[[], None]) -> Scalars:
    """The same scalars; each that is looked up is summed up and counted.

    Scores of masked pairs, which are minus infinity, are taken as zero: they are no scores.
    """
    return Scalars({key: functools.partial(_looked_up, scalars, key, seen, tick) for key in scalars}, scalars.about)


def _looked_up(scalars: Scalars, key: Key, seen: Seen, tick: Callable[[], None]) -> Tensor:
    tensor = scalars[key]
    masked = torch.isneginf(tensor)
    tensor = tensor.masked_fill(masked, 0.0) if masked.any() else tensor
    seen.take(key, tensor, scalars.about[key[0]].axes)
    tick()
    return tensor
