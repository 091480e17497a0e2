"""Table of a model's sites, made from its config alone: widths and heads are those of a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from featurizers import Anatomy, collect
from featurizers.errors import SiteError, UsageError
from featurizers.format.sites import BLOCK_KINDS, MODEL_KINDS, Site
from featurizers.models.loading import model_without_weights
from featurizers.models.site_table import SiteRow, sites_of
from torch import nn

from tests.support.command import as_json, run
from tests.support.decoders import decoder as fresh_model

IDS = torch.arange(5)[None]
NAMES = ["gpt2", "llama", "gpt_neox", "gemma2", "phi3", "opt", "cohere"]
NO_MIDDLE = ["gpt_neox", "opt"]


@pytest.mark.parametrize("name", NAMES)
def test_the_table_of_a_config_is_that_of_the_model_and_of_a_run(name: str, tmp_path: Path) -> None:
    model = fresh_model(name)
    model.config.save_pretrained(tmp_path)
    bare = model_without_weights(str(tmp_path))
    assert {p.device.type for p in bare.parameters()} == {"meta"}
    rows, missing = sites_of(bare)
    assert (rows, list(missing)) == (sites_of(model)[0], list(sites_of(model)[1]))
    assert {row.kind for row in rows} | set(missing) == {*BLOCK_KINDS, *MODEL_KINDS}
    for row in rows:
        site = Site(row.kind, row.layers[-1] if row.layers else None)
        if row.kind == "resid.mid" and name in NO_MIDDLE:  # the first run tells that blocks are parallel or post-norm
            continue
        with torch.no_grad():
            found = collect(model, {"input_ids": IDS}, [site])[site]
            assert row.width in (found.shape[-1], None)
            if row.heads is not None:
                last = Site(row.kind, row.layers[-1], row.heads - 1)
                assert row.width == row.heads * collect(model, {"input_ids": IDS}, [last])[last].shape[-1]
                with pytest.raises(SiteError):
                    Anatomy(model).place(Site(row.kind, row.layers[-1], row.heads))
    assert {row.kind: row.layers for row in rows}["resid.post"] == tuple(range(Anatomy(model).n_layers))
    for kind in missing:
        with pytest.raises(SiteError):
            Anatomy(model).place(Site(kind, 0 if kind in BLOCK_KINDS else None))


def test_layers_in_short() -> None:
    assert SiteRow("mlp.out", (0, 1, 2, 5, 7, 8), None, 4, "").ranges == "0-2,5,7-8"
    assert not SiteRow("embed", (), None, 4, "").ranges


def test_a_model_without_blocks_says_so() -> None:
    with pytest.raises(SiteError):
        sites_of(nn.Linear(2, 2))


def test_the_command_prints_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    fresh_model("llama").config.save_pretrained(tmp_path)
    for path in (tmp_path, tmp_path / "config.json"):
        code, out, error = run("sites", path)
        assert (code, error) == (0, "")
        assert "│ attn.k     │ 0-2    │ 2     │ 16    │" in out
        assert "Not in this model: mlp.router; --json says why." in out
    data = as_json("sites", tmp_path)
    assert [row["layers"] for row in data["sites"] if row["kind"] in ("mlp.out", "embed")] == [[0, 1, 2], []]
    assert list(data["missing"]) == ["mlp.router"]


CONFIGS = [None, "{}", '{"model_type": "nosuch"}', '{"model_type": "llama", "hidden_size": "x"}', "[1]"]


@pytest.mark.parametrize("content", CONFIGS)
def test_a_config_of_no_model_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UsageError, match="from its config: "):
        model_without_weights(str(tmp_path))
    code, out, error = run("sites", tmp_path)
    assert (code, out, len(error.splitlines())) == (1, "", 1)
    assert json.dumps(error).isascii()
