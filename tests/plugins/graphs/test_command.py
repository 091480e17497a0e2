"""The command ``featurizers graph``."""

import json
from pathlib import Path
from typing import Any

import featurizers
import pytest
import torch
from featurizers import models
from featurizers_graphs.graphing import graph

from tests.support.attribution_graphs import random_transcoders
from tests.support.command import as_json, run
from tests.support.models import fresh_model, save_language_model

PROMPT = "w5 w9 w3 w7 w11"
IDS = [5, 9, 3, 7, 11]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: Any) -> tuple[Path, Path]:
    """Write a model and a collection of transcoders, one a layer."""
    folder = tmp_path_factory.mktemp("graph")
    model = fresh_model("llama")
    save_language_model(model, folder / "model")
    layers, width = model.config.num_hidden_layers, model.config.hidden_size
    maps = random_transcoders(layers, width, 40)
    for layer, each in enumerate(maps):
        each.id = f"maps-{layer}"
    featurizers.save_collection({f"layer-{i}": each for i, each in enumerate(maps)}, folder / "maps")
    return folder / "model", folder / "maps"


def expected(folders: tuple[Path, Path], **options: Any) -> Any:
    maps = [featurizers.load(folders[1], subfolder=name) for name in featurizers.list_artefacts(folders[1])]
    model = fresh_model("llama").requires_grad_(False)
    return graph(model, IDS, maps, **options)  # type: ignore[arg-type]


def test_it_writes_the_graph_its_card_and_a_page(folders: tuple[Path, Path], tmp_path: Path) -> None:
    model, maps = folders
    out = tmp_path / "found"
    words = ("graph", model, "--maps", maps, "--prompt", PROMPT, "--out", out, "--device", "cpu", "--keep", 1)
    code, text, error = run(*words, "--top", 3)
    assert code == 0, error
    whole = expected(folders, keep=1.0)
    again = featurizers.load_graph(out)
    torch.testing.assert_close(again.influence, whole.influence)
    torch.testing.assert_close(again.weights, whole.weights)
    assert torch.equal(again.sources, whole.sources)
    assert again.token_texts == ("w5", "w9", "w3", "w7", "w11")
    assert again.check_complete() < 1e-3
    assert {path.name for path in out.iterdir()} == {"graph.safetensors", "README.md", "graph.html"}
    assert "</html>" in (out / "graph.html").read_text()
    for node in whole.prune().top(3):
        assert node.label in text
        assert f"{node.influence:.4f}" in text
    assert f"Whole graph: {whole.scores}" in text
    assert run(*words)[0] == 1  # not over what is there


def test_json_and_neuronpedia(folders: tuple[Path, Path], tmp_path: Path) -> None:
    model, maps = folders
    sources = [word for name in featurizers.list_artefacts(maps) for word in ("--maps", maps / name)]
    words = ("graph", model, *sources, "--prompt", PROMPT, "--device", "cpu", "--node-share", 0.6, "--edge-share", 0.9)
    more = ("--target", "w7", "--target", "w9", "--first", 2, "--nodes", 5, "--neuronpedia", "x", "--scan", "tiny")
    found = as_json(*words, *more, "--source-set", "set", "--out", tmp_path / "out", "--top", 4)
    whole = expected(folders, targets=[7, 9], first=2, nodes=5)
    pruned = whole.prune(0.6, 0.9)
    assert [target["token"] for target in found["targets"]] == [7, 9]
    assert found["whole"]["replacement"] == pytest.approx(list(whole.scores.replacement), abs=1e-5)
    assert found["pruned"]["nodes"] == len(pruned)
    assert [node["number"] for node in found["top"]] == [node.number for node in pruned.top(4)]
    assert found["about"]["first"] == 2
    assert [Path(path).name for path in found["written"]][-1] == "neuronpedia.json"
    data = json.loads((tmp_path / "out" / "neuronpedia.json").read_text())
    assert len(data["nodes"]) == len(pruned)
    assert data["metadata"]["feature_details"] == {"neuronpedia_source_set": "set"}


def test_a_page_that_would_be_too_large_does_not_lose_the_graph(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("featurizers_graphs.page.MAX_NODES", 3)
    words = ("graph", folders[0], "--maps", folders[1], "--prompt", PROMPT, "--device", "cpu", "--out", tmp_path / "x")
    code, text, error = run(*words)
    assert code == 0, error
    assert "Not written: a page shows at most 3 nodes" in text
    assert len(featurizers.load_graph(tmp_path / "x")) > 3


def test_wrong_options_are_refused_before_the_model_is_loaded(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, maps = folders
    words = ["graph", model, "--maps", maps, "--prompt", PROMPT, "--out", tmp_path / "x"]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "y").touch()
    with monkeypatch.context() as patched:
        patched.setattr(models, "load_model", lambda *a, **k: pytest.fail("the model was loaded"))
        for more, message in (
            (["--keep", 0], "--keep is a share"),
            (["--node-share", 1.5], "--node-share is a share"),
            (["--memory", "much"], "memory is a number of bytes"),
            (["--neuronpedia", "x"], "go together"),
            (["--source-set", "x"], "go together"),
            (["--neuronpedia", "a/b", "--scan", "x"], "--neuronpedia is letters"),
            (["--out", tmp_path / "full"], "choose a new or an empty folder"),
        ):
            code, _, error = run(*words, *more)
            assert code == 1
            assert message in error
    f = featurizers.create("subspace", d_in=8, n_features=2).save_pretrained(tmp_path / "f")
    code, _, error = run("graph", model, "--maps", f, "--prompt", PROMPT, "--out", tmp_path / "x", "--device", "cpu")
    assert code == 1
    assert "no map between sites" in error
    assert not (tmp_path / "x").exists()


def test_a_prompt_on_which_no_feature_is_active_says_so(folders: tuple[Path, Path], tmp_path: Path) -> None:
    (silent,) = random_transcoders(1, fresh_model("llama").config.hidden_size, 8, bias=1e6)
    silent.save_pretrained(tmp_path / "silent")
    words = ("graph", folders[0], "--maps", tmp_path / "silent", "--prompt", PROMPT, "--out", tmp_path / "found")
    code, text, error = run(*words, "--device", "cpu")
    assert code == 0, error
    assert "No feature is left: none is active on this prompt" in text
