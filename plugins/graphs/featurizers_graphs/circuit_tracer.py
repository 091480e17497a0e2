"""Graphs of circuit-tracer, from the safetensors file that the script in docs/graphs.md makes of its ``.pt`` files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Final

import torch
from featurizers.errors import ArtefactError, explain
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from featurizers_graphs.graph_data import GraphData, Target
from featurizers_graphs.graph_files import MAX_LAYERS, check_graph
from featurizers_graphs.influence import pass_on

FORMAT: Final = "circuit-tracer.graph"
VERSION: Final = 1
MAX_NODES: Final = 2**26
TENSORS: Final[Mapping[str, torch.dtype]] = {
    "features": torch.int64,
    "values": torch.float32,
    "ends": torch.int64,
    "weights": torch.float32,
    "tokens": torch.int64,
    "probabilities": torch.float32,
}


class ConvertedRecord(BaseModel):
    """What the file says beside its tensors; each target has a name and, if it is a logit, a token id."""

    model_config = ConfigDict(strict=True, extra="forbid")

    n_layers: Annotated[int, Field(ge=1, le=MAX_LAYERS)]
    token_texts: tuple[str, ...]
    targets: Annotated[tuple[tuple[str, Annotated[int, Field(ge=0, lt=2**62)] | None], ...], Field(min_length=1)]
    model: str | None


def converted(tensors: Mapping[str, Tensor], about: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the fields of `GraphData` for a graph of circuit-tracer.

    Its nodes are numbered as ours, but features come in any order. Its rows have no constants and no totals, since its
    biases have no node; those are NaN. Influence is computed from the edges.

    Args:
        tensors: ``features`` (layer, position, number), ``values``, ``ends`` (target and source of each edge),
            ``weights``, ``tokens`` and ``probabilities``.
        about: JSON of the file.
        where: name of the file in errors.

    Raises:
        ArtefactError: the file is damaged.
    """
    try:
        record = ConvertedRecord.model_validate_json(json.dumps(about))
    except ValidationError as error:
        raise ArtefactError(where, f"its header is not that of a converted graph: {explain(error)}") from error
    _check(tensors, record, where)
    features, n_layers, count = tensors["features"], record.n_layers, len(record.token_texts)
    f, k = len(features), len(record.targets)
    first_target = f + n_layers * count + count
    order = _sorted(features)
    renumbered = torch.arange(first_target + k)
    renumbered[order] = torch.arange(f)
    target, source = (renumbered[end] for end in tensors["ends"])
    if bool(((target >= f) & (target < first_target)).any()):
        raise ArtefactError(where, "an edge leads to an error or a token, which read nothing")
    rows = torch.where(target < f, target, target - first_target + f)
    by_row = (rows * first_target + source).argsort()
    source, target, rows, weights = source[by_row], target[by_row], rows[by_row], tensors["weights"][by_row]
    sums = [torch.zeros(f + k).index_add_(0, rows, each) for each in (weights, weights.abs())]
    unknown = torch.full((f + k,), torch.nan)
    parts = zip(record.targets, tensors["probabilities"].tolist(), strict=True)
    fields: dict[str, Any] = {
        "tokens": tensors["tokens"],
        "token_texts": record.token_texts,
        "features": features[order],
        "values": tensors["values"][order],
        "n_layers": n_layers,
        "targets": tuple(
            Target("metric" if token is None else "logit", label, weight, count - 1, token)
            for (label, token), weight in parts
        ),
        "influence": torch.zeros(first_target + k),
        "expanded": torch.ones(f, dtype=torch.bool),
        "offsets": torch.cat([torch.zeros(1, dtype=torch.int64), torch.bincount(rows, minlength=f + k).cumsum(0)]),
        "sources": source.int(),
        "weights": weights,
        "constant": unknown,
        "total": unknown.clone(),
        "summed": sums[0],
        "absolute": sums[1],
        "error_share": torch.zeros(f + k),
        "kept": torch.ones(first_target + k, dtype=torch.bool),
        "about": {"model": record.model, "made_with": "circuit-tracer"},
    }
    check_graph(GraphData(**fields), where)  # first: influence of a graph with cycles has no end
    start = torch.zeros(first_target + k)
    start[first_target:] = tensors["probabilities"]
    reached, share = pass_on(source, target, weights, start)
    errors = (source >= f) & (source < f + n_layers * count)
    of_errors = torch.zeros(f + k).index_add_(0, rows[errors], share[errors])
    return {**fields, "influence": reached - start, "error_share": of_errors}


def _check(tensors: Mapping[str, Tensor], record: ConvertedRecord, where: str) -> None:
    """Raise unless the tensors fit one another, and the edges the nodes."""
    if tensors.keys() != TENSORS.keys() or any(tensors[name].dtype != dtype for name, dtype in TENSORS.items()):
        raise ArtefactError(where, f"a converted graph has the tensors {', '.join(TENSORS)} in the script's dtypes")
    names = ("features", "weights", "tokens", "probabilities")
    f, edges, count, k = (tensors[name].shape[0] if tensors[name].dim() else 0 for name in names)
    sizes: dict[str, tuple[int, ...]] = {"features": (f, 3), "values": (f,), "ends": (2, edges)}
    sizes |= {"weights": (edges,), "tokens": (count,), "probabilities": (k,)}
    for name, size in sizes.items():
        if tuple(tensors[name].shape) != size:
            raise ArtefactError(where, f"{name} has shape {list(tensors[name].shape)}, and {list(size)} fits the rest")
    if len(record.token_texts) != count or len(record.targets) != k or not count:
        raise ArtefactError(where, "texts of tokens or names of targets are not as many as tokens and probabilities")
    if (nodes := f + (record.n_layers + 1) * count + k) > MAX_NODES:
        raise ArtefactError(where, f"it has {nodes} nodes, more than the {MAX_NODES} that are read")
    if not bool(((tensors["ends"] >= 0) & (tensors["ends"] < nodes)).all()):
        raise ArtefactError(where, "ends has nodes that the graph does not have")
    if not bool(((tensors["probabilities"] >= 0) & (tensors["probabilities"] <= 1.001)).all()):
        raise ArtefactError(where, "probabilities are not between 0 and 1")


def _sorted(features: Tensor) -> Tensor:
    """Return the order of features by layer, position and number."""
    order = torch.arange(len(features))
    for column in (2, 1, 0):
        order = order[features[order, column].argsort(stable=True)]
    return order
