"""One HTML file that shows a graph; it needs no other file and no network."""

from __future__ import annotations

import base64
import hashlib
import json
from importlib import metadata, resources
from pathlib import Path
from typing import Any, Final

from featurizers.errors import UsageError, printable
from featurizers.files import os_errors
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from featurizers_graphs.graph_data import GraphData, Node, targets_text

FILES: Final = ("page.html", "page.css", "page.js")
POLICY: Final = "default-src 'none'; base-uri 'none'; form-action 'none'"
MAX_NODES: Final = 10_000
MAX_EDGES: Final = 200_000
"""Sizes up to which a browser draws a page without long waits."""


def write_page(path: Path, graph: GraphData) -> Path:
    """Write a page of the kept nodes and edges of a graph, and return its path.

    The page may run only its own script and use only its own style, by their hashes, and may load nothing.

    Raises:
        UsageError: the graph is too large for a page.
        ArtefactError: the file cannot be written.
    """
    if len(graph) > MAX_NODES or graph.n_edges > MAX_EDGES:
        raise UsageError(
            f"a page shows at most {MAX_NODES} nodes and {MAX_EDGES} edges, and the graph has {len(graph)} and "
            f"{graph.n_edges}; prune it first: graph.prune(nodes=0.8, edges=0.98)"
        )
    parts = {name: resources.files(__package__).joinpath(name).read_text(encoding="utf-8") for name in FILES}
    style, script = parts["page.css"].strip(), parts["page.js"].strip()
    template = Environment(autoescape=True, undefined=StrictUndefined).from_string(parts["page.html"])
    text = template.render(
        title=f"{printable(targets_text(graph.targets), 100)} after {_prompt(graph)}",
        policy=f"{POLICY}; script-src '{_hash(script)}'; style-src '{_hash(style)}'",
        style=Markup(style),
        script=Markup(script),
        data=Markup(_inert(page_data(graph))),
        prompt=[_token(text) for text in graph.token_texts],
        facts=_facts(graph),
        versions=f"featurizers-graphs {metadata.version('featurizers-graphs')}",
    )
    with os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n", encoding="utf-8")
    return path


def _hash(text: str) -> str:
    """Return the source expression of a policy that allows exactly this text."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode('ascii')}"


def _inert(data: dict[str, Any]) -> str:
    """Return JSON that can stand in a script element: no character in it begins a tag or a comment."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _token(text: str) -> str:
    """Return a token without characters that move text or break lines."""
    return printable(text.replace("\n", "⏎"), 60)


def _prompt(graph: GraphData) -> str:
    return printable("".join(graph.token_texts), 80)


def _facts(graph: GraphData) -> dict[str, str]:
    """Return what the head of the page says of the graph."""
    whole, kept = graph.scores, graph.kept_scores
    model = graph.about.get("model")
    return {
        "model": printable(str(model), 200) if model else "not recorded",
        "replacement": f"{whole.replacement}, kept {kept.replacement}",
        "completeness": f"{whole.completeness}, kept {kept.completeness}",
        "nodes": f"{len(graph)} of {graph.n_nodes}",
        "edges": str(graph.n_edges),
    }


def page_data(graph: GraphData) -> dict[str, Any]:
    """Return what the script draws: kept nodes as rows, and edges between their places in that list."""
    nodes = list(graph)
    place = {node.number: i for i, node in enumerate(nodes)}
    ends = graph.sources.tolist(), graph.edge_targets.tolist(), graph.weights.tolist()
    return {
        "layers": graph.n_layers,
        "tokens": [_token(text) for text in graph.token_texts],
        "nodes": [_row(node) for node in nodes],
        "edges": [[place[s], place[t], _short(w)] for s, t, w in zip(*ends, strict=True)],
        "groups": {
            printable(name, 100): [place[i] for i in members if i in place] for name, members in graph.groups.items()
        },
    }


def _row(node: Node) -> list[Any]:
    """Return number, kind, layer, position, feature, value, influence and label of a node."""
    value = None if node.value is None else _short(node.value)
    label = _token(node.label) if node.kind == "token" else printable(node.label, 200)
    return [node.number, node.kind, node.layer, node.position, node.feature, value, _short(node.influence), label]


def _short(number: float) -> float:
    return float(f"{number:.5g}")
