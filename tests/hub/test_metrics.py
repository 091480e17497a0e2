"""Measured metrics in an artefact, on its card and on the Hub, as the Hub's own client reads them."""

from __future__ import annotations

import json
from typing import Any

import featurizers
import pytest
import torch
import yaml
from featurizers.errors import ArtefactError, UsageError
from huggingface_hub import ModelCard, parse_eval_result_entries

from tests.support.command import run
from tests.support.dictionaries import dictionary
from tests.support.hub import BOB, subspace
from tests.support.models import fresh_model


def measured(data: str | None = "hub:owner/texts@abc, split test") -> tuple[Any, Any]:
    f = dictionary("topk", d_in=32, k=5)
    f.site = "resid.post:1"
    ids = torch.randint(0, 64, (22, 8), generator=torch.Generator().manual_seed(0))
    return f, featurizers.evaluate(f, fresh_model("llama"), ids, data=data, ablations=["zero"], progress=False)


def results(path: Any) -> dict[str, float]:
    found = ModelCard.load(path).data.eval_results
    return {each.metric_type: each.metric_value for each in found or []}


def test_the_clients_reader_has_every_metric(tmp_path):
    f, evaluation = measured()
    folder = f.save_pretrained(tmp_path / "a", metrics=evaluation)
    again = featurizers.load(folder)
    stored = again.metadata["evaluation"]
    assert stored["metrics"] == evaluation.to_dict()["metrics"]
    assert stored["about"]["tokens"] == 22 * 8
    assert stored["sha256"] == json.loads((folder / "config.json").read_text())["sha256"]
    card = ModelCard.load(folder / "README.md")
    assert results(folder / "README.md") == {name: metric.value for name, metric in evaluation.metrics.items()}
    first = card.data.eval_results[0]
    assert (first.dataset_type, first.task_name) == ("owner/texts", "featurizer evaluation")
    assert first.dataset_args["tokens"] == 22 * 8
    assert first.metric_args == {"interval_95": list(evaluation.metrics[first.metric_type].interval)}
    assert f"| `kl` | {evaluation['kl']:.4g} (" in card.text
    for name in ("a", "b"):  # saved again, they stay
        again.save_pretrained(tmp_path / name)
        assert results(tmp_path / name / "README.md") == results(folder / "README.md")


def test_metrics_of_other_weights_are_shown_no_more_and_entries_of_others_stay(tmp_path):
    f, evaluation = measured()
    folder = f.save_pretrained(tmp_path / "a", metrics=evaluation)
    card = folder / "README.md"
    head, front, body = card.read_text().split("---\n", 2)
    data = yaml.safe_load(front)
    other = {"name": "x", "results": [{"task": {"type": "t"}, "dataset": {"name": "n", "type": "n"},
             "metrics": [{"type": "accuracy", "value": 0.5}]}]}  # fmt: skip
    data["model-index"].append(other)
    card.write_text(f"{head}---\n{yaml.safe_dump(data)}---\n{body}")
    f.save_pretrained(folder)
    assert len(results(card)) == 1 + len(evaluation.metrics)
    f.W_dec.data.mul_(2)
    f.save_pretrained(folder)
    assert results(card) == {"accuracy": 0.5}
    assert "## Measured" not in card.read_text()


def test_what_is_not_defined_is_said_and_is_no_result(tmp_path):
    f = subspace(d_in=32)
    f.site = "resid.post:1"
    ids = torch.randint(0, 64, (4, 6))
    evaluation = featurizers.evaluate(f, fresh_model("llama"), ids, metrics=["sparsity"], progress=False)
    folder = f.save_pretrained(tmp_path / "a", metrics=evaluation)
    assert "| `l0` | not defined, because no feature of any token was 0" in (folder / "README.md").read_text()
    assert results(folder / "README.md") == {}


@pytest.mark.parametrize("token", [None, BOB], ids=["own", "someone else's"])
def test_a_push_takes_metrics_along(hub, tmp_path, token):
    f, evaluation = measured()
    f.push_to_hub("alice/x")
    assert results_on(hub, tmp_path) == {}
    pull_request = token is not None
    f.push_to_hub("alice/x", metrics=evaluation, create_pr=pull_request, token=token)
    ref = "refs/pr/1" if pull_request else "refs/heads/main"
    expected = {name: metric.value for name, metric in evaluation.metrics.items()}
    assert results_on(hub, tmp_path, ref) == expected
    assert (results_on(hub, tmp_path) == {}) is pull_request
    entries = parse_eval_result_entries(yaml.safe_load(hub.files("alice/x", ref)[".eval_results/featurizer.yaml"]))
    assert {each.task_id: each.value for each in entries} == expected
    assert {each.dataset_id for each in entries} == {"owner/texts"}


def results_on(hub: Any, tmp_path: Any, ref: str = "refs/heads/main") -> dict[str, float]:
    path = tmp_path / "card.md"
    path.write_bytes(hub.files("alice/x", ref)["README.md"])
    return results(path)


def test_the_command_takes_a_file_and_leaves_the_folder(hub, tmp_path):
    f, evaluation = measured("texts.txt")
    folder = f.save_pretrained(tmp_path / "a")
    before = (folder / "config.json").read_bytes()
    file = evaluation.save(tmp_path / "evaluation.json")
    code, _, error = run("push", folder, "alice/x", "--with-metrics", file)
    assert code == 0, error
    assert (folder / "config.json").read_bytes() == before
    assert results_on(hub, tmp_path)["l0"] == 5
    assert not [name for name in hub.files("alice/x") if name.startswith(".eval_results")]  # not a data set of the Hub


def test_what_are_no_metrics_of_the_artefact_is_refused(tmp_path):
    f, evaluation = measured()
    with pytest.raises(UsageError, match="of kind 'dictionary'"):
        subspace().save_pretrained(tmp_path / "a", metrics=evaluation)
    with pytest.raises(UsageError, match="are what featurizers"):
        f.save_pretrained(tmp_path / "a", metrics={"l0": 3})
    with pytest.raises(UsageError, match="not int"):
        f.save_pretrained(tmp_path / "a", metrics=3)
    with pytest.raises(ArtefactError):
        f.save_pretrained(tmp_path / "a", metrics=tmp_path / "none.json")
    assert not (tmp_path / "a").exists()
    featurizers.save_collection({"x": f}, tmp_path / "several")
    with pytest.raises(UsageError, match="one artefact"):
        featurizers.push(tmp_path / "several", "alice/y", metrics=evaluation)
