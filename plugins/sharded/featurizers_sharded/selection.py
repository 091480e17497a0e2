"""Which features of a token may fire, chosen over the features of all processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from featurizers.features import Rule
from torch import Tensor

from featurizers_sharded.ranks import Ranks

ORDERS: Final[Mapping[str, Callable[[Tensor], Tensor]]] = {"topk": lambda pre: pre, "abstopk": torch.abs}
"""Rules that select the k largest features, with what they compare; these are among the k largest of each part."""


def sizes_of(rule: Rule, options: Mapping[str, Any], n_features: int, ranks: int) -> list[int]:
    """Return how many features each process holds, as equal as can be; groups of ``groupmax`` are not cut if possible.

    A process may be left without any; the caller refuses that.
    """
    groups = options["k"] if rule.name == "groupmax" and options["k"] >= ranks else n_features
    whole, rest = divmod(groups, ranks)
    return [(whole + (rank < rest)) * (n_features // groups) for rank in range(ranks)]


def selected(pre: Tensor, rule: Rule, options: Mapping[str, Any], sizes: list[int], ranks: Ranks) -> Tensor:
    """Return the numbers of the features that the rule selects, int64 ``(*batch, k)``, ascending, the same everywhere.

    Args:
        pre: pre-activations of the features of this process, ``(*batch, n)``, without gradient.
        rule: with ``select``.
        options: numbers of the rule.
        sizes: numbers of features of the processes.
        ranks: the processes.
    """
    select = rule.select
    if select is None:
        raise ValueError(f"the rule {rule.name!r} selects no features")
    start = sum(sizes[: ranks.rank])
    if rule.name in ORDERS:
        return _largest(pre, ORDERS[rule.name], options["k"], start, sizes, ranks)
    size = sum(sizes) // options["k"] if rule.name == "groupmax" else 0
    if size and all(own % size == 0 for own in sizes):
        return ranks.gather(select(pre, k=sizes[ranks.rank] // size) + start, [own // size for own in sizes])
    return select(ranks.gather(pre, sizes), **options).sort(dim=-1).values


def _largest(
    pre: Tensor, order: Callable[[Tensor], Tensor], k: int, start: int, sizes: list[int], ranks: Ranks
) -> Tensor:
    """Return the k largest of all; among equal ones those of smaller numbers, so that all processes choose the same."""
    counts = [min(k, size) for size in sizes]
    values, own = order(pre).topk(counts[ranks.rank], dim=-1)
    values, numbers = ranks.gather(values, counts), ranks.gather(own + start, counts)
    by_number = numbers.argsort(dim=-1)
    values, numbers = values.gather(-1, by_number), numbers.gather(-1, by_number)
    best = values.argsort(dim=-1, descending=True, stable=True)[..., :k]
    return numbers.gather(-1, best.sort(dim=-1).values)
