"""Intervals and tests for pairs in clusters, against closed forms and the coverage of simulated pairs."""

from __future__ import annotations

import math

import pytest
import torch
from featurizers.errors import ShapeError, UsageError
from featurizers_training import Accuracy, Pairs, clustered_mean, holm, paired_difference
from featurizers_training.statistics import student, wilson

TABLE = {1: 12.7062, 2: 4.30265, 3: 3.18245, 4: 2.77645, 5: 2.57058, 10: 2.22814, 23: 2.06866, 100: 1.98397}
"""Quantiles of Student's t at 97.5 %, as printed in tables."""


def simulated(n_clusters: int, size: int, seed: int) -> tuple[list[float], list[int]]:
    """Draw outcomes whose clusters have shares of their own, uniform from 0 to 1: the true mean is 1/2."""
    generator = torch.Generator().manual_seed(seed)
    share = torch.rand(n_clusters, 1, generator=generator)
    hits = torch.rand(n_clusters, size, generator=generator) < share
    return hits.double().flatten().tolist(), [i // size for i in range(n_clusters * size)]


@pytest.mark.parametrize(("degrees", "quantile"), TABLE.items())
def test_quantiles_are_those_of_tables(degrees, quantile):
    assert student(degrees) == pytest.approx(quantile, rel=2e-3)


def test_the_interval_of_clusters_of_one_size_is_that_of_a_t_test_of_their_means():
    values, clusters = simulated(24, 8, seed=0)
    means = torch.tensor(values).double().reshape(24, 8).mean(dim=1)
    half = TABLE[23] * float(means.std()) / math.sqrt(24)
    low, high = clustered_mean(values, clusters).interval
    assert low == pytest.approx(float(means.mean()) - half, abs=0.1 * half)
    assert high == pytest.approx(float(means.mean()) + half, abs=0.1 * half)


def test_the_interval_of_independent_pairs_is_that_of_wilson():
    values = [1.0] * 150 + [0.0] * 250
    estimate = clustered_mean(values, range(400))
    assert estimate.value == pytest.approx(0.375)
    assert estimate.interval == pytest.approx(wilson(150, 400), abs=0.005)


def test_intervals_cover_the_truth_as_often_as_they_say_where_those_for_independent_pairs_do_not():
    covered = independent = 0
    for seed in range(300):
        values, clusters = simulated(20, 10, seed)
        low, high = clustered_mean(values, clusters, resamples=1000).interval
        covered += low <= 0.5 <= high
        low, high = wilson(sum(values), len(values))
        independent += low <= 0.5 <= high
    assert 0.92 <= covered / 300 <= 0.98
    assert independent / 300 < 0.8


def test_clusters_of_different_sizes_weigh_as_many_pairs_as_they_have():
    values, clusters = [1.0] * 9 + [0.0], ["large"] * 9 + ["small"]
    assert clustered_mean(values, clusters).value == pytest.approx(0.9)


@pytest.mark.parametrize("value", [0, 1])
def test_outcomes_that_are_all_the_same_have_the_interval_of_as_many_pairs_as_clusters(value):
    estimate = clustered_mean([value] * 60, [i // 5 for i in range(60)])
    assert estimate.interval == wilson(12 * value, 12)
    assert (estimate.pairs, estimate.clusters) == (60, 12)


@pytest.mark.parametrize("resamples", [2**10, 1000])
def test_the_paired_test_of_pairs_without_clusters_is_the_sign_test(resamples):
    """Of ten pairs that differ, eight favour the first method: 112 of 1024 sequences of signs are as uneven."""
    first, second = [1.0] * 8 + [0.0] * 2 + [1.0] * 5, [0.0] * 8 + [1.0] * 2 + [1.0] * 5
    estimate = paired_difference(first[:10], second[:10], range(10), resamples=resamples)
    assert estimate.value == pytest.approx(0.6)
    assert estimate.p == pytest.approx(112 / 1024, abs=1e-9 if resamples == 2**10 else 0.03)
    with_ties = paired_difference(first, second, range(15), resamples=resamples)
    assert with_ties.p == pytest.approx(112 / 1024, abs=0.03), "pairs without a difference do not matter"


def test_the_paired_test_finds_nothing_as_often_as_it_says_where_there_is_nothing():
    rejected = 0
    for seed in range(200):
        first, clusters = simulated(12, 6, seed)
        shift = torch.randn(12, generator=torch.Generator().manual_seed(1000 + seed)).repeat_interleave(6).tolist()
        second = [a + b for a, b in zip(first, shift, strict=True)]
        rejected += (paired_difference(first, second, clusters, resamples=500).p or 0) <= 0.05
    assert rejected / 200 <= 0.1


def test_a_difference_has_the_sign_of_the_better_method():
    first, second, clusters = [1.0, 1.0, 1.0, 0.0] * 5, [0.0, 1.0, 0.0, 0.0] * 5, [i // 2 for i in range(20)]
    there, back = paired_difference(first, second, clusters), paired_difference(second, first, clusters)
    assert there.value == -back.value == 0.5
    assert there.interval == pytest.approx([-back.interval[1], -back.interval[0]], abs=0.02)
    assert there.p == back.p


def test_probabilities_are_adjusted_as_holm_does():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_what_cannot_be_resampled_is_refused():
    with pytest.raises(UsageError, match="at least two clusters; all 3 pairs"):
        clustered_mean([1, 0, 1], ["tea"] * 3)
    with pytest.raises(ShapeError, match="3 values and 2 clusters"):
        clustered_mean([1, 0, 1], ["tea", "rum"])
    with pytest.raises(ShapeError, match="1 and 2 pairs"):
        paired_difference([1], [1, 0], ["tea", "rum"])
    with pytest.raises(UsageError, match="numbers alone"):
        Accuracy(3, 4).clustered(["tea", "rum", "rum", "tea"])


def test_pairs_are_in_clusters_by_what_they_share():
    records = [
        {"base": [1, 2], "source": [3, 4], "label": 5},
        {"base": [1, 2], "source": [3, 5], "label": 6},
        {"base": [2, 2], "source": [3, 5], "label": 5},
    ]
    pairs = Pairs.of(records)
    sizes = {by: [pairs.clusters(by).index(each) for each in pairs.clusters(by)] for by in ("label", "base", "source")}
    assert sizes == {"label": [0, 1, 0], "base": [0, 0, 2], "source": [0, 1, 1]}
    with pytest.raises(UsageError, match="label, base, source, not by 'word'"):
        pairs.clusters("word")
