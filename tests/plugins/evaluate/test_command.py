"""The commands ``featurizers evaluate`` and ``featurizers compare``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import featurizers
import pytest
import torch

from tests.support.command import as_json, run
from tests.support.dictionaries import dictionary
from tests.support.models import fresh_model, save_language_model

TEXTS = [" ".join(f"w{i}" for i in row) for row in torch.randint(1, 64, (24, 9)).tolist()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    """Return a folder with a model, two artefacts and documents in three formats."""
    root = Path(tmp_path_factory.mktemp("it"))
    save_language_model(fresh_model("llama"), root / "model")
    for name, k in (("a", 4), ("b", 8)):
        f = dictionary("topk", d_in=32, k=k)
        f.id, f.site = name, "resid.post:1"
        f.save_pretrained(root / name)
    (root / "texts.txt").write_text("\n".join(TEXTS) + "\n\n")
    (root / "texts.jsonl").write_text("".join(json.dumps({"words": text}) + "\n" for text in TEXTS))
    return root


def options(root: Path, data: str = "texts.txt") -> tuple[Any, ...]:
    return ("--model", root / "model", "--data", root / data, "--device", "cpu")


def expected(root: Path, name: str = "a", **more: Any) -> Any:
    from transformers import AutoTokenizer

    model = fresh_model("llama").requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(root / "model")
    f = featurizers.load(root / name)
    return featurizers.evaluate(f, model, TEXTS, tokenizer=tokenizer, context=128, progress=False, **more)


def values(result: Any) -> dict[str, Any]:
    return {name: metric["value"] for name, metric in result["metrics"].items()}


def test_every_format_gives_the_numbers_of_evaluate(folder: Path) -> None:
    known = pytest.approx(values(expected(folder).to_dict()), rel=1e-5)
    assert values(as_json("evaluate", folder / "a", *options(folder))) == known
    assert values(as_json("evaluate", folder / "a", *options(folder, "texts.jsonl"), "--key", "words")) == known
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"words": TEXTS}).to_parquet(folder / "texts.parquet")
    assert values(as_json("evaluate", folder / "a", *options(folder, "texts.parquet"), "--key", "words")) == known


def test_the_table_is_shown_and_the_result_written(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    wanted = ("--metrics", "sparsity", "--tokens", 50, "--context", 5, "--seed", 1, "--out", out)
    code, text, error = run("evaluate", folder / "a", *options(folder), *wanted)
    assert code == 0, error
    result = featurizers.load_evaluation(out / "evaluation.json")
    assert (result["l0"], result.about["tokens"], result.about["seed"]) == (4, 50, 1)
    assert result.about["data"] == str(folder / "texts.txt")
    assert "l0" in text
    assert "evaluation.json, densities.png" in text
    assert (out / "densities.png").read_bytes().startswith(b"\x89PNG")
    assert run("evaluate", folder / "a", *options(folder), *wanted)[0] == 1  # not over what is there


def test_a_sweep_and_a_comparison_are_one_table(folder: Path, tmp_path: Path) -> None:
    swept = as_json("evaluate", folder / "a", *options(folder), "--sweep", "k=1,2", "--metrics", "sparsity")
    assert [values(result)["l0"] for result in swept.values()] == [1, 2]
    assert list(swept) == ["k=1", "k=2"]
    out = tmp_path / "both"
    artefacts = (folder / "a", folder / "b")
    code, text, error = run("compare", *artefacts, *options(folder), "--ablations", "zero", "--out", out)
    assert code == 0, error
    assert "comparison.png" in text
    assert {path.name for path in out.iterdir()} == {
        "comparison.png",
        "evaluation-0.json",
        "evaluation-1.json",
        "table.csv",
    }
    for number, name in enumerate("ab"):
        again = featurizers.load_evaluation(out / f"evaluation-{number}.json")
        alone = expected(folder, name, ablations=["zero"])
        assert {n: m.value for n, m in again.metrics.items()} == pytest.approx(
            {n: m.value for n, m in alone.metrics.items()}, rel=1e-5
        )


def test_parquet_without_datasets_says_what_to_install(folder: Path, monkeypatch: Any) -> None:
    (folder / "it.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "datasets", None)
    code, _, error = run("evaluate", folder / "a", *options(folder, "it.parquet"))
    assert code == 1
    assert "pip install 'featurizers-evaluate[datasets]'" in error


@pytest.mark.parametrize(
    ("given", "words"),
    {
        "neither": ((), "give --data with documents, or --pairs"),
        "both": (("--data", "x", "--pairs", "y"), "give --data with documents, or --pairs"),
        "of documents": (("--pairs", "y", "--tokens", "5"), "--tokens is for documents"),
        "of pairs": (("--data", "texts.txt", "--cluster", "base"), "--cluster is for --pairs"),
        "two sites": (("--data", "texts.txt", "--site", "resid.post:0", "--site", "resid.post:1"), "--site once"),
        "a sweep": (("--data", "texts.txt", "--sweep", "k=a"), "--sweep is k=1,2,4"),
        "no file": (("--data", "none.txt"), "there is no file"),
        "no key": (("--data", "texts.jsonl"), "name the key with key=… or --key"),
        "a metric": (("--data", "texts.txt", "--metrics", "x"), "metrics are some of"),
    }.values(),
)
def test_what_cannot_be_done_is_one_line(folder: Path, monkeypatch: Any, given: Any, words: str) -> None:
    monkeypatch.chdir(folder)
    code, _, error = run("evaluate", "./a", "--model", "./model", "--device", "cpu", *given)
    assert code == 1
    assert words in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
