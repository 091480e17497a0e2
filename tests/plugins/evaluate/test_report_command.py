"""The command ``featurizers report``."""

from __future__ import annotations

import json
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
    """Return a folder with a model, an artefact that fits it, one that does not, and documents."""
    root = Path(tmp_path_factory.mktemp("it"))
    save_language_model(fresh_model("llama"), root / "model")
    for name, width in (("a", 32), ("narrow", 8)):
        f = dictionary("topk", d_in=width, k=4)
        f.id, f.site = name, "resid.post:1"
        f.save_pretrained(root / name)
    (root / "texts.jsonl").write_text("".join(json.dumps({"words": text}) + "\n" for text in TEXTS))
    (root / "empty.txt").write_text("\n")
    (root / "other.jsonl").write_text('{"else": "w1"}\n')
    featurizers.create("subspace", d_in=32, n_features=2).save_pretrained(root / "nowhere")
    return root


def words(root: Path, out: Any, *more: Any, source: str = "a", data: str = "texts.jsonl") -> tuple[Any, ...]:
    given = ("--model", root / "model", "--data", root / data, "--key", "words", "--device", "cpu", "--out", out)
    return ("report", root / source, *given, *more)


def test_the_page_is_that_of_report(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    out = tmp_path / "report.html"
    options = ("--tokens", 150, "--effect-tokens", 40, "--contexts", 3, "--mask-first", 1)
    code, text, error = run(*words(folder, out, *options))
    assert code == 0, error
    assert "64 features, " in text
    assert "on 133 tokens" in text
    assert f"Written: {out}\n" in text
    found = featurizers.report(
        featurizers.load(folder / "a"),
        fresh_model("llama").requires_grad_(False),
        TEXTS,
        tokenizer=AutoTokenizer.from_pretrained(folder / "model"),
        max_tokens=150,
        effect_tokens=40,
        contexts=3,
        mask_first=1,
        context=128,
        data=str(folder / "texts.jsonl"),
        progress=False,
    )
    found.about["model"] = str(folder / "model")  # type: ignore[index]
    assert found.save(tmp_path / "again.html").read_bytes() == out.read_bytes()
    assert found[0].high[0].tokens[0].startswith("w")


def test_json_has_the_metrics_and_the_path(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    found = as_json(*words(folder, out, "--effect-tokens", 40))
    assert found["metrics"]["l0"]["value"] == 4
    assert found["metrics"]["kl"]["value"] > 0
    assert (found["features"], found["written"]) == (64, str(out))
    assert out.exists()


def test_what_cannot_be_done_is_one_line_before_the_model_is_loaded(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from featurizers_evaluate.command import options

    there = tmp_path / "there.html"
    there.write_text("before")
    locked = tmp_path / "locked"
    locked.mkdir()
    monkeypatch.setattr(options, "loaded", lambda *_: pytest.fail("the model was loaded"))
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != locked)
    cases = {
        there: "it is there already; choose a new file",
        tmp_path / "none" / "it.html": "its folder does not exist",
        there / "it.html": "its folder does not exist",
        locked / "it.html": "this user may not write",
        tmp_path / "it.txt": "--out is a file that ends in .html",
    }
    for out, expected in cases.items():
        code, _, error = run(*words(folder, out))
        assert (code, error.count("\n")) == (1, 1)
        assert expected in error, error
    code, _, error = run("report", folder / "a", "--model", folder / "model", "--out", tmp_path / "it.html")
    assert (code, error.startswith("error: give --model and --data with documents, or --harvest")) == (1, True)
    for given, expected in (
        ({"data": "none.txt"}, "there is no file"),
        ({"data": "empty.txt"}, "there are no documents in"),
        ({"data": "other.jsonl"}, "name the key with key=… or --key"),
        ({"source": "none"}, "none"),
        ({"source": "nowhere"}, "name the site with --site"),
    ):
        code, _, error = run(*words(folder, tmp_path / "it.html", **given))
        assert (code, error.count("\n")) == (1, 1)
        assert expected in error
    assert there.read_text() == "before"


def test_an_artefact_that_does_not_fit_the_model_is_one_line_and_no_file(folder: Path, tmp_path: Path) -> None:
    for source, site in (("narrow", "resid.post:1"), ("a", "resid.post:7")):
        out = tmp_path / "report.html"
        code, _, error = run(*words(folder, out, "--site", site, source=source))
        assert (code, error.count("\n")) == (1, 1)
        assert "width" in error or "resid.post:7" in error
        assert not out.exists()
