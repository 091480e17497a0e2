"""Graphs as Neuronpedia's JSON, and their upload to a server on this machine."""

import json
import math
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from featurizers.errors import ArtefactError, UsageError
from featurizers_graphs import neuronpedia, uploading
from featurizers_graphs.result import Graph, Target
from featurizers_graphs.uploading import upload

from tests.support.graphs import random_graph

SCHEMA = json.loads((Path(__file__).parent / "neuronpedia_schema.json").read_text())
KEY = "sk-np-secret"


def exported(graph: Graph, **options: Any) -> dict[str, Any]:
    found = json.loads(json.dumps(graph.to_neuronpedia("a-b.c_1", "gemma-2-2b", **options), allow_nan=False))
    jsonschema.Draft7Validator(SCHEMA).validate(found)
    return dict(found)


def test_a_graph_passes_the_schema_and_keeps_its_nodes_and_edges() -> None:
    graph = random_graph(texts=("a", "a", " 東京"), seed=1).prune(0.9, 0.95)
    found = exported(graph, source_set="x", description="y", creator="z")
    assert len(found["nodes"]) == len(graph)
    by_id = {node["node_id"]: node for node in found["nodes"]}
    assert len(by_id) == len(graph), "ids are not unique"
    ids = [node["node_id"] for node in found["nodes"]]
    at = dict(zip(ids, graph, strict=True))
    assert {(at[e["source"]].number, at[e["target"]].number, e["weight"]) for e in found["links"]} == {
        (edge.source, edge.target, edge.weight)
        for number in range(graph.n_nodes)
        if not graph.first_error <= number < graph.first_target
        for edge in graph.edges(into=number)
    }
    kinds = {
        "feature": "cross layer transcoder",
        "error": "mlp reconstruction error",
        "token": "embedding",
        "target": "logit",
    }
    assert [kinds[node.kind] for node in graph] == [node["feature_type"] for node in found["nodes"]]
    assert found["metadata"]["prompt"] == "aa 東京"
    assert found["metadata"]["prompt_tokens"] == ["a", "a", " 東京"]
    assert found["metadata"]["pruning_settings"] == {"node_threshold": 0.9, "edge_threshold": 0.95}
    assert found["metadata"]["feature_details"] == {"neuronpedia_source_set": "x"}


def test_ids_of_errors_are_not_those_of_features() -> None:
    """An error of layer 1, and feature 1 of layer 0 at the same token, had one id in circuit-tracer 0.5.0."""
    features = random_graph().features.clone()
    features[:, 2] = torch.tensor([1, 2]).repeat(9)
    ids = [node["node_id"] for node in exported(random_graph(features=features))["nodes"]]
    assert len(set(ids)) == len(ids)
    assert {"0_1_0", "1_-1_0", "0_2_2", "2_-1_2"} <= set(ids)


def test_names_and_numbers_of_each_kind_of_node() -> None:
    graph = random_graph()
    layer, position, number = graph.features[7].tolist()
    graph = graph.label({(layer, number): "<b>capital</b>"})
    nodes = {node["node_id"]: node for node in exported(graph)["nodes"]}
    feature = nodes[f"{layer}_{number}_{position}"]
    assert feature["clerp"] == "<b>capital</b>"
    assert feature["activation"] == pytest.approx(float(graph.values[7]))
    assert feature["jsNodeId"] == f"{layer}_{number}-0"
    w = (math.isqrt(8 * feature["feature"] + 1) - 1) // 2  # the inverse of Cantor's pairing
    k = feature["feature"] - w * (w + 1) // 2
    assert (w - k, k) == (layer, number)
    token = nodes["E_6_1"]
    assert (token["layer"], token["feature"], token["ctx_idx"], token["jsNodeId"]) == ("E", 1, 1, "E_6-1")
    logit = nodes["4_7_2"]
    assert (logit["layer"], logit["feature"], logit["jsNodeId"]) == ("4", 7, "L_7-2")
    assert logit["clerp"] == f'Output " word0" (p={graph.targets[0].weight:.3f})'
    assert [node["is_target_logit"] for node in nodes.values() if "is_target_logit" in node] == [True, False]


def test_influence_is_the_share_down_to_the_node() -> None:
    graph = random_graph(seed=4)
    nodes = exported(graph)["nodes"][: graph.first_target]
    order = sorted(range(len(nodes)), key=lambda i: -float(graph.influence[i]))
    total = float(graph.influence.double().sum())
    running = 0.0
    for i in order:
        running += float(graph.influence[i])
        assert nodes[i]["influence"] == pytest.approx(running / total, abs=1e-6)


def test_groups_are_supernodes() -> None:
    graph = random_graph().group("Say Austin", [0, 4]).group("Texas", [20])
    found = exported(graph)
    ids = [node["node_id"] for node in found["nodes"]]
    assert found["qParams"]["supernodes"] == [["Say Austin", ids[0], ids[4]], ["Texas", ids[20]]]
    assert found["qParams"]["pinnedIds"] == [ids[0], ids[4], ids[20]]


def test_targets_that_are_no_tokens() -> None:
    targets = (Target("metric", "A - B", 0.5, 2), Target("feature", "2/7 at 1", 0.5, 1, layer=2, feature=7))
    found = exported(random_graph(targets=targets))
    logits = [node for node in found["nodes"] if node["feature_type"] == "logit"]
    assert [node["clerp"] for node in logits] == ["A - B", "2/7 at 1"]
    assert len({node["node_id"] for node in logits}) == 2
    with pytest.raises(UsageError, match="two targets"):
        exported(random_graph(targets=(Target("logit", "x", 0.5, 2, token=7), Target("logit", "y", 0.5, 2, token=7))))


def test_outputs_are_spelt_as_tokens() -> None:
    labels = ("logit ' Austin'", "logit 'it\\'s'", "logit 'long…", "logit 17", "word", "'a' + x")
    weight = 1 / len(labels)
    targets = tuple(Target("logit", label, weight, 2, token=i) for i, label in enumerate(labels))
    found = [node["clerp"] for node in exported(random_graph(targets=targets, **rows_for(len(labels))))["nodes"]][-6:]
    words = (" Austin", "it's", "'long…", "17", "word", "'a' + x")
    assert found == [f'Output "{word}" (p=0.167)' for word in words]


def rows_for(count: int) -> dict[str, Any]:
    """Return the numbers of a graph with another number of targets."""
    other = random_graph(n_targets=count)
    names = (
        "influence",
        "offsets",
        "sources",
        "weights",
        "constant",
        "total",
        "summed",
        "absolute",
        "error_share",
        "kept",
    )
    return {name: getattr(other, name) for name in names}


def test_what_neuronpedia_does_not_take_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for slug, scan in (("a b", "x"), ("", "x"), ("x", "owner/model"), ("x\n", "x")):
        with pytest.raises(UsageError, match="letters, digits"):
            random_graph().to_neuronpedia(slug, scan)
    monkeypatch.setattr(neuronpedia, "MAX_BYTES", 2**10)
    with pytest.raises(UsageError, match="prune it first"):
        random_graph().to_neuronpedia("x", "x")


def test_the_estimate_of_the_size_is_below_the_size() -> None:
    graph = random_graph(n_layers=6, per_cell=5)
    size = len(json.dumps(graph.to_neuronpedia("x", "x"), separators=(",", ":")))
    estimate = len(graph) * neuronpedia.OF_NODE + graph.n_edges * neuronpedia.OF_EDGE
    assert 0.6 * size < estimate <= size


# ---------------------------------------------------------------------- upload


class Server:
    """A server that answers as Neuronpedia and its storage do, and keeps what it was sent."""

    def __init__(self) -> None:
        self.log: list[tuple[str, str, dict[str, str], bytes]] = []
        self.answers: dict[str, tuple[int, Any]] = {}
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def reply(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                headers = {name.lower(): value for name, value in self.headers.items()}
                outer.log.append((self.command, self.path, headers, body))
                status, answer = outer.answers[self.path.partition("?")[0]]
                raw = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                self.send_response(status)
                if status == 302:
                    self.send_header("Location", f"{outer.url}/elsewhere")
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)

            do_POST = do_PUT = do_GET = reply

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.answers = {
            "/api/graph/signed-put": (
                200,
                {"url": f"{self.url}/bucket/x?signature=s", "key": "k", "putRequestId": "r1"},
            ),
            "/bucket/x": (200, b""),
            "/api/graph/save-to-db": (200, {"url": "https://www.neuronpedia.org/gemma-2-2b/graph?slug=x"}),
        }
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    found = Server()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("NEURONPEDIA_API_KEY", KEY)
    monkeypatch.setattr(uploading, "SERVER", found.url)
    yield found
    found.server.shutdown()
    found.server.server_close()


def test_an_upload_is_three_calls(server: Server) -> None:
    data = random_graph().to_neuronpedia("x", "gemma-2-2b")
    assert upload(data, server=server.url) == "https://www.neuronpedia.org/gemma-2-2b/graph?slug=x"
    (first, put, last) = server.log
    assert first[:2] == ("POST", "/api/graph/signed-put")
    asked = json.loads(first[3])
    assert asked == {"filename": "x.json", "contentLength": len(put[3]), "contentType": "application/json"}
    assert put[:2] == ("PUT", "/bucket/x?signature=s")
    assert put[2]["content-type"] == "application/json"
    assert json.loads(put[3]) == data
    assert (last[:2], json.loads(last[3])) == (("POST", "/api/graph/save-to-db"), {"putRequestId": "r1"})
    assert [call[2].get("x-api-key") for call in server.log] == [KEY, None, KEY]
    tiny = {"metadata": {"slug": "tiny"}}
    upload(tiny, key="other", server=server.url)
    assert len(server.log[4][3]) == 1024
    assert json.loads(server.log[4][3]) == tiny
    assert server.log[3][2]["x-api-key"] == "other"


def test_nothing_is_sent_without_being_asked(server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    graph = random_graph()
    graph.to_neuronpedia("x", "x")
    graph.save(tmp_path)
    monkeypatch.delenv("NEURONPEDIA_API_KEY")
    for key in (None, "", "a\nb", "ключ"):
        with pytest.raises(UsageError, match="NEURONPEDIA_API_KEY"):
            graph.upload("x", "x", key=key)
    for address in ("http://example.com", "ftp://127.0.0.1", "neuronpedia.org", "http://[", "file:///etc/passwd"):
        with pytest.raises(ArtefactError, match="no https address"):
            upload(graph.to_neuronpedia("x", "x"), key=KEY, server=address)
    monkeypatch.setattr(uploading, "MOST", 2000)
    with pytest.raises(UsageError, match="prune it further"):
        upload(graph.to_neuronpedia("x", "x"), key=KEY, server=server.url)
    assert not server.log


REFUSALS: dict[str, tuple[str, tuple[int, Any], str]] = {
    "key": ("/api/graph/signed-put", (401, {"message": "Invalid API key"}), "refused the key .401.*Invalid API key"),
    "limit": ("/api/graph/signed-put", (429, {"error": "Too many"}), "too many uploads today"),
    "no JSON": ("/api/graph/signed-put", (200, b"<html>"), "no JSON object"),
    "a list": ("/api/graph/signed-put", (200, []), "no JSON object"),
    "no address": ("/api/graph/signed-put", (200, {"putRequestId": "r"}), "no url and putRequestId"),
    "another address": (
        "/api/graph/signed-put",
        (200, {"url": "http://example.com/x", "putRequestId": "r"}),
        "nothing is sent to 'http://example.com/x'",
    ),
    "a redirect": ("/api/graph/signed-put", (302, {}), "302"),
    "storage": (
        "/bucket/x",
        (403, b"<Error>\x1b[31mSignatureDoesNotMatch</Error>"),
        "403, /bucket/x.*SignatureDoesNot",
    ),
    "schema": ("/api/graph/save-to-db", (400, {"error": "Invalid graph"}), "400.*Invalid graph"),
    "no page": ("/api/graph/save-to-db", (200, {"error": "slug is another user's"}), "named no page.*another user"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_the_server_refuses_is_one_clear_line(name: str, server: Server) -> None:
    path, answer, message = REFUSALS[name]
    server.answers[path] = answer
    with pytest.raises(ArtefactError, match=message) as caught:
        upload(random_graph().to_neuronpedia("x", "x"), server=server.url)
    assert str(caught.value).isprintable()
    assert KEY not in str(caught.value)
    assert "signature=s" not in str(caught.value)
    assert all(call[1] != "/elsewhere" for call in server.log)


def test_a_server_that_is_away(server: Server) -> None:
    server.server.shutdown()
    server.server.server_close()
    with pytest.raises(ArtefactError, match="cannot be reached"):
        upload(random_graph().to_neuronpedia("x", "x"), server=server.url)
