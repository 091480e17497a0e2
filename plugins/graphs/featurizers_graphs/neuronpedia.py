"""Graphs as JSON for Neuronpedia and for the front end of attribution graphs that circuit-tracer uses.

The fields are those that Neuronpedia's `graph-schema.json` names. Ids are those of circuit-tracer, but errors have
``LAYER_-1_TOKEN``: its release 0.5.0 gives an error of a layer the id of a feature of layer 0.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from importlib import metadata
from typing import Any, Final

import torch
from featurizers.errors import UsageError, shown
from jaxtyping import Float
from torch import Tensor

from featurizers_graphs.graph_data import GraphData, Node, Target

NAME: Final = re.compile(r"[A-Za-z0-9_.-]{1,200}")
"""Slugs and models that Neuronpedia accepts."""
MAX_BYTES: Final = 100 * 2**20
"""Size of the largest graph that Neuronpedia takes."""
OF_NODE: Final = 190
"""About the bytes of a node."""
OF_EDGE: Final = 55
"""The fewest bytes of an edge."""
VIRTUAL: Final = 2**30
"""Number in the place of a token's id, from which targets that are no tokens are counted."""


def to_neuronpedia(
    graph: GraphData,
    slug: str,
    scan: str,
    *,
    source_set: str | None = None,
    feature_url: str | None = None,
    description: str | None = None,
    creator: str | None = None,
) -> dict[str, Any]:
    """Return the kept nodes and edges of a graph as an object that Neuronpedia reads.

    Groups become supernodes, whose nodes are pinned.

    Args:
        graph: to convert, pruned.
        slug: name of the graph in its address; letters, digits and ``_ . -``.
        scan: model, as Neuronpedia calls it, such as ``gemma-2-2b``.
        source_set: dashboards of the features on Neuronpedia, such as ``gemmascope-transcoder-16k``.
        feature_url: address of a folder with a JSON file for each feature, instead.
        description: of the graph.
        creator: name of who made it.

    Raises:
        UsageError: a name has other characters, the graph is too large, or two targets are one token.
    """
    for what, name in (("slug", slug), ("scan", scan)):
        if not NAME.fullmatch(name):
            raise UsageError(f"a {what} is letters, digits and _ . - such as 'gemma-2-2b', not {shown(name)}")
    if (size := len(graph) * OF_NODE + graph.n_edges * OF_EDGE) > MAX_BYTES:
        raise UsageError(
            f"a graph of {graph.n_edges} edges has about {size / 2**20:.0f} MiB as JSON, and Neuronpedia takes "
            f"{MAX_BYTES // 2**20}; prune it first: graph.prune(nodes=0.8, edges=0.98)"
        )
    ids = {node.number: _id(graph, node) for node in graph}
    if len(set(ids.values())) < len(ids):
        raise UsageError("two targets of the graph are the same token at the same position; leave one out")
    shares = _cumulative(graph.influence)
    ends = graph.sources.tolist(), graph.edge_targets.tolist(), graph.weights.tolist()
    groups = {name: [ids[node] for node in nodes if node in ids] for name, nodes in graph.groups.items()}
    return {
        "metadata": _metadata(graph, slug, scan, source_set, feature_url, description, creator),
        "qParams": {
            "pinnedIds": [node for nodes in groups.values() for node in nodes],
            "supernodes": [[name, *nodes] for name, nodes in groups.items() if nodes],
            "linkType": "both",
            "clickedId": "",
            "sg_pos": "",
        },
        "nodes": [_node(graph, node, ids[node.number], float(shares[node.number])) for node in graph],
        "links": [{"source": ids[s], "target": ids[t], "weight": w} for s, t, w in zip(*ends, strict=True)],
    }


def cantor(layer: int, feature: int) -> int:
    """Return the number that stands for a layer and a feature: the Cantor pairing of both."""
    return (layer + feature) * (layer + feature + 1) // 2 + feature


def _cumulative(influence: Float[Tensor, " nodes"]) -> Float[Tensor, " nodes"]:
    """Return for each node the share of the influence that nodes down to it hold; pages hide those above a limit."""
    ordered = influence.double().sort(descending=True, stable=True)
    shares = ordered.values.cumsum(0) / ordered.values.sum().clamp(min=1e-30)
    return torch.empty_like(shares).index_copy_(0, ordered.indices, shares)


def _target(graph: GraphData, node: Node) -> tuple[Target, int]:
    """Return a target, and its token's id or a number that stands for it."""
    at = node.number - graph.first_target
    token = graph.targets[at].token
    return graph.targets[at], VIRTUAL + at if token is None else token


def _id(graph: GraphData, node: Node) -> str:
    if node.kind == "feature":
        return f"{node.layer}_{node.feature}_{node.position}"
    if node.kind == "error":
        return f"{node.layer}_-1_{node.position}"
    if node.kind == "token":
        return f"E_{int(graph.tokens[node.position])}_{node.position}"
    return f"{graph.n_layers + 1}_{_target(graph, node)[1]}_{node.position}"


def _node(graph: GraphData, node: Node, name: str, share: float) -> dict[str, Any]:
    """Return the record of a node."""
    shared = {"node_id": name, "ctx_idx": node.position, "run_idx": 0, "reverse_ctx_idx": 0, "influence": share}
    if node.kind == "feature" and node.layer is not None and node.feature is not None:
        label = graph.labels.get((node.layer, node.feature), "")
        number, js, kind = cantor(node.layer, node.feature), f"{node.layer}_{node.feature}-0", "cross layer transcoder"
        own = {"layer": str(node.layer), "clerp": label, "activation": node.value}
        return shared | own | {"feature": number, "feature_type": kind, "jsNodeId": js}
    if node.kind == "error":
        own = {"layer": str(node.layer), "clerp": f"Err: mlp {graph.token_texts[node.position]!r}"}
        js = f"{node.layer}_-1-{node.position}"
        return shared | own | {"feature": -1, "feature_type": "mlp reconstruction error", "jsNodeId": js}
    if node.kind == "token":
        own = {"layer": "E", "clerp": f"Emb: {graph.token_texts[node.position]!r}"}
        js = f"E_{int(graph.tokens[node.position])}-{node.position}"
        return shared | own | {"feature": node.position, "feature_type": "embedding", "jsNodeId": js}
    target, number = _target(graph, node)
    text = f'Output "{_spelt(target.label)}" (p={target.weight:.3f})' if target.kind == "logit" else target.label
    return shared | {
        "layer": str(graph.n_layers + 1),
        "clerp": text,
        "influence": None,
        "token_prob": target.weight,
        "is_target_logit": target is graph.targets[0],
        "feature": number,
        "feature_type": "logit",
        "jsNodeId": f"L_{number}-{node.position}",
    }


def _spelt(label: str) -> str:
    """Return the token itself of a label such as ``logit ' Austin'``."""
    text = label.removeprefix("logit ")
    try:
        token = ast.literal_eval(text) if text[:1] in ("'", '"') else text
    except (ValueError, SyntaxError):  # cut, since it was long
        return text
    return token if isinstance(token, str) else text


def _metadata(
    graph: GraphData,
    slug: str,
    scan: str,
    source_set: str | None,
    feature_url: str | None,
    description: str | None,
    creator: str | None,
) -> dict[str, Any]:
    """Return what the page says of the whole graph."""
    details = {"neuronpedia_source_set": source_set, "feature_json_base_url": feature_url}
    generator = {"name": "featurizers", "version": metadata.version("featurizers-graphs")}
    info = {"description": description, "creator_name": creator, "generator": generator}
    found: dict[str, Any] = {
        "slug": slug,
        "scan": scan,
        "prompt_tokens": list(graph.token_texts),
        "prompt": "".join(graph.token_texts),
        "schema_version": 1,
        "info": {key: value for key, value in info.items() if value is not None},
    }
    if given := {key: value for key, value in details.items() if value is not None}:
        found["feature_details"] = given
    pruning = graph.about.get("pruning")
    if isinstance(pruning, Mapping):
        found["node_threshold"] = pruning.get("nodes")
        found["pruning_settings"] = {"node_threshold": pruning.get("nodes"), "edge_threshold": pruning.get("edges")}
    return found
