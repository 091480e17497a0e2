"""`evaluate`, `sweep`, `compare` and `report` of a harvest, beside the same on the model and the same documents."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import featurizers
import pytest
import torch
from featurizers.errors import ArtefactError, UsageError
from featurizers_evaluate import DEFINITIONS, compare, sweep
from featurizers_transcoder import CrossLayerTranscoder

from tests.plugins.harvest.test_harvest import IDS, harvest, topk
from tests.support.command import as_json, run
from tests.support.dictionaries import dictionary
from tests.support.models import fresh_model, save_language_model
from tests.support.site_maps import linear_map

SPARSITY = [name for name, each in DEFINITIONS.items() if each.group == "sparsity"]
RECONSTRUCTION = [name for name, each in DEFINITIONS.items() if each.group == "reconstruction"]
OPTIONS: dict[str, Any] = {"metrics": ["reconstruction", "sparsity"], "context": 10, "progress": False}


def numbers(result: Any) -> dict[str, Any]:
    """Return values and ends of intervals by name."""
    return {
        f"{name} {i}": value
        for name, metric in result.metrics.items()
        for i, value in enumerate((metric.value, *(metric.interval or ())))
    }


def check_equal(found: Any, expected: Any, rel: float = 1e-5) -> None:
    assert numbers(found) == pytest.approx(numbers(expected), rel=rel, abs=1e-6)
    torch.testing.assert_close(found.density, expected.density)
    for name in ("tokens", "tokens_read", "documents", "context", "excluded_tokens", "model", "dtype", "site"):
        assert found.about[name] == expected.about[name], name


@pytest.mark.parametrize(
    "options",
    [{}, {"mask_first": 2}, {"max_tokens": 75, "batch_size": 3}, {"exclude_special_tokens": IDS[4][:4]}, {"k": 2}],
    ids=str,
)
def test_a_harvest_has_the_numbers_of_the_run_on_the_model(tmp_path: Path, options: Any) -> None:
    f = topk()
    f.special_tokens = (IDS[5][3], IDS[3][0])
    whole = {"f": f, "x": "resid.post:1"}
    read = harvest(whole, IDS, tmp_path / "out", context=10, exclude_special_tokens=[IDS[2][1]])
    own = {**OPTIONS, **options}
    excluded = [IDS[2][1], *options.get("exclude_special_tokens", [])]
    expected = featurizers.evaluate(f, fresh_model("llama"), IDS, **{**own, "exclude_special_tokens": excluded})
    found = featurizers.evaluate(f, harvest=read, **own)
    assert {*found.metrics} == {*SPARSITY, *RECONSTRUCTION}
    check_equal(found, expected)
    own.pop("metrics")
    assert numbers(featurizers.evaluate(f, harvest=tmp_path / "out", **own)) == numbers(found), "the folder is opened"


def test_a_slice_is_measured_by_its_own_columns(tmp_path: Path) -> None:
    dictionary("relu", d_in=32).save_pretrained(tmp_path / "f")
    f = featurizers.load(tmp_path / "f", indices=[3, 40, 11, 60, 7, 22])
    f.site = "resid.post:1"
    read = harvest({"f": f}, IDS, tmp_path / "out", context=10)
    expected = featurizers.evaluate(f, fresh_model("llama"), IDS, **{**OPTIONS, "metrics": ["sparsity"]})
    check_equal(featurizers.evaluate(f, harvest=read, **{**OPTIONS, "metrics": ["sparsity"]}), expected)


def test_features_alone_give_sparsity_and_activations_alone_give_all(tmp_path: Path) -> None:
    f, model = topk(), fresh_model("llama")
    expected = featurizers.evaluate(f, model, IDS, **OPTIONS)
    features = harvest({"f": f}, IDS, tmp_path / "f", context=10)
    activations = harvest({"x": "resid.post:1"}, IDS, tmp_path / "x", context=10)
    check_equal(featurizers.evaluate(f, harvest=activations, **OPTIONS), expected)
    found = featurizers.evaluate(f, harvest=features, progress=False)
    assert list(found.metrics) == SPARSITY
    assert {name: numbers(expected)[name] for name in numbers(found)} == pytest.approx(numbers(found), rel=1e-5)
    shown = " ".join(repr(found).split())
    assert "not measured: reconstruction, because it needs the activations at resid.post:1" in shown
    assert "not measured: effect, because it needs the model" in shown
    found.save(tmp_path / "evaluation.json")
    assert json.loads((tmp_path / "evaluation.json").read_text())["about"]["not_measured"].keys() >= {"effect"}


def test_float16_changes_values_by_rounding_and_no_count(tmp_path: Path) -> None:
    options = {**OPTIONS, "metrics": ["sparsity"]}
    for factor in (1.0, 1e-9):  # of the small ones some values are 0 in float16
        f = topk()
        f.W_enc.data.mul_(factor)
        f.b_enc.data.zero_()
        read = harvest({"f": f}, IDS, tmp_path / str(factor), values="float16", context=10)
        smallest = min(abs(value) for row in read.table("f").to_pylist() for value in row["values"])
        assert (smallest == 0) == (factor < 1)
        expected = featurizers.evaluate(f, fresh_model("llama"), IDS, **options)
        found = featurizers.evaluate(f, harvest=read, progress=False)
        assert found["l0"] == expected["l0"] == 3
        assert torch.equal(found.density, expected.density)
        if factor == 1:
            assert found["l1"] == pytest.approx(expected["l1"], rel=1e-3)


def test_maps_are_measured_group_by_group(tmp_path: Path) -> None:
    f = linear_map(
        CrossLayerTranscoder, {i: ([f"in-{i}"], [f"out-{j}" for j in range(i, 2)]) for i in range(2)}, width=32
    )
    f.reads = {f"in-{i}": featurizers.Site("mlp.in", i) for i in range(2)}
    f.writes = {f"out-{i}": featurizers.Site("mlp.out", i) for i in range(2)}
    sites = {"a": "mlp.in:0", "b": "mlp.in:1", "c": "mlp.out:0", "d": "mlp.out:1"}
    whole = harvest({"f": f, **sites}, IDS, tmp_path / "out", context=10)
    features = harvest({"f": f}, IDS, tmp_path / "f", context=10)
    expected = featurizers.evaluate(f, fresh_model("llama"), IDS, **OPTIONS)
    found = featurizers.evaluate(f, harvest=whole, **OPTIONS)
    check_equal(found, expected)
    for site, metrics in expected.writes.items():
        assert {n: m.value for n, m in found.writes[site].items()} == pytest.approx(
            {n: m.value for n, m in metrics.items()}, rel=1e-5
        )
    few = featurizers.evaluate(f, harvest=features, progress=False)
    torch.testing.assert_close(few.density, expected.density)
    assert few["l1"] == pytest.approx(expected["l1"], rel=1e-5)


def test_sweeps_and_comparisons_of_a_harvest(tmp_path: Path) -> None:
    f, other, model = topk(), topk(5), fresh_model("llama")
    read = harvest({"f": f, "x": "resid.post:1"}, IDS, tmp_path / "out", context=10)
    for found, expected in (
        (sweep(f, harvest=read, k=[1, 2], **OPTIONS), sweep(f, model, IDS, k=[1, 2], **OPTIONS)),
        (
            compare({"f": f, "new": other}, harvest=read, **OPTIONS),
            compare({"f": f, "new": other}, model, IDS, **OPTIONS),
        ),
    ):
        for (name, one), (label, two) in zip(found, expected, strict=True):
            assert name == label
            check_equal(one, two)


def test_what_a_harvest_cannot_give_is_refused_by_name(tmp_path: Path) -> None:
    f, other = topk(), topk(5)
    read = harvest({"f": f}, IDS, tmp_path / "f", context=10)
    with pytest.raises(UsageError, match="the metrics 'effect' of 'dictionary' cannot be measured on a harvest"):
        featurizers.evaluate(f, harvest=read, metrics=["sparsity", "effect"])
    with pytest.raises(UsageError, match=r"'reconstruction'.*needs the activations at resid.post:1"):
        featurizers.evaluate(f, harvest=read, metrics=["reconstruction"])
    with pytest.raises(UsageError, match=r"no features of 'dictionary'.* and no activations of resid.post:1"):
        featurizers.evaluate(other, harvest=read)
    with pytest.raises(UsageError, match=r"no activations of resid.post:0"):
        featurizers.evaluate(f, harvest=read, site="resid.post:0")
    with pytest.raises(UsageError, match="but not both"):
        featurizers.evaluate(f, fresh_model("llama"), IDS, harvest=read)
    with pytest.raises(UsageError, match="give a model and documents, or harvest="):
        featurizers.evaluate(f)
    with pytest.raises(UsageError, match="context=10, not 12"):
        featurizers.evaluate(f, harvest=read, context=12)
    with pytest.raises(UsageError, match="a harvest is a folder, or what"):
        featurizers.evaluate(f, harvest=7)
    with pytest.raises(UsageError, match="other parameters or another dtype"):
        featurizers.report(f, fresh_model("gpt2"), harvest=read)
    read.plan.about["model"] = "one/model"
    x = harvest({"x": "resid.post:1"}, IDS, tmp_path / "x")
    x.plan.about["model"] = "one/model"
    other.site = featurizers.Site("resid.post", 1, model="another/model")
    with pytest.raises(UsageError, match="found in the model 'another/model', and the harvest is of 'one/model'"):
        featurizers.evaluate(other, harvest=x)
    assert featurizers.evaluate(other, harvest=x, any_model=True)["l0"] == 5


def test_files_that_do_not_fit_each_other_are_refused(tmp_path: Path) -> None:
    f = topk()
    read = harvest({"f": f}, IDS, tmp_path / "out")
    first, second = (tmp_path / "out" / "site=f" / f"part-00000{i}.parquet" for i in (0, 1))
    first.write_bytes(second.read_bytes())
    with pytest.raises(ArtefactError, match=r"site=f/part-000000.parquet lacks rows of document 0"):
        featurizers.evaluate(f, harvest=read)


@pytest.mark.parametrize("rule", ["topk", "abstopk"])
def test_a_report_of_a_harvest_is_that_of_the_model(tmp_path: Path, rule: str) -> None:
    f = dictionary(rule, d_in=32, k=3)
    f.site = "resid.post:1"
    model = fresh_model("llama")
    read = harvest({"f": f, "x": "resid.post:1"}, IDS, tmp_path / "out", context=10)
    expected = featurizers.report(f, model, IDS, context=10, effect_tokens=0, progress=False)
    for given in (model, None):
        found = featurizers.report(f, given, harvest=read, progress=False)
        for one, two in zip(found, expected, strict=True):
            assert one.density == two.density
            assert (one.mean, one.std) == pytest.approx((two.mean, two.std), rel=1e-5, abs=1e-7)
            assert [each.tokens for each in one.high] == [each.tokens for each in two.high]
            for a, b in zip((*one.high, *one.low), (*two.high, *two.low), strict=True):
                assert a.values == pytest.approx(b.values, rel=1e-4, abs=1e-5)
            assert [each for each, _ in one.neighbours] == [each for each, _ in two.neighbours]
            assert [each for each, _ in one.promoted] == ([each for each, _ in two.promoted] if given else [])
        assert numbers(found.evaluation) == pytest.approx(numbers(expected.evaluation), rel=1e-5)
        assert "needs the model" in found.about["no_effect"]
    assert "needs the model" in str(found.effects)
    found.save(tmp_path / "page.html")


def test_the_commands_take_a_harvest(tmp_path: Path) -> None:
    f = topk()
    f.save_pretrained(tmp_path / "f")
    save_language_model(fresh_model("llama"), tmp_path / "model")
    (tmp_path / "ids.jsonl").write_text("".join(json.dumps({"ids": ids}) + "\n" for ids in IDS))
    (tmp_path / "empty").mkdir()
    harvest({"f": f, "x": "resid.post:1"}, IDS, tmp_path / "out", context=10)
    whole = ("--model", tmp_path / "model", "--data", tmp_path / "ids.jsonl", "--key", "ids", "--device", "cpu")
    known = as_json("evaluate", tmp_path / "f", *whole, "--context", 10, "--metrics", "reconstruction,sparsity")
    found = as_json("evaluate", tmp_path / "f", "--harvest", tmp_path / "out")
    for name, metric in known["metrics"].items():
        assert found["metrics"][name]["value"] == pytest.approx(metric["value"], rel=1e-5)
    code, out, error = run("evaluate", tmp_path / "f", "--harvest", tmp_path / "out", "--sweep", "k=1,2")
    assert (code, "k=1" in out) == (0, True), error
    code, out, error = run("compare", tmp_path / "f", "--harvest", tmp_path / "out")
    assert (code, "explained_variance" in out) == (0, True), error
    about = as_json("report", tmp_path / "f", "--harvest", tmp_path / "out", "--out", tmp_path / "page.html")
    assert about["metrics"]["l0"]["value"] == 3
    assert (tmp_path / "page.html").is_file()
    for command in ("evaluate", "compare", "report"):
        for option in (("--data", "x.txt"), ("--context", 9), ("--exclude-special",)):
            error = run(command, tmp_path / "f", "--harvest", tmp_path / "out", *option)[2]
            assert error.startswith(f"error: {option[0]} is for a run of the model"), error
        assert "--harvest with the folder of a harvest" in run(command, tmp_path / "f")[2]
    assert "there is no harvest here" in run("evaluate", tmp_path / "f", "--harvest", tmp_path / "empty")[2]
