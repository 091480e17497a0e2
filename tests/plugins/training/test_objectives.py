"""Objectives of a search, beside torch's own log-softmax."""

from __future__ import annotations

import torch
from featurizers_training.search.objectives import Answers, cross_entropy, logit_difference

LOGITS = 3 * torch.randn(3, 2, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
LABEL, IS_TOKEN = torch.tensor([[1, 4], [5, 0], [6, 2]]), torch.tensor([[True, True], [True, False], [True, True]])
BASE_LABEL = torch.tensor([[0], [3], [2]])


def answers(label=LABEL, there=IS_TOKEN) -> Answers:
    return Answers(label, there, lambda: (BASE_LABEL, torch.ones(3, 1, dtype=torch.bool)))


def test_cross_entropy_is_the_mean_over_the_tokens_of_a_label_and_padding_is_none() -> None:
    log = LOGITS.log_softmax(-1)
    expected = torch.stack([-(log[0, 0, 1] + log[0, 1, 4]) / 2, -log[1, 0, 5], -(log[2, 0, 6] + log[2, 1, 2]) / 2])
    found = cross_entropy(LOGITS, answers())
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    found = cross_entropy(LOGITS[:, :1], answers(LABEL[:, :1], IS_TOKEN[:, :1]))
    torch.testing.assert_close(found.double(), -log[[0, 1, 2], 0, [1, 5, 6]], rtol=1e-5, atol=1e-6)


def test_the_logit_difference_is_that_of_the_first_tokens() -> None:
    expected = LOGITS[[0, 1, 2], 0, [0, 3, 2]] - LOGITS[[0, 1, 2], 0, [1, 5, 6]]
    torch.testing.assert_close(logit_difference(LOGITS, answers()).double(), expected, rtol=1e-5, atol=1e-5)
