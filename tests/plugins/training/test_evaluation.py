"""An accuracy: its intervals, and which pairs it counts."""

from __future__ import annotations

import featurizers
import pytest
import torch
from featurizers_training import Accuracy, Pairs, clustered_mean, evaluate
from featurizers_training.evaluation import accuracy_alone

from tests.support.models import prompts, tiny_model


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


def test_an_accuracy_knows_which_pairs_are_answered_correctly():
    """After the last block the whole vector of the last token gives the answer of the source."""
    model, ids = tiny_model("llama"), prompts(10, 6)
    with torch.no_grad():
        answers = model(input_ids=ids).logits[:, -1].argmax(-1).tolist()
    wrong = (1, 4, 7)
    records = [
        {"base": ids[9 - i].tolist(), "source": ids[i].tolist(), "label": (answers[i] + (i in wrong)) % 64}
        for i in range(10)
    ]
    whole = featurizers.create("identity", d_in=model.config.hidden_size)
    whole.site = featurizers.Site("resid.post", model.config.num_hidden_layers - 1)
    accuracy = evaluate(model, Pairs.of(records), whole, batch_size=3)
    assert accuracy.right == tuple(i not in wrong for i in range(10))
    assert accuracy == Accuracy(7, 10)
    clusters = [i // 2 for i in range(10)]
    assert accuracy.clustered(clusters) == clustered_mean([float(i not in wrong) for i in range(10)], clusters)


def test_a_prompt_is_answered_by_the_tokens_that_the_model_generates() -> None:
    model = tiny_model("llama")
    rows = [prompts(1, length, seed=length) for length in (3, 5, 6, 4)]
    told = [
        model.generate(row, max_new_tokens=2, do_sample=False, pad_token_id=0)[0, row.shape[1] :].tolist()
        for row in rows
    ]
    labels = [tuple(told[0]), tuple(told[1][:1]), (told[2][0], (told[2][1] + 1) % 64), tuple(told[3])]
    asked = [(tuple(row[0].tolist()), label) for row, label in zip(rows, labels, strict=True)]
    assert accuracy_alone(model, asked, batch_size=3) == Accuracy(3, 4)
