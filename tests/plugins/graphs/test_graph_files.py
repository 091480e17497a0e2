"""Graphs on disk and on the Hub: nothing is lost, and what is damaged is refused by name."""

import json
import re
import subprocess
import sys
from contextlib import suppress
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import featurizers
import pytest
import torch
from featurizers.errors import ArtefactError, FeaturizerError, HubNotFoundError, ManifestError, SourceError, UsageError
from featurizers_graphs import loading
from featurizers_graphs.graph_files import FORMAT, VERSION
from featurizers_graphs.loading import load_graph
from featurizers_graphs.result import Graph
from safetensors import safe_open
from safetensors.torch import save_file

from tests.support.graphs import random_graph
from tests.support.hub import LoopbackHub, connect, subspace

TEXTS = ("<bos>", " 東京", "\n", "| <!-- featurizers: end --> [x](y)")


def named_graph() -> Graph:
    graph = random_graph(texts=TEXTS, seed=3)
    layer, _, number = graph.features[5].tolist()
    return graph.label({(layer, number): "capitals | of <b>countries</b>", (0, 99): ""}).group("Say 東京", [0, 4, 20])


def assert_equal(a: Graph, b: Graph) -> None:
    for part in fields(Graph):
        x, y = getattr(a, part.name), getattr(b, part.name)
        assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y, part.name
        assert not isinstance(x, torch.Tensor) or x.dtype == y.dtype


def test_a_graph_is_saved_and_loaded_as_it_was(tmp_path: Path) -> None:
    graph = named_graph()
    assert graph.save(tmp_path / "whole") == tmp_path / "whole"
    assert_equal(load_graph(tmp_path / "whole"), graph)
    pruned = graph.prune(0.7, 0.9)
    pruned.save(tmp_path / "deep" / "pruned")
    again = load_graph(tmp_path, subfolder="deep/pruned")
    assert_equal(again, pruned)
    assert again.about["pruning"] == {"nodes": 0.7, "edges": 0.9}
    assert again.kept_scores == pruned.kept_scores
    assert_equal(featurizers.load_graph(tmp_path / "whole" / "graph.safetensors"), graph)


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox", "gemma3"])
@pytest.mark.parametrize("first", [0, 2])
def test_a_traced_graph_is_possible(architecture: str, first: int, tmp_path: Path) -> None:
    """What loading checks holds of every graph that is made, also of blocks whose halves run side by side."""
    from featurizers_graphs.graphing import graph as trace

    from tests.support.attribution_graphs import random_transcoders
    from tests.support.models import fresh_model

    model = fresh_model(architecture).requires_grad_(False)
    maps = random_transcoders(model.config.num_hidden_layers, model.config.hidden_size, 30)
    for targets in (None, [(1, 4, 7), (0, 2, 3)], lambda logits: logits[-1, 3] - logits[2, 4]):
        graph = trace(model, [5, 9, 3, 7, 11], maps, targets=targets, first=first, nodes=40)
        graph.save(tmp_path)
        assert_equal(load_graph(tmp_path), graph)
        graph.prune().save(tmp_path)
        assert load_graph(tmp_path).n_edges == graph.prune().n_edges


def test_the_header_can_be_read_without_the_library(tmp_path: Path) -> None:
    named_graph().save(tmp_path)
    with safe_open(tmp_path / "graph.safetensors", "pt") as file:
        about = json.loads(file.metadata()["featurizers"])
    assert (about["format"], about["version"]) == (FORMAT, VERSION)
    assert about["about"]["model"] == "owner/model"
    assert about["groups"] == {"Say 東京": [0, 4, 20]}
    assert about["saved_with"]["torch"] == version("torch")


def test_a_graph_with_many_labels_of_a_long_prompt_is_saved(tmp_path: Path) -> None:
    """The JSON of a header may have a megabyte; texts are beside it."""
    graph = random_graph(texts=[" token"] * 3, per_cell=1)
    graph = graph.label({(0, i): f"a label of some length, number {i}" for i in range(40_000)})
    graph.save(tmp_path)
    assert load_graph(tmp_path).labels == graph.labels


def test_a_second_save_keeps_other_files_and_the_words_of_people(tmp_path: Path) -> None:
    named_graph().save(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    card = tmp_path / "README.md"
    card.write_text(card.read_text() + "\nOur study.\n")
    other = random_graph(seed=8)
    other.save(tmp_path)
    assert_equal(load_graph(tmp_path), other)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert card.read_text().endswith("\nOur study.\n")
    assert card.read_text().count("# Attribution graph") == 1
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "x").touch()
    with pytest.raises(ArtefactError, match="choose a new or an empty folder"):
        other.save(tmp_path / "else")


def test_the_card(tmp_path: Path) -> None:
    import yaml

    graph = named_graph()
    graph.save(tmp_path)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    head = yaml.safe_load(text.split("---\n")[1])
    assert head["library_name"] == "featurizers"
    assert head["base_model"] == "owner/model"
    assert "attribution-graph" in head["tags"]
    assert text.count("<!-- featurizers: end -->") == 1
    assert "<b>" not in text
    assert f"| replacement score | {graph.scores.replacement} |" in text
    assert "pruning" not in text
    graph.prune().save(tmp_path)
    pruned = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert f"| scores of what pruning left | {graph.prune().kept_scores} |" in pruned
    assert f'featurizers.load_graph("./{tmp_path.name}")' in text
    best = graph.top(1)[0]
    assert f"{best.influence:.4f}" in text
    outside = random_graph(about={"model": "./my folder"})
    outside.save(tmp_path / "other")
    assert "base_model" not in (tmp_path / "other" / "README.md").read_text()


# ---------------------------------------------------------------------- damage


def damaged(folder: Path, change: Any, **about: Any) -> Path:
    """Write the file of a graph with changed tensors and JSON."""
    graph = random_graph()
    graph = graph.group("A", [0, 1]).label({(0, 1): "x"})
    graph.save(folder)
    path = folder / "graph.safetensors"
    with safe_open(path, "pt") as file:
        record = json.loads(file.metadata()["featurizers"])
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    change(tensors)
    record.update(about)
    save_file(tensors, path, {"featurizers": json.dumps(record)})
    return folder


def put(name: str, at: Any, value: Any) -> Any:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name][at] = value

    return change


def cut(name: str) -> Any:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = tensors[name][:-1].clone()

    return change


def cast(name: str, dtype: torch.dtype) -> Any:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = tensors[name].to(dtype)

    return change


def without(name: str) -> Any:
    return lambda tensors: tensors.pop(name)


def extra(tensors: dict[str, torch.Tensor]) -> None:
    tensors["more"] = torch.zeros(1)


NODES = 18 + 9 + 3 + 2
TARGETS = 2
DAMAGES: dict[str, tuple[Any, str]] = {
    "a source that is a target": (put("sources", 0, NODES - TARGETS), "sources has nodes"),
    "a source beyond the nodes": (put("sources", 0, NODES + 5), "sources has nodes"),
    "a negative source": (put("sources", 3, -1), "sources has nodes"),
    "offsets that fall": (put("offsets", 2, 99), "offsets do not rise"),
    "offsets that do not begin at 0": (put("offsets", 0, 1), "offsets do not rise"),
    "offsets that end early": (put("offsets", -1, 3), "offsets do not rise"),
    "an edge back": (put("sources", 0, 17), "later layer"),
    "influence NaN": (put("influence", 4, torch.nan), "influence has NaN"),
    "weights infinite": (put("weights", 4, torch.inf), "weights has NaN or infinity"),
    "total infinite": (put("total", 0, -torch.inf), "total has NaN or infinity"),
    "negative influence": (put("influence", 4, -0.5), "influence has a negative"),
    "a layer too high": (put("features", (17, 0), 3), "features have a layer"),
    "a position too high": (put("features", (17, 1), 3), "features have a layer"),
    "a negative feature": (put("features", (0, 2), -1), "features have a layer"),
    "features out of order": (put("features", (0, 0), 2), "not sorted"),
    "a feature twice": (put("features", 1, torch.tensor([0, 0, 19])), "not sorted"),
    "a left-out node with edges": (put("kept", 0, False), "kept leaves out"),
    "sizes of values": (cut("values"), r"values is float32 \[17\], and float32 \[18\] fits"),
    "sizes of influence": (cut("influence"), "influence is"),
    "sizes of offsets": (cut("offsets"), "offsets is"),
    "sizes of weights": (cut("weights"), "weights is"),
    "sizes of tokens": (cut("tokens"), "tokens is"),
    "dtype of sources": (cast("sources", torch.int64), "sources is int64"),
    "dtype of weights": (cast("weights", torch.float64), "weights is float64"),
    "a tensor is missing": (without("kept"), "it lacks kept"),
    "a tensor is unknown": (extra, "'more', which graphs do not have"),
    "labels without features": (cut("label_features"), "label_features"),
    "texts without ends": (without("token_texts_ends"), "token_texts are no texts"),
    "ends that fall": (put("token_texts_ends", 0, 99), "token_texts are no texts"),
    "ends before the end": (put("token_texts_ends", -1, 6), "token_texts are no texts"),
    "texts that are not UTF-8": (put("token_texts", 0, 255), "not UTF-8"),
    "negative tokens": (put("tokens", 0, -1), "tokens are empty or negative"),
}

TARGET = {"kind": "logit", "label": "x", "weight": 0.5, "position": 2, "token": 3, "layer": None, "feature": None}
RECORDS: dict[str, tuple[dict[str, Any], str]] = {
    "another format": ({"format": "x\x1b[31m"}, r"format is 'x\\x1b\[31m'"),
    "no format": ({"format": None}, "format is None"),
    "a list as format": ({"format": [1]}, "format is"),
    "a newer version": ({"version": VERSION + 1}, "pip install -U"),
    "a version that is true": ({"version": True}, "version True"),
    "groups beyond the nodes": ({"groups": {"A": [NODES]}}, "groups have nodes"),
    "groups with negative nodes": ({"groups": {"A": [-1]}}, "greater than or equal to 0"),
    "groups that overlap": ({"groups": {"A": [1], "B": [1]}}, "groups have a node twice"),
    "no layers": ({"n_layers": 0}, "n_layers"),
    "enormous layers": ({"n_layers": 10**30}, "n_layers"),
    "more layers": ({"n_layers": 4}, "influence is"),
    "no targets": ({"targets": []}, "targets"),
    "a target beyond the prompt": ({"targets": [TARGET, {**TARGET, "position": 3}]}, "a target is at a token"),
    "a target beyond the layers": ({"targets": [TARGET, {**TARGET, "layer": 3}]}, "a target is at a token"),
    "weights above 1": ({"targets": [{**TARGET, "weight": 0.9}] * 2}, "add up to more than 1"),
    "a target of another kind": ({"targets": [{**TARGET, "kind": "x"}] * 2}, "kind"),
    "another field": ({"more": 1}, "more"),
    "about that is no object": ({"about": [1]}, "about"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_tensors_are_refused(damage: str, tmp_path: Path) -> None:
    change, message = DAMAGES[damage]
    with pytest.raises(ArtefactError, match=message) as caught:
        load_graph(damaged(tmp_path, change))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("damage", RECORDS)
def test_damaged_headers_are_refused(damage: str, tmp_path: Path) -> None:
    about, message = RECORDS[damage]
    with pytest.raises(ArtefactError, match=message) as caught:
        load_graph(damaged(tmp_path, lambda tensors: None, **about))
    assert str(caught.value).isprintable()


def test_an_unchanged_copy_is_read(tmp_path: Path) -> None:
    assert len(load_graph(damaged(tmp_path, lambda tensors: None))) == NODES


def test_random_bytes_are_never_another_error(tmp_path: Path) -> None:
    named_graph().save(tmp_path)
    path = tmp_path / "graph.safetensors"
    whole, random = path.read_bytes(), torch.Generator().manual_seed(0)
    for at in torch.randint(0, len(whole), (60,), generator=random).tolist():
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x41]) + whole[at + 1 :])
        with suppress(FeaturizerError):  # many a number may be another one
            load_graph(tmp_path)
    for length in torch.randint(0, len(whole), (20,), generator=random).tolist():
        path.write_bytes(whole[:length])
        with pytest.raises(ArtefactError):
            load_graph(tmp_path)


def test_sources_that_are_no_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArtefactError, match="no such folder"):
        load_graph("./missing")
    with pytest.raises(ArtefactError, match=r"it has no graph\.safetensors"):
        load_graph(tmp_path)
    with pytest.raises(SourceError, match="catalogue"):
        load_graph("sae-lens:x/y")
    outside = tmp_path / "outside"
    random_graph().save(outside)
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "graph.safetensors").symlink_to(outside / "graph.safetensors")
    with pytest.raises(ArtefactError, match="link out of this folder"):
        load_graph("./links")
    with pytest.raises(ArtefactError, match="no valid Unicode"):
        random_graph(texts=("a", "\ud800", "c")).save(tmp_path / "surrogate")
    assert not (tmp_path / "surrogate").exists()


def test_a_graph_that_is_replaced_meanwhile_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (random_graph(seed=seed, about={"seed": seed}) for seed in (0, 1))
    first.save(tmp_path)
    real, calls = loading.read_state, []

    def read(path: Path, **options: Any) -> Any:
        """Read the tensors of the first graph with the header of the second, as if it had come between."""
        tensors, about = real(path, **options)
        if not calls:
            second.save(tmp_path)
            about = real(path, **options)[1]
        calls.append(path)
        return tensors, about

    monkeypatch.setattr(loading, "read_state", read)
    assert_equal(load_graph(tmp_path), second)
    assert len(calls) == 2


# ---------------------------------------------------------------------- the Hub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    hub = LoopbackHub(tmp_path / "server")
    connect(monkeypatch, hub.url, tmp_path / "home")
    yield hub
    hub.stop()


def test_a_push_is_one_commit_and_is_loaded_by_id(hub: LoopbackHub) -> None:
    first, second = named_graph(), random_graph(seed=5)
    commit = first.push("alice/x").oid
    assert set(hub.files("alice/x")) == {"graph.safetensors", "README.md"}
    assert hub.titles("alice/x") == ["Upload attribution graph with featurizers"]
    assert 'load_graph("alice/x")' in hub.files("alice/x")["README.md"].decode()
    assert_equal(load_graph("alice/x"), first)
    second.push("alice/x", subfolder="deep/two", commit_message="Another", private=None)
    assert hub.titles("alice/x")[-1] == "Another"
    assert 'load_graph("alice/x", subfolder="deep/two")' in hub.files("alice/x")["deep/two/README.md"].decode()
    assert_equal(load_graph("alice/x", subfolder="deep/two"), second)
    second.push("alice/x")
    assert_equal(load_graph("alice/x"), second)
    assert_equal(load_graph(f"alice/x@{commit}"), first)
    assert_equal(load_graph("alice/x", revision=commit), first)
    with pytest.raises(HubNotFoundError):
        load_graph("alice/x", subfolder="deep")


def test_a_push_keeps_the_words_of_people_and_other_files(hub: LoopbackHub) -> None:
    random_graph().push("alice/x")
    card = hub.files("alice/x")["README.md"]
    hub.put("alice/x", README_md=card + b"\nOur study.\n", notes_txt=b"mine")
    random_graph(seed=4).push("alice/x")
    assert hub.files("alice/x")["README.md"].endswith(b"\nOur study.\n")
    assert hub.files("alice/x")["notes.txt"] == b"mine"


def test_a_push_does_not_take_the_place_of_a_featurizer(hub: LoopbackHub) -> None:
    subspace().push_to_hub("alice/x")
    before = hub.head("alice/x")
    with pytest.raises(ManifestError, match=r"config\.json is there"):
        random_graph().push("alice/x")
    with pytest.raises(ManifestError, match="subfolder"):
        random_graph().push("alice/x", subfolder="../up")
    with pytest.raises(UsageError, match="pull request"):
        random_graph().push("alice/x", branch="next", create_pr=True)
    assert hub.head("alice/x") == before
    random_graph().push("alice/x", subfolder="graph")
    assert load_graph("alice/x", subfolder="graph").n_layers == 3


# ---------------------------------------------------------------------- circuit-tracer


def dense(graph: Graph) -> torch.Tensor:
    """Return the edges as circuit-tracer keeps them: rows are targets, and every node has a row."""
    matrix = torch.zeros(graph.n_nodes, graph.n_nodes)
    matrix[graph.edge_targets, graph.sources.long()] = graph.weights
    return matrix


def saved_by_circuit_tracer(graph: Graph, path: Path, left_out: int = 1) -> None:
    """Write what its ``Graph.to_pt`` writes, with features in another order, and some that were not selected."""
    order = torch.randperm(graph.n_features, generator=torch.Generator().manual_seed(1))
    nodes = torch.cat([order, torch.arange(graph.n_features, graph.n_nodes)])
    active = torch.cat([graph.features.flip(0), torch.tensor([[0, 0, 9999]] * left_out).reshape(-1, 3)])
    content = {
        "input_string": "".join(graph.token_texts),
        "input_tokens": graph.tokens,
        "adjacency_matrix": dense(graph)[nodes][:, nodes],
        "cfg": SimpleNamespace(n_layers=graph.n_layers),
        "active_features": active,
        "activation_values": torch.cat([graph.values.flip(0), torch.zeros(left_out)]),
        "selected_features": graph.n_features - 1 - order,
        "logit_targets": [SimpleNamespace(token_str=t.label, vocab_idx=t.token) for t in graph.targets],
        "logit_probabilities": torch.tensor([t.weight for t in graph.targets]),
        "vocab_size": 64,
        "scan": "owner/model",
    }
    torch.save(content, path)


def script() -> str:
    page = (Path(__file__).parents[3] / "docs" / "graphs.md").read_text(encoding="utf-8")
    return next(b for b in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "weights_only=False" in b)


@pytest.mark.parametrize("left_out", [0, 1])
def test_a_graph_of_circuit_tracer_is_converted_by_the_script_and_read(left_out: int, tmp_path: Path) -> None:
    from tests.support.models import fresh_model, save_language_model

    model = save_language_model(fresh_model("llama"), tmp_path / "model")
    graph = random_graph(texts=("w5", "w6", "w7"), seed=2)
    saved_by_circuit_tracer(graph, tmp_path / "x.pt", left_out)
    (tmp_path / "convert.py").write_text(script())
    words = [sys.executable, "convert.py", "x.pt", "x.safetensors", str(model)]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = load_graph(tmp_path / "x.safetensors")
    for name in ("tokens", "token_texts", "features", "values", "n_layers", "targets", "offsets", "sources", "weights"):
        x, y = getattr(found, name), getattr(graph, name)
        assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y, name
    torch.testing.assert_close(found.influence, graph.influence)
    torch.testing.assert_close(found.error_share, graph.error_share)
    for a, b in zip(found.scores, graph.scores, strict=True):
        assert a == pytest.approx(b)
    assert found.about["model"] == str(model)
    with pytest.raises(UsageError, match="no totals"):
        found.check_complete()
    found.prune().save(tmp_path / "again")
    torch.testing.assert_close(load_graph(tmp_path / "again").influence, found.influence)


@pytest.mark.parametrize("name", ["gpt2-own", "llama-clt-in", "llama-skip"])
def test_a_converted_graph_has_circuit_tracers_influence_scores_and_pruning(name: str, tmp_path: Path) -> None:
    """The golden graphs are those that circuit-tracer itself made."""
    from tests.support.attribution_graphs import golden

    given = golden(name)
    expected, count = given.tensors, len(given.tensors["tokens"])
    edges = expected["adjacency"].to_sparse().coalesce()
    tensors = {
        "features": expected["features"],
        "values": expected["values"],
        "ends": edges.indices().contiguous(),
        "weights": edges.values(),
        "tokens": expected["tokens"],
        "probabilities": expected["probabilities"],
    }
    about = {
        "n_layers": given.model.config.num_hidden_layers,
        "token_texts": [str(token) for token in expected["tokens"].tolist()],
        "targets": [[str(token), token] for token in expected["logits"].tolist()],
        "model": None,
    }
    text = json.dumps({"format": "circuit-tracer.graph", "version": 1, **about})
    save_file(tensors, tmp_path / "x.safetensors", {"featurizers": text})
    graph = load_graph(tmp_path / "x.safetensors")
    assert len(graph.tokens) == count
    assert torch.equal(dense(graph), expected["adjacency"])
    torch.testing.assert_close(graph.influence, expected["influence"], rtol=1e-5, atol=1e-7)
    scores = [graph.scores.replacement.low, graph.scores.completeness.low]
    assert scores == pytest.approx(expected["scores"].tolist(), rel=1e-5)
    for number, (nodes, edge_share) in enumerate(given.thresholds):
        pruned = graph.prune(nodes, edge_share)
        assert torch.equal(pruned.kept, expected[f"nodes.{number}"])
        assert torch.equal(dense(pruned) != 0, expected[f"edges.{number}"])


def test_a_pickle_is_never_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved_by_circuit_tracer(random_graph(), tmp_path / "x.pt")
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("it was opened"))
    for source in (tmp_path / "x.pt", "./x.PT", "x.pt"):
        with pytest.raises(ArtefactError, match=r"run any code.*docs/graphs\.md") as caught:
            load_graph(source)
        assert len(str(caught.value)) < 600


def converted(tmp_path: Path, change: Any = lambda tensors: None, **about: Any) -> Path:
    graph = random_graph()
    tensors = {
        "features": graph.features.clone(),
        "values": graph.values,
        "ends": torch.stack([graph.edge_targets, graph.sources.long()]),
        "weights": graph.weights,
        "tokens": graph.tokens,
        "probabilities": torch.tensor([t.weight for t in graph.targets]),
    }
    change(tensors)
    record = {"n_layers": 3, "token_texts": ["a", "b", "c"], "targets": [["x", 1], ["y", None]], "model": None}
    text = json.dumps({"format": "circuit-tracer.graph", "version": 1, **record, **about})
    save_file({name: x.contiguous() for name, x in tensors.items()}, tmp_path / "x.safetensors", {"featurizers": text})
    return tmp_path / "x.safetensors"


CONVERTED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "another version": (None, {"version": 2}, "version 2"),
    "a node that is not there": (put("ends", (0, 0), 99), {}, "ends has nodes"),
    "a row of an error": (put("ends", (0, 0), 20), {}, "read nothing"),
    "a cycle": (put("ends", (slice(None), 0), 0), {}, "later layer"),
    "a layer too high": (put("features", (3, 0), 7), {}, "features have a layer"),
    "a feature twice": (put("features", 1, torch.tensor([0, 0, 19])), {}, "there twice"),
    "NaN weights": (put("weights", 0, torch.nan), {}, "weights has NaN"),
    "probabilities": (put("probabilities", 0, torch.nan), {}, "between 0 and 1"),
    "sizes": (cut("values"), {}, "values has shape"),
    "a tensor is missing": (without("values"), {}, "has the tensors"),
    "fewer texts": (None, {"token_texts": ["a"]}, "not as many"),
    "more nodes than fit": (
        lambda tensors: tensors.update(tokens=torch.zeros(1000, dtype=torch.int64)),
        {"n_layers": 100_000, "token_texts": ["a"] * 1000},
        "100001020 nodes, more than",
    ),
    "too many layers": (None, {"n_layers": 10**8}, "n_layers"),
}


@pytest.mark.parametrize("damage", CONVERTED)
def test_damaged_conversions_are_refused(damage: str, tmp_path: Path) -> None:
    change, about, message = CONVERTED[damage]
    with pytest.raises(ArtefactError, match=message):
        load_graph(converted(tmp_path, change or (lambda tensors: None), **about))


def test_a_conversion_without_names_is_read(tmp_path: Path) -> None:
    graph = load_graph(converted(tmp_path))
    assert [t.kind for t in graph.targets] == ["logit", "metric"]
    assert graph.about["model"] is None
