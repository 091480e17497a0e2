"""Metrics against those of torch, and answers of several tokens against a run for each token."""

from __future__ import annotations

import math
from typing import Any

import featurizers
import pytest
import torch
from featurizers.errors import UsageError
from featurizers_patching import KL, Accuracy, LogitDifference, Loss, Metric, Probability, Scored, patch
from torch import Tensor

from tests.support.patching import (
    BASE,
    SHORT,
    SHORT_SOURCE,
    SOURCE,
    activations,
    logits_of,
    packable,
    plain_hook,
    swapped,
)


@pytest.fixture(scope="module")
def model() -> Any:
    return packable("llama")


def test_metrics_are_those_of_torch(model: Any) -> None:
    metrics: dict[str, Any] = {
        "difference": LogitDifference(7, 9),
        "probability": Probability(7),
        "loss": Loss(7),
        "accuracy": Accuracy(7),
        "kl": KL(),
        "mine": lambda logits: logits[:, 3].square(),
    }
    grid = patch(model, BASE, SOURCE, "resid.mid:1", metric=metrics, positions=[3], normalize=False)
    f = featurizers.create("identity")
    with featurizers.intervene(
        model, {"resid.mid:1": featurizers.Interchange(f, source={"input_ids": torch.tensor([SOURCE])}, positions=[3])}
    ):
        after = logits_of(model, BASE)
    clean = torch.distributions.Categorical(logits=logits_of(model, BASE))
    expected = [
        after[7] - after[9],
        after.softmax(-1)[7],
        torch.nn.functional.cross_entropy(after, torch.tensor(7)),
        after.argmax() == 7,
        torch.distributions.kl_divergence(clean, torch.distributions.Categorical(logits=after)),
        after[3] ** 2,
    ]
    for name, found, each in zip(grid.metrics, grid.values[:, 0, 0, 0], expected, strict=True):
        assert math.isclose(found, float(each), abs_tol=1e-9), name


def test_several_tokens_may_be_read(model: Any) -> None:
    grid = patch(
        model, BASE, SOURCE, "resid.pre:1", positions=[2, 4], at=[3, -1], metric=Probability(7), normalize=False
    )
    for column, token in enumerate((2, 4)):
        after = torch.stack([swapped(model, BASE, SOURCE, "resid.pre:1", [token], at) for at in (3, -1)])
        assert math.isclose(grid.values[0, 0, 0, column], after.softmax(-1)[:, 7].mean(), abs_tol=1e-10)


def test_own_metrics_know_the_pair(model: Any) -> None:
    class Answer(Metric):
        def __call__(self, scored: Scored) -> Tensor:
            return scored.of((7, 9))[:, 0]

    grid = patch(model, [BASE, SHORT], [SOURCE, SHORT_SOURCE], "resid.pre:0", metric=Answer(), normalize=False)
    assert math.isclose(grid.base[0, 1], logits_of(model, SHORT)[9], abs_tol=1e-10)


def sequence(model: Any, base: list[int], source: list[int], answer: list[int], site: Any, token: int) -> Tensor:
    """Return the log probability of each token of an answer after a swap, by plain hooks and one run for each token."""
    found = []
    for step, each in enumerate(answer):
        after = swapped(model, base + answer[:step], source + answer[:step], site, [token])
        found.append(after.log_softmax(-1)[each])
    return torch.stack(found)


def test_answers_of_several_tokens_are_read_one_after_the_other(model: Any) -> None:
    prompts = {"base": [BASE, SHORT], "source": [SOURCE, SHORT_SOURCE]}
    answers = [[7, 3, 9], [4]]
    names = ("log_probability", "probability", "loss", "accuracy")
    metrics: dict[str, Any] = {name: (name, answers) for name in names} | {"difference": ("logit_difference", 7, 9)}
    sites = ["resid.pre", "attn.z:1:2"]
    grid = patch(model, **prompts, sites=sites, metric=metrics, normalize=False)
    assert grid.metrics == (*names, "difference")
    assert grid.values.shape == (5, 4, 2, 6)
    for b, answer in enumerate(answers):
        base, source = prompts["base"][b], prompts["source"][b]
        for s, site in enumerate(grid.sites):
            for token in range(len(base)):
                steps = sequence(model, base, source, answer, site, token)
                right = all(
                    swapped(model, base + answer[:i], source + answer[:i], site, [token]).argmax() == each
                    for i, each in enumerate(answer)
                )
                expected = torch.stack([steps.sum(), steps.sum().exp(), -steps.sum(), torch.tensor(right).double()])
                torch.testing.assert_close(grid.raw[:4, s, b, token], expected, rtol=0, atol=1e-10)
                after = swapped(model, base, source, site, [token])
                assert math.isclose(grid.raw[4, s, b, token], after[7] - after[9], abs_tol=1e-10)
        whole = sum(logits_of(model, source + answer[:i]).log_softmax(-1)[each] for i, each in enumerate(answer))
        assert math.isclose(grid.source[0, b], whole, abs_tol=1e-10)
    assert grid.prompts[0] == (tuple(BASE), tuple(SOURCE))
    assert grid.values[:, :, 1, 4:].isnan().all()


def test_positions_are_of_the_prompt_and_labels_are_answers(model: Any) -> None:
    records = [{"base": BASE, "source": SOURCE, "label": [7, 3]}]
    grid = patch(model, records, sites="mlp.out:1", positions=[-1, "all"], metric="log_probability", normalize=False)
    assert math.isclose(
        grid.raw[0, 0, 0, 0], sequence(model, BASE, SOURCE, [7, 3], "mlp.out:1", 5).sum(), abs_tol=1e-10
    )
    again = patch(
        model, BASE, SOURCE, sites="mlp.out:1", positions=[-1], metric=("log_probability", [[7, 3]]), normalize=False,
        method="gradient",
    )  # fmt: skip
    zero = torch.zeros(1, 7, 32, dtype=torch.float64, requires_grad=True)
    with plain_hook(model, "mlp.out:1", lambda hidden: hidden + zero):
        logits = model(torch.tensor([[*BASE, 7]]), use_cache=False).logits[0].log_softmax(-1)
    (gradient,) = torch.autograd.grad(logits[5, 7] + logits[6, 3], zero)
    change = (activations(model, SOURCE, "mlp.out:1") - activations(model, BASE, "mlp.out:1"))[0, 5]
    assert math.isclose(again.raw[0, 0, 0, 0] - again.base[0, 0], change @ gradient[0, 5], abs_tol=1e-10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": ("logit_difference", [[7, 8]], 9)}, "has 2 tokens, and the metric reads one.*log_probability"),
        ({"metric": ("log_probability", [[7, 8]]), "at": 2}, "leave at=2 out"),
        ({"metric": ("probability", 5000)}, "no token 5000 to measure"),
        ({"metric": ("log_probability", [[7, 5000]])}, "no token 5000 to measure"),
        ({"metric": ("log_probability", [[5000, 7]])}, "vocabulary has 48"),
        ({"metric": {"a": ("loss", [[7, 8]]), "b": ("loss", 7)}, "screen": 2}, "a call of its own"),
    ],
)
def test_answers_that_cannot_be_read_are_refused(model: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        patch(model, BASE, SOURCE, **options)
