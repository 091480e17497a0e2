"""`patch` against `featurizers.intervene`, plain hooks and closed forms."""

from __future__ import annotations

import math
import subprocess
import sys
import warnings
from typing import Any

import featurizers
import pytest
import torch
from featurizers.errors import PluginError, SiteError, UsageError
from featurizers_patching import patch
from torch import Tensor

from tests.support.models import tiny_model
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


def test_each_value_is_that_of_a_run_with_a_plain_hook(model: Any) -> None:
    shares: list[float] = []
    grid = patch(
        model,
        [BASE, SHORT],
        [SOURCE, SHORT_SOURCE],
        ["resid.pre", "attn.z:1:*"],
        metric=("logit_difference", 7, 9),
        normalize=False,
        progress=shares.append,
    )
    assert grid.values.shape == (1, 3 + 4, 2, 6)
    assert list(map(str, grid.sites)) == [*(f"resid.pre:{i}" for i in range(3)), *(f"attn.z:1:{h}" for h in range(4))]
    for b, (base, source) in enumerate([(BASE, SOURCE), (SHORT, SHORT_SOURCE)]):
        for s, site in enumerate(grid.sites):
            for token in range(len(base)):
                after = swapped(model, base, source, site, [token])
                assert math.isclose(grid.values[0, s, b, token], after[7] - after[9], abs_tol=1e-10)
        clean = logits_of(model, base)
        assert math.isclose(grid.base[0, b], clean[7] - clean[9], abs_tol=1e-10)
        of_source = logits_of(model, source)
        assert math.isclose(grid.source[0, b], of_source[7] - of_source[9], abs_tol=1e-10)
    assert grid.values[0, :, 1, 4:].isnan().all()
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert (grid.about["packed"], grid.about["verified"]) == (True, 4)


def test_normalized_values_are_0_for_the_base_and_1_for_the_source(model: Any) -> None:
    grid = patch(
        model, [BASE, SHORT], [SOURCE, SHORT_SOURCE], metric=("logit_difference", 7, 9), positions=["all", -1, 0]
    )
    torch.testing.assert_close(grid.values[0, :, :, 0], torch.ones(3, 2, dtype=torch.float64))  # all tokens: the source
    assert torch.equal(grid.values[0, :, 0, 2], torch.zeros(3, dtype=torch.float64))  # a token that both prompts share
    raw = patch(
        model, [BASE, SHORT], [SOURCE, SHORT_SOURCE], metric=("logit_difference", 7, 9), positions=[-1], normalize=False
    )
    torch.testing.assert_close(
        grid.values[0, :, :, 1], (raw.values[0, :, :, 0] - grid.base[0]) / (grid.source[0] - grid.base[0])
    )


@pytest.mark.parametrize("skip_equal", [True, False])
def test_tokens_before_the_first_difference_change_nothing(model: Any, skip_equal: bool) -> None:
    grid = patch(model, BASE, SOURCE, ["resid.pre", "mlp.act"], metric="kl", normalize=False, skip_equal=skip_equal)
    torch.testing.assert_close(grid.values[0, :, 0, :2], torch.zeros(6, 2, dtype=torch.float64), rtol=0, atol=1e-12)
    assert (grid.values[0, :, 0, 2:-1].abs() > 1e-9).any()


def test_only_the_columns_that_are_read_give_the_same_as_the_whole_head(model: Any) -> None:
    columns = patch(model, BASE, SOURCE, metric=("logit_difference", 7, 9), normalize=False)
    whole = patch(model, BASE, SOURCE, metric=lambda logits: logits[:, 7] - logits[:, 9], normalize=False)
    torch.testing.assert_close(columns.values, whole.values, rtol=0, atol=1e-12)


def test_answers_may_differ_by_pair_and_come_from_records(model: Any) -> None:
    records = [
        {"base": BASE, "source": SOURCE, "label": 7, "base_label": [9]},
        {"base": SHORT, "source": SHORT_SOURCE, "label": 3, "base_label": 4},
    ]
    grid = patch(model, records, sites="mlp.out:0", positions=[-1], normalize=False)
    for b, (base, source, label, counter) in enumerate([(BASE, SOURCE, 7, 9), (SHORT, SHORT_SOURCE, 3, 4)]):
        after = swapped(model, base, source, "mlp.out:0", [len(base) - 1])
        assert math.isclose(grid.values[0, 0, b, 0], after[label] - after[counter], abs_tol=1e-10)
    again = patch(
        model, [BASE, SHORT], [SOURCE, SHORT_SOURCE], "mlp.out:0", positions=[-1], normalize=False,
        metric=("logit_difference", [7, 3], [9, 4]),
    )  # fmt: skip
    assert torch.equal(again.values, grid.values)


def test_pairs_of_the_training_package_are_read(model: Any) -> None:
    from featurizers_training import Pairs

    records = [{"base": BASE, "source": SOURCE[1:], "label": 7, "base_label": 9, "base_position": {"end": -1}}]
    grid = patch(model, Pairs.of(records, position="end"), sites="resid.pre:1", positions=["end"], normalize=False)
    values = activations(model, SOURCE[1:], "resid.pre:1")[:, -1]

    def change(hidden: Tensor) -> Tensor:
        hidden[:, 5] = values
        return hidden

    with plain_hook(model, "resid.pre:1", change):
        after = logits_of(model, BASE)
    assert math.isclose(grid.values[0, 0, 0, 0], after[7] - after[9], abs_tol=1e-10)


def test_names_and_spans_are_columns(model: Any) -> None:
    records = [
        {"base": BASE, "source": SOURCE, "base_position": {"subject": [2, 3], "end": -1}},
        {"base": SHORT, "source": [1, *SHORT_SOURCE], "base_position": {"subject": [0, 1], "end": -1},
         "source_position": {"subject": [1, 2], "end": -1}},
    ]  # fmt: skip
    metric = ("logit_difference", 7, 9)
    grid = patch(model, records, sites="resid.post:0", positions=["subject", "end"], metric=metric, normalize=False)
    after = swapped(model, BASE, SOURCE, "resid.post:0", [2, 3])
    assert math.isclose(grid.values[0, 0, 0, 0], after[7] - after[9], abs_tol=1e-10)
    values = activations(model, [1, *SHORT_SOURCE], "resid.post:0")

    def change(hidden: Tensor) -> Tensor:
        hidden[:, :2] = values[:, 1:3]
        return hidden

    with plain_hook(model, "resid.post:0", change):
        after = logits_of(model, SHORT)
    assert math.isclose(grid.values[0, 0, 1, 0], after[7] - after[9], abs_tol=1e-10)
    same = patch(
        model, BASE, SOURCE, "resid.post:0", positions={"subject": [2, 3], "end": -1}, metric=metric, normalize=False
    )
    assert same.positions == ("subject", "end")
    assert torch.equal(same.values[:, :, 0], grid.values[:, :, 0])


def through(model: Any, operation: Any) -> Tensor:
    with featurizers.intervene(model, {"resid.post:1": operation}):
        return logits_of(model, BASE)


SOURCE_INPUTS = {"input_ids": torch.tensor([SOURCE])}


def test_featurizers_change_what_they_change_in_intervene() -> None:
    model = tiny_model("llama").requires_grad_(False)
    subspace = featurizers.create("subspace", d_in=32, n_features=8, seed=0)
    dictionary = featurizers.DictionaryFeaturizer.from_tensors(
        W_enc=torch.randn(64, 32), W_dec=torch.randn(64, 32), b_enc=torch.randn(64), b_dec=torch.randn(32), rule="relu"
    )
    gate = torch.linspace(0, 1, 8)
    swap, ablate = featurizers.Interchange, featurizers.Ablate
    identity = featurizers.create("identity")
    cases: list[tuple[Any, dict[str, Any], Any]] = [
        (subspace, {}, lambda at: swap(subspace, source=SOURCE_INPUTS, **at)),
        (subspace, {"indices": [1, 5]}, lambda at: swap(subspace, source=SOURCE_INPUTS, indices=[1, 5], **at)),
        (dictionary, {"indices": [3, 40]}, lambda at: swap(dictionary, source=SOURCE_INPUTS, indices=[3, 40], **at)),
        (dictionary, {"operation": "ablate", "value": 0.5, "indices": [3]},
         lambda at: ablate(dictionary, value=0.5, indices=[3], **at)),
        (subspace, {"operation": "mask", "gate": gate},
         lambda at: featurizers.Mask(subspace, source=SOURCE_INPUTS, gate=gate, **at)),
        (None, {"operation": "ablate"}, lambda at: ablate(identity, **at)),
        (None, {"operation": lambda base, source: (base + source) / 2}, None),
    ]  # fmt: skip
    for featurizer, options, operation in cases:
        options |= {"metric": ("logit_difference", 7, 9), "normalize": False}
        grid = patch(model, BASE, SOURCE, "resid.post:1", featurizer=featurizer, **options)
        for token in range(6):
            if operation is None:
                values = activations(model, SOURCE, "resid.post:1")

                def change(hidden: Tensor, token: int = token, values: Tensor = values) -> Tensor:
                    hidden[:, token] = (hidden[:, token] + values[:, token]) / 2
                    return hidden

                with plain_hook(model, "resid.post:1", change):
                    after = logits_of(model, BASE)
            else:
                after = through(model, operation({"positions": [token]}))
            assert math.isclose(grid.values[0, 0, 0, token], float(after[7] - after[9]), abs_tol=2e-4), (options, token)


def test_sites_may_have_their_own_featurizers_and_special_tokens_stay() -> None:
    model = tiny_model("llama").requires_grad_(False)
    f = featurizers.create("subspace", d_in=32, n_features=8, seed=0)
    f.special_tokens = (7,)
    grid = patch(model, BASE, SOURCE, {"resid.post:1": f, "mlp.out:0": None}, metric=("logit_difference", 7, 9))
    assert BASE[3] == 7
    assert grid.values[0, 0, 0, 3] == 0
    assert grid.values[0, 1, 0, 3] != 0


def test_texts_and_padded_inputs_are_the_same_prompts(model: Any) -> None:
    class Words:
        def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
            return {"input_ids": [int(word[1:]) for word in text.split()]}

        def decode(self, ids: list[int]) -> str:
            return " ".join(f"w{i}" for i in ids)

    text = {"base": " ".join(f"w{i}" for i in SHORT), "source": " ".join(f"w{i}" for i in SHORT_SOURCE)}
    grid = patch(model, **text, metric=("logit_difference", "w7", "w9"), tokenizer=Words())
    assert grid.labels == ("w8", "w1", "w4", "w6")
    padded = {
        name: {"input_ids": torch.tensor([[0, 0, *ids]]), "attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1]])}
        for name, ids in (("base", SHORT), ("source", SHORT_SOURCE))
    }
    assert torch.equal(patch(model, **padded, metric=("logit_difference", 7, 9)).values, grid.values)


def test_pairs_in_several_groups_give_the_same(model: Any) -> None:
    pairs = [(BASE, SOURCE), (SHORT, SHORT_SOURCE), (SHORT_SOURCE, SHORT)]
    bases, sources = [each for each, _ in pairs], [each for _, each in pairs]
    options: dict[str, Any] = {"metric": ("logit_difference", 7, 9), "normalize": False}
    whole = patch(model, bases, sources, **options)
    for rows in (1, 9, 20):
        torch.testing.assert_close(
            patch(model, bases, sources, batch_rows=rows, **options).values,
            whole.values,
            equal_nan=True,
            rtol=0,
            atol=1e-11,
        )


def test_contexts_around_the_call_do_not_reach_its_runs(model: Any) -> None:
    expected = patch(model, BASE, SOURCE, metric=("logit_difference", 7, 9))
    zero = featurizers.Ablate(featurizers.create("identity"))
    with featurizers.intervene(model, {"mlp.out:1": zero}):
        edited = logits_of(model, BASE)
        grid = patch(model, BASE, SOURCE, metric=("logit_difference", 7, 9))
        assert torch.equal(logits_of(model, BASE), edited)
    assert torch.equal(grid.values, expected.values)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"source": SOURCE[1:]}, "pair 0: the base has 6 tokens and the source 5, so that each token is not the same"),
    ({"source": SOURCE[1:], "positions": [2]}, "the position 2 is not the same in both"),
    ({"source": [SOURCE, SOURCE]}, "1 base prompts and 2 source prompts"),
    ({"source": None}, "give a source prompt for each base"),
    ({"source": "a text"}, "a text needs the model's tokenizer"),
    ({"source": [1, 2, 3, 4, 5, 99999]}, "vocabulary has 48"),
    ({"positions": [6]}, "the prompt has 6 tokens and no position 6"),
    ({"positions": ["subject"]}, "has no position named 'subject'"),
    ({"positions": [1, 1]}, "the position '1' is there twice"),
    ({"positions": []}, "positions are empty"),
    ({"positions": [[1, 1]]}, "a token is named twice"),
    ({"positions": [True]}, "a position is a number"),
    ({"positions": {"a": [[1], [2]]}}, "given for 2 pairs, and there are 1"),
    ({"metric": "logit_difference"}, "pair 0 has no 'label'"),
    ({"metric": ("logit_difference", [1, 2], 3)}, "2 answers and 1 pairs"),
    ({"metric": ("probability", 1, 2)}, "takes 1 answers, not 2"),
    ({"metric": "logit-diff"}, "no metric 'logit-diff'.*logit_difference"),
    ({"metric": ("logit_difference", 7, 5000)}, "no token 5000 to measure"),
    ({"metric": ("logit_difference", [[7, 8]], 9)}, "has 2 tokens, and the metric reads one"),
    ({"metric": lambda logits: logits[:, 0] * math.nan}, "gives nan for the logits"),
    ({"metric": lambda logits: logits}, "a number for each of"),
    ({"metric": lambda logits: 1.0}, "not float"),
    ({"metric": 3}, "a metric is a name"),
    ({"metric": {}}, "no metrics"),
    ({"at": 6}, "no position 6"),
    ({"operation": "swap"}, "no operation 'swap'"),
    ({"operation": "mask"}, "takes a gate"),
    ({"indices": [1]}, "give the featurizer"),
    ({"featurizer": 3}, "expected a featurizer"),
    ({"sites": []}, "no sites to patch"),
    ({"sites": ["resid.pre", "resid.pre:0"]}, "resid.pre:0 is there twice"),
    ({"freeze": "mlp.act"}, "'mlp.act' cannot be frozen"),
    ({"batch_rows": 0}, "batch_rows is a number of tokens"),
]


@pytest.mark.parametrize(("options", "message"), WRONG, ids=[message for _, message in WRONG])
def test_wrong_arguments_are_refused(model: Any, options: dict[str, Any], message: str) -> None:
    given = {"base": BASE, "source": SOURCE, "metric": ("logit_difference", 7, 9), **options}
    with pytest.raises((UsageError, featurizers.errors.ShapeError), match=message):
        patch(model, **given)


@pytest.mark.parametrize("site", ["resid.pre:3", "attn.z:0:4", "resid.pre:0:1", "mlp.nothing", "attn.z:*:*:*"])
def test_sites_that_there_are_not_are_refused(model: Any, site: str) -> None:
    with pytest.raises(SiteError):
        patch(model, BASE, SOURCE, site, metric=("logit_difference", 7, 9))


def test_a_model_in_training_or_without_a_head_is_refused(model: Any) -> None:
    import copy

    with pytest.raises(UsageError, match="training mode"):
        patch(copy.deepcopy(model).train(), BASE, SOURCE, metric="kl")
    with pytest.raises(UsageError, match="no language-model head"):
        patch(model.model, BASE, SOURCE, metric="kl")


def test_baselines_that_are_equal_are_warned_of(model: Any) -> None:
    with pytest.warns(UserWarning, match="base and source give nearly the same"):
        grid = patch(model, BASE, BASE, metric=("logit_difference", 7, 9))
    assert grid.values.isnan().all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        patch(model, BASE, BASE, metric=("logit_difference", 7, 9), normalize=False)


def test_the_core_names_the_package_if_it_is_missing() -> None:
    program = """
import importlib.metadata as metadata
points = metadata.entry_points
metadata.entry_points = lambda **given: tuple(each for each in points(**given) if each.name != "patching")
import featurizers
try:
    featurizers.patch
except featurizers.errors.MissingDependencyError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "featurizers.patch needs featurizers-patching" in done.stdout
    assert "pip install 'featurizers[patching]'" in done.stdout
    assert issubclass(PluginError, Exception)
