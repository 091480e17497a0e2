"""Small attribution graphs of random features, whose influence, sums and scores fit their edges."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from featurizers_graphs.influence import pass_on
from featurizers_graphs.result import Graph, Target


def random_graph(
    n_layers: int = 3,
    texts: Sequence[str] = ("The", " cat", " sat"),
    per_cell: int = 2,
    n_targets: int = 2,
    density: float = 0.7,
    seed: int = 0,
    **changes: Any,
) -> Graph:
    """Return a graph in which every feature has a row and every edge is kept.

    Args:
        n_layers: of the model.
        texts: of the tokens.
        per_cell: active features of each layer and token.
        n_targets: logits that are explained.
        density: share of the possible edges that exist.
        seed: of features and weights.
        changes: other fields of the graph.
    """
    r = torch.Generator().manual_seed(seed)
    count, f = len(texts), n_layers * len(texts) * per_cell
    cells = torch.cartesian_prod(torch.arange(n_layers), torch.arange(count)).repeat_interleave(per_cell, dim=0)
    numbers = torch.randperm(50 * per_cell, generator=r)[:per_cell].sort().values.repeat(n_layers * count)
    features = torch.cat([cells, numbers[:, None]], dim=1)
    layers = torch.cat([features[:, 0], torch.arange(n_layers).repeat_interleave(count), torch.full((count,), -1)])
    places = torch.cat([features[:, 1], torch.arange(count).repeat(n_layers), torch.arange(count)])
    read_layers = torch.cat([features[:, 0], torch.full((n_targets,), n_layers)])
    read_places = torch.cat([features[:, 1], torch.full((n_targets,), count - 1)])
    may = (layers < read_layers[:, None]) & (places <= read_places[:, None])
    rows, sources = (may & (torch.rand(may.shape, generator=r) < density)).nonzero(as_tuple=True)
    weights = torch.randn(len(rows), generator=r)
    n_rows, first_target = f + n_targets, f + n_layers * count + count
    readers = torch.where(rows < f, rows, rows - f + first_target)
    shares = torch.softmax(torch.arange(n_targets, 0.0, -1.0), 0) * 0.9
    start = torch.zeros(first_target + n_targets)
    start[first_target:] = shares
    reached, share = pass_on(sources, readers, weights, start)
    errors = (sources >= f) & (sources < first_target - count)
    sums = torch.zeros(n_rows).index_add_(0, rows, weights)
    constant = torch.randn(n_rows, generator=r)
    fields: dict[str, Any] = {
        "tokens": torch.arange(count) + 5,
        "token_texts": tuple(texts),
        "features": features,
        "values": torch.rand(f, generator=r) + 0.1,
        "n_layers": n_layers,
        "targets": tuple(
            Target("logit", f" word{i}", float(weight), count - 1, token=7 + i) for i, weight in enumerate(shares)
        ),
        "influence": reached - start,
        "expanded": torch.ones(f, dtype=torch.bool),
        "offsets": torch.cat([torch.zeros(1, dtype=torch.int64), torch.bincount(rows, minlength=n_rows).cumsum(0)]),
        "sources": sources.int(),
        "weights": weights,
        "constant": constant,
        "total": sums + constant,
        "summed": sums,
        "absolute": torch.zeros(n_rows).index_add_(0, rows, weights.abs()),
        "error_share": torch.zeros(n_rows).index_add_(0, rows[errors], share[errors]),
        "kept": torch.ones(first_target + n_targets, dtype=torch.bool),
        "about": {"model": "owner/model", "maps": [{"id": "owner/maps", "reads": ["mlp.in:0"]}], "first": 0},
    }
    return Graph(**{**fields, **changes})
