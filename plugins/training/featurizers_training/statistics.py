"""Intervals and tests for pairs that are not independent, such as pairs that share a word: clusters are resampled."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from featurizers.errors import ShapeError, UsageError
from torch import Tensor

RESAMPLES: Final = 10_000
CHUNK: Final = 2**22
"""Numbers that are drawn at once."""
Z_95: Final = 1.959963984540054
"""Quantile of the normal distribution at 97.5 %."""


@dataclass(frozen=True)
class Estimate:
    """Mean over pairs that are in clusters.

    Attributes:
        value: the mean.
        interval: 95 % confidence interval.
        pairs: number of pairs.
        clusters: number of clusters.
        p: probability of a mean as far from 0 if 0 is true, for a difference of two methods; else None.
    """

    value: float
    interval: tuple[float, float]
    pairs: int
    clusters: int
    p: float | None = None

    def __str__(self) -> str:
        """Return the mean and its interval as text, such as ``73.0% (60.1% to 84.2%)``."""
        low, high = self.interval
        return f"{self.value:.1%} ({low:.1%} to {high:.1%})"

    def record(self) -> dict[str, Any]:
        """Return the mean, its interval and the numbers of pairs and clusters as JSON data."""
        record = {
            "accuracy": self.value,
            "interval_95": list(self.interval),
            "pairs": self.pairs,
            "clusters": self.clusters,
        }
        return record if self.p is None else {**record, "p": self.p}


def clustered_mean(
    values: Sequence[float], clusters: Sequence[Hashable], *, resamples: int = RESAMPLES, seed: int = 0
) -> Estimate:
    """Return the mean of values and its interval by a bootstrap that draws whole clusters with replacement.

    The percentiles are those for Student's t with one degree of freedom less than there are clusters, and are widened
    by ``sqrt(n / (n - 1))`` (Hesterberg 2015, "What Teachers Should Know About the Bootstrap", section 5.3): without
    that the intervals of few clusters are too short. Shares that are all 0 or all 1 do not vary between resamples; then
    the interval is Wilson's for as many independent pairs as there are clusters.

    Args:
        values: of each pair, such as 1 for a right answer and 0 for a wrong one.
        clusters: what each pair shares with others, such as its label.
        resamples: number of resamples.
        seed: of the resampling.

    Raises:
        UsageError: there are fewer than two clusters.
        ShapeError: there is not one cluster for each value.

    Examples:
        >>> estimate = clustered_mean([1, 1, 0, 1, 0, 0], ["tea", "tea", "milk", "rum", "beer", "beer"])
        >>> estimate.value, estimate.clusters
        (0.5, 4)
    """
    sums, counts = _by_cluster(values, clusters)
    n, mean = len(counts), float(sums.sum() / counts.sum())
    if all(value == values[0] for value in values) and values[0] in (0, 1):
        interval = wilson(mean * n, n)
    else:
        generator, parts = torch.Generator().manual_seed(seed), []
        for count in _chunks(resamples, n):
            drawn = torch.randint(n, (count, n), generator=generator)
            parts.append(sums[drawn].sum(dim=1) / counts[drawn].sum(dim=1))
        means = torch.cat(parts)
        tail = _normal_cdf(-math.sqrt(n / (n - 1)) * student(n - 1))
        low, high = torch.quantile(means, torch.tensor([tail, 1 - tail], dtype=means.dtype)).tolist()
        interval = low, high
    return Estimate(mean, interval, len(values), n)


def paired_difference(
    first: Sequence[float],
    second: Sequence[float],
    clusters: Sequence[Hashable],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """Return the mean difference of two methods on the same pairs, its interval, and a two-sided test that it is 0.

    The interval is that of `clustered_mean`. The test flips the sign of all differences of a cluster at once, at
    random, because each way is as likely if the methods do not differ. All ways are counted if there are few.

    Raises:
        UsageError: there are fewer than two clusters.
        ShapeError: the methods were not measured on the same number of pairs.

    Examples:
        >>> paired_difference([1, 1, 1, 1], [0, 1, 0, 1], ["tea", "tea", "rum", "rum"]).p
        0.5
    """
    if len(first) != len(second):
        raise ShapeError(f"the methods have {len(first)} and {len(second)} pairs; measure both on the same pairs")
    differences = [a - b for a, b in zip(first, second, strict=True)]
    estimate = clustered_mean(differences, clusters, resamples=resamples, seed=seed)
    sums, _ = _by_cluster(differences, clusters)
    n = len(sums)
    reached, total = sums.sum().abs() - 1e-9, 2**n
    if total <= resamples:
        signs = ((torch.arange(total).unsqueeze(1) >> torch.arange(n)) & 1).double() * 2 - 1
        p = int(((signs @ sums).abs() >= reached).sum()) / total
    else:
        generator, as_far = torch.Generator().manual_seed(seed + 1), 0
        for count in _chunks(resamples, n):
            signs = torch.randint(2, (count, n), generator=generator).double() * 2 - 1
            as_far += int(((signs @ sums).abs() >= reached).sum())
        p = (as_far + 1) / (resamples + 1)
    return Estimate(estimate.value, estimate.interval, estimate.pairs, estimate.clusters, p)


def holm(p: Sequence[float]) -> list[float]:
    """Return the probabilities of several tests adjusted so that all may be read together (Holm 1979).

    Examples:
        >>> holm([0.25, 0.5])
        [0.5, 0.5]
    """
    adjusted, largest = [0.0] * len(p), 0.0
    for done, number in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        largest = max(largest, min(1.0, (len(p) - done) * p[number]))
        adjusted[number] = largest
    return adjusted


def wilson(hits: float, n: int) -> tuple[float, float]:
    """Return the 95 % interval of a share of independent pairs (Wilson 1927, "Probable inference")."""
    z = Z_95
    centre = hits + z**2 / 2
    half = z * math.sqrt(hits * (n - hits) / n + z**2 / 4)
    return max(0.0, (centre - half) / (n + z**2)), min(1.0, (centre + half) / (n + z**2))


def student(degrees: int) -> float:
    """Return the quantile of Student's t at 97.5 %, given the degrees of freedom.

    Exact for one and two degrees; above, the expansion of Abramowitz and Stegun 1964, formula 26.7.5, within 0.2 %.
    """
    if degrees <= 2:
        return (12.706204736, 4.302652730)[degrees - 1]
    z = Z_95
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return float(z + sum(term / degrees**power for power, term in enumerate(terms, 1)))


def _chunks(resamples: int, n: int) -> list[int]:
    """Split a number of resamples of ``n`` clusters into parts that need little memory."""
    step = max(1, CHUNK // n)
    return [min(step, resamples - start) for start in range(0, resamples, step)]


def _normal_cdf(x: float) -> float:
    return math.erfc(-x / math.sqrt(2)) / 2


def _by_cluster(values: Iterable[float], clusters: Sequence[Hashable]) -> tuple[Tensor, Tensor]:
    """Return the sum and the number of the values in each cluster.

    Raises:
        UsageError: there are fewer than two clusters.
        ShapeError: there is not one cluster for each value.
    """
    values = list(values)
    if len(values) != len(clusters):
        raise ShapeError(f"there are {len(values)} values and {len(clusters)} clusters; give each value its cluster")
    number = {cluster: i for i, cluster in enumerate(dict.fromkeys(clusters))}
    if len(number) < 2:
        raise UsageError(f"resampling needs at least two clusters; all {len(values)} pairs are in the same one")
    of = torch.tensor([number[cluster] for cluster in clusters])
    zeros = torch.zeros(len(number), dtype=torch.float64)
    given = torch.tensor(values, dtype=torch.float64)
    return zeros.index_add(0, of, given), zeros.index_add(0, of, torch.ones_like(given))
