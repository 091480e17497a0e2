"""The command ``featurizers patch``."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import featurizers
import pytest
import torch
from featurizers_patching import patch

from tests.support.command import as_json, run
from tests.support.models import fresh_model, save_language_model

BASE, SOURCE = [5, 9, 3, 7, 11, 2], [5, 9, 14, 3, 9, 7]
TEXTS = ("--base", " ".join(f"w{i}" for i in BASE), "--source", " ".join(f"w{i}" for i in SOURCE))
METRIC = ("--answer", "w7", "--counter", "w9", "--device", "cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    return Path(save_language_model(fresh_model("llama"), tmp_path_factory.mktemp("model")))


def expected(**options: Any) -> Any:
    model = fresh_model("llama").requires_grad_(False)
    return patch(model, BASE, SOURCE, metric=("logit_difference", 7, 9), **options)


def test_it_shows_the_largest_cells_and_writes_the_grid(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "found"
    options = (*TEXTS, *METRIC, "--sites", "resid.pre,attn.z:1:*", "--top", 3, "--out", out)
    code, text, error = run("patch", folder, *options)
    assert code == 0, error
    grid = expected(sites=["resid.pre", "attn.z:1:*"])
    best = grid.top(1)[0]
    assert str(best.site) in text
    assert f"{best.value:+.3f}" in text
    assert "4 cells were compared with whole runs" in text
    again = featurizers.load_grid(out / "grid.safetensors")
    torch.testing.assert_close(again.values, grid.values)
    assert again.labels == tuple(f"w{i}" for i in BASE)
    with (out / "table.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 7 * 6
    assert (out / "heatmap.png").read_bytes().startswith(b"\x89PNG")
    assert run("patch", folder, *TEXTS, *METRIC, "--out", out)[0] == 1  # not over what is there


def test_pairs_come_from_a_file_with_names(folder: Path, tmp_path: Path) -> None:
    first = {"base": TEXTS[1], "source": TEXTS[3], "label": " w7", "base_label": " w9"}
    second = {"base": "w1 w4", "source": "w2 w8", "label": " w3", "base_label": " w9"}
    records: list[dict[str, Any]] = [
        {**first, "base_position": {"subject": [2, 3]}},
        {**second, "base_position": {"subject": [0, 1]}},
    ]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    options = ("--positions", "subject,-1", "--sites", "resid.post", "--device", "cpu")
    found = as_json("patch", folder, "--pairs", file, *options)
    values = {(cell["site"], cell["position"]): cell["value"] for cell in found["cells"]}
    model = fresh_model("llama").requires_grad_(False)
    texts = ("base", "source", "label", "base_label")
    pairs = [{**each, **{key: [int(w[1:]) for w in each[key].split()] for key in texts}} for each in records]
    grid = patch(model, pairs, sites="resid.post", positions=["subject", -1])
    for s, site in enumerate(grid.sites):
        for p, position in enumerate(grid.positions):
            assert values[str(site), position] == pytest.approx(float(grid.mean()[0, s, p]), abs=1e-5)


def test_a_featurizer_is_loaded(folder: Path, tmp_path: Path) -> None:
    f = featurizers.create("subspace", d_in=32, n_features=8, seed=0)
    saved = f.save_pretrained(tmp_path / "f")
    found = as_json(
        "patch", folder, *TEXTS, *METRIC, "--sites", "resid.post:1", "--featurizer", saved, "--indices", "0,3", "--raw"
    )
    grid = expected(sites="resid.post:1", featurizer=f, indices=[0, 3], normalize=False)
    best = grid.top(1)[0]
    assert found["cells"][0]["value"] == pytest.approx(best.value, abs=1e-4)
    assert found["base"][0] == pytest.approx(grid.base[0].tolist(), abs=1e-4)


def test_cells_are_screened(folder: Path) -> None:
    code, text, error = run("patch", folder, *TEXTS, *METRIC, "--screen", 2, "--top", 18)
    assert code == 0, error
    grid = expected(screen=2)
    for cell in grid.top(18):
        assert f"{'' if cell.exact else '~'}{cell.value:+.3f}" in text
    assert "2 of 18 cells were run, where the estimates are off by" in " ".join(text.split())
    found = as_json("patch", folder, *TEXTS, *METRIC, "--method", "integrated", "--steps", 2)
    best = expected(method="integrated", steps=2).top(1)[0]
    assert found["cells"][0]["value"] == pytest.approx(best.value, abs=1e-4)
    assert not any(cell["exact"] for cell in found["cells"])


def test_heads_and_answers_of_several_tokens(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "heads"
    options = ("--heads", "all", "--positions", "all", "--metric", "log-probability", "--answer", "w7 w3", "--raw")
    found = as_json("patch", folder, *TEXTS, *options, "--device", "cpu", "--out", out)
    model = fresh_model("llama").requires_grad_(False)
    options_here: dict[str, Any] = {"metric": ("log_probability", [[7, 3]]), "normalize": False}
    grid = patch(model, BASE, SOURCE, heads="all", positions=["all"], **options_here)
    assert found["cells"][0]["value"] == pytest.approx(grid.top(1)[0].value, abs=1e-4)
    assert found["base"][0] == pytest.approx(grid.base[0].tolist(), abs=1e-4)
    assert (out / "heatmap.png").exists()


def test_paths_are_patched(folder: Path) -> None:
    options = ("--sites", "attn.z:0:*", "--receivers", "attn.q:1:2,attn.v:2", "--raw")
    found = as_json("patch", folder, *TEXTS, *METRIC, *options)
    grid = expected(sites="attn.z:0:*", receivers=["attn.q:1:2", "attn.v:2"], normalize=False)
    assert found["about"]["receivers"] == ["attn.q:1:2", "attn.v:2"]
    assert found["cells"][0]["value"] == pytest.approx(grid.top(1)[0].value, abs=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "give --base and --source, or --pairs"),
        (("--base", "w1"), "give --base and --source"),
        ((*TEXTS, "--counter", "w9"), "--counter goes with --answer"),
        (
            (*TEXTS, "--metric", "kl", "--answer", "w7", "--counter", "w9"),
            "--counter is for the metric",
        ),
        ((*TEXTS, *METRIC, "--indices", "a"), "--indices takes numbers"),
        (("--pairs", "nothing.jsonl", "--device", "cpu"), "cannot read pairs"),
    ],
)
def test_wrong_options_are_refused(folder: Path, options: tuple[str, ...], message: str) -> None:
    code, _, error = run("patch", folder, *options)
    assert code == 1
    assert message in error
