"""Metrics of the logits, beside torch's own softmax and sums."""

from __future__ import annotations

import pytest
import torch
from featurizers.errors import PositionError, UsageError
from featurizers_derived_scalars.capturing import LogitDifference, log_probability, logit_difference
from featurizers_derived_scalars.capturing.metrics import LogitMinusMean, Probability, logit_minus_mean, probability

LOGITS = torch.randn(4, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
LOG = torch.log_softmax(LOGITS, dim=1)


@pytest.mark.parametrize("position", [-1, -2, 0, 3])
def test_metrics_are_their_formulas(position):
    row, log = LOGITS[position], LOG[position]
    for metric, expected in (
        (logit_difference(5, position=position), row[5]),
        (LogitDifference([5, 2], [7, 8, 1], position=position), row[[5, 2]].mean() - row[[7, 8, 1]].mean()),
        (logit_minus_mean([5, 2], position=position), (row[5] + row[2]) / 2 - row.sum() / 9),
        (probability([5, 2], position=position), log[5].exp() + log[2].exp()),
        (log_probability([5, 2], position=position), (log[5].exp() + log[2].exp()).log()),
        (Probability(5, position=position, log=True), log[5]),
    ):
        torch.testing.assert_close(metric.of(LOGITS), expected)


def test_the_position_is_the_last_where_none_is_given():
    for make in (logit_difference, logit_minus_mean, probability, log_probability, LogitMinusMean):
        assert torch.equal(make([5, 2]).of(LOGITS), make([5, 2], position=3).of(LOGITS))


def test_what_is_not_there_is_refused():
    for wrong in ([], [-1], [1.5], [True]):
        with pytest.raises(UsageError, match="targets are token ids, integers from 0, at least 1"):
            logit_minus_mean(wrong)
    assert logit_difference(5, []).distractors == ()
    with pytest.raises(UsageError, match="token 9 is not in the vocabulary, which has 9"):
        probability([9]).of(LOGITS)
    assert probability([8]).of(LOGITS) > 0
    for position in (4, -5):
        with pytest.raises(PositionError, match=f"at position {position}, but the prompt has 4 tokens"):
            probability([5], position=position).of(LOGITS)
