"""`Divided`: features that several processes share, and the rule by which they fire."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from featurizers.errors import FeatureIndexError, UsageError
from featurizers.features import Active, Rule
from torch import Tensor

from featurizers_sharded.collectives import gather, own_part, total
from featurizers_sharded.ranks import Ranks
from featurizers_sharded.selection import selected, sizes_of

FETCHED: Final = 4096
"""Features whose rows an operation fetches from the processes that hold them; of more, each computes its own."""


@dataclass(frozen=True)
class Divided:
    """Features of a dictionary, or of a group of a map, in equal parts: each process holds neighbouring ones.

    Args:
        ranks: the processes.
        rule: activation rule.
        options: numbers of the rule.
        n_features: number of features.
        name: of the features, for errors.

    Attributes:
        sizes: numbers of features of the processes.

    Raises:
        UsageError: there are fewer features than processes.
    """

    ranks: Ranks
    rule: Rule
    options: Mapping[str, Any]
    n_features: int
    name: str = ""
    sizes: list[int] = field(init=False)

    def __post_init__(self) -> None:
        """Divide the features."""
        sizes = sizes_of(self.rule, self.options, self.n_features, self.ranks.size)
        if not min(sizes):
            raise UsageError(
                f"{self.name}{self.n_features} features cannot be divided over the {self.ranks.size} ranks of the mesh"
            )
        object.__setattr__(self, "sizes", sizes)

    def __deepcopy__(self, memo: dict[int, Any]) -> Divided:
        """Return the same features, which do not change."""
        return self

    @property
    def start(self) -> int:
        """Number of the first feature here."""
        return sum(self.sizes[: self.ranks.rank])

    @property
    def stop(self) -> int:
        """Number after the last feature here."""
        return sum(self.sizes[: self.ranks.rank + 1])

    def here(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Return which of some features are here, and their rows; row 0 for the others.

        Raises:
            FeatureIndexError: there is no such feature.
        """
        outside = (numbers < 0) | (numbers >= self.n_features)
        if bool(outside.any()):
            wrong = int(numbers[outside][0])
            raise FeatureIndexError(f"{self.name}{self.n_features} features are numbered from 0, and {wrong} is none")
        own = (numbers >= self.start) & (numbers < self.stop)
        return own, torch.where(own, numbers - self.start, 0)

    # ------------------------------------------------------------------ between this process and all of them
    def every(self, own: Tensor) -> Tensor:
        """Return the features of all processes; ``own`` are those of this one, ``(*batch, n)``."""
        return gather(own, self.sizes, self.ranks)

    def own(self, features: Tensor) -> Tensor:
        """Return the features of this process; all have the same ``features``, ``(*batch, n_features)``."""
        return own_part(features, self.sizes, self.ranks)

    def some(self, own: Tensor, columns: Tensor) -> Tensor:
        """Return the features in ``columns``, in every process; ``own`` are those of this one."""
        here, rows = self.here(columns)
        return total(torch.where(here, own[..., rows], 0), self.ranks)

    def fetched(self, tensor: Tensor, columns: Tensor) -> Tensor:
        """Return the rows of some features in every process: a sum in which each row is of one process, so exact."""
        here, rows = self.here(columns)
        mask = here.reshape(-1, *(1,) * (tensor.dim() - 1))
        return total(torch.where(mask, tensor[rows], 0), self.ranks)

    # ------------------------------------------------------------------ the rule
    def features(self, pre: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the features of this process.

        Args:
            pre: its pre-activations, ``(*batch, n)``.
            tensors: of the rule, ``(n,)`` each.
        """
        if self.rule.elementwise:
            return self.rule(pre, tensors, self.options)
        if self.rule.select is None:  # a feature depends on all others
            everywhere = {name: self.every(tensor) for name, tensor in tensors.items()}
            return self.own(self.rule(self.every(pre), everywhere, self.options))
        here, rows = self.here(self._selected(pre))
        chosen = torch.zeros_like(pre, dtype=torch.int8).scatter_add_(-1, rows, here.to(torch.int8)).bool()
        return torch.where(chosen, self.rule.function(pre, **tensors), 0)

    def active(self, pre: Tensor, tensors: Mapping[str, Tensor], scale: Tensor | None = None) -> Active:
        """Return the features of all processes that fire, and those of value 0 that the rule selects.

        Args:
            pre: pre-activations of this process, ``(tokens, n)``.
            tensors: of the rule, ``(n,)`` each.
            scale: factor of each feature of this process, ``(n,)``.
        """
        if self.rule.select is not None:
            return self._active_selected(pre, tensors, scale)
        own = self.features(pre, tensors)
        own = own if scale is None else own * scale
        rows, columns = own.nonzero(as_tuple=True)
        counts = self.ranks.counts(len(rows))
        values = gather(own[rows, columns], counts, self.ranks)
        places = self.ranks.gather(rows * self.n_features + columns + self.start, counts)
        places, order = places.sort()
        return Active(places // self.n_features, places % self.n_features, values[order])

    def _active_selected(self, pre: Tensor, tensors: Mapping[str, Tensor], scale: Tensor | None) -> Active:
        """Return the features that the rule selects of each token; each is computed by the process that holds it."""
        numbers = self._selected(pre)
        here, rows = self.here(numbers)
        own = self.rule.function(pre.gather(-1, rows), **{name: tensor[rows] for name, tensor in tensors.items()})
        own = own if scale is None else own * scale[rows]
        values = total(torch.where(here, own, 0), self.ranks)
        tokens = torch.arange(len(numbers), device=numbers.device).repeat_interleave(numbers.shape[-1])
        return Active(tokens, numbers.reshape(-1), values.reshape(-1))

    def _selected(self, pre: Tensor) -> Tensor:
        return selected(pre.detach(), self.rule, self.options, self.sizes, self.ranks)
