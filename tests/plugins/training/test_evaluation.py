"""Confidence interval of an accuracy."""

from __future__ import annotations

import pytest
from featurizers_training import Accuracy


@pytest.mark.parametrize(
    ("hits", "n", "interval"),
    [(8, 10, (0.4901625, 0.9433178)), (0, 20, (0.0, 0.1611252)), (50, 50, (0.9286524, 1.0))],
)
def test_the_interval_is_that_of_wilson(hits: int, n: int, interval: tuple[float, float]) -> None:
    """Each bound p solves ``|hits / n - p| = z sqrt(p (1 - p) / n)``; the expected numbers were computed separately."""
    accuracy = Accuracy(hits, n)
    assert accuracy.interval == pytest.approx(interval, abs=1e-6)
    for bound in accuracy.interval:
        if 0 < bound < 1:
            assert abs(hits / n - bound) == pytest.approx(1.959963985 * (bound * (1 - bound) / n) ** 0.5)
