"""Reads llamascopium's maps of several layers: cross-layer transcoders and crosscoders."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

import torch
from featurizers import Site
from featurizers_transcoder import Crosscoder, CrossLayerTranscoder
from featurizers_transcoder.hooks import HOOK, Read, hookless
from torch import Tensor

from featurizers_llamascopium.config import CrossLayer, ManySites
from featurizers_llamascopium.sites import Places
from featurizers_llamascopium.weights import THRESHOLD, Gate, Weights

Chosen: TypeAlias = Callable[[list[str]], dict[str, Tensor | None]]
"""Function from the names of all groups to the features to read of some, None for all of a group."""


MapT = TypeVar("MapT", CrossLayerTranscoder, Crosscoder)


def cross_layer(config: CrossLayer, weights: Weights, places: Places, chosen: Chosen) -> CrossLayerTranscoder:
    """Read a cross-layer transcoder: a group ``layer-i`` for each layer, which writes that layer and all later ones.

    ``W_D.w (w + 1, n, d)`` has the decoders to the layer w. The norm of a feature is that of all its decoders together.
    """
    d, n, count = config.d_model, config.n_features, len(config.hook_points_in)
    threshold: dict[str, tuple[int, ...]] = {THRESHOLD: (count, n)} if weights.has_threshold else {}
    shapes: dict[str, tuple[int, ...]] = {"W_E": (count, d, n), "b_E": (count, n), **threshold}
    shapes |= {f"W_D.{w}": (w + 1, n, d) for w in range(count)}
    weights.check(shapes | {f"b_D.{w}": (d,) for w in range(count)})
    numbers = _layers(config)
    reads, writes = _places(places, config.hook_points_in, config.hook_points_out)
    names = [f"layer-{number}" for number in numbers]
    parts = _Parts()
    for group, indices in chosen(names).items():
        layer, rows = names.index(group), weights.columns(indices)
        decoders = {w: weights.read(f"W_D.{w}", rows=rows, plane=layer) for w in range(layer, count)}
        norms = torch.stack([rows_of.norm(dim=-1) for rows_of in decoders.values()]).norm(dim=0)
        gate = weights.gate(norms, _of_layer(weights, THRESHOLD, layer, rows) if threshold else None)
        read = f"in-{numbers[layer]}"
        factor = weights.factor(config.hook_points_in[layer])
        parts.reads[read] = _read_config(reads[layer], d)
        parts.add_group(group, [read], [f"out-{numbers[w]}" for w in decoders], gate, rows, n)
        parts.tensors[f"W_enc.{group}.{read}"] = weights.read("W_E", columns=rows, plane=layer).T * factor
        parts.tensors[f"b_enc.{group}"] = _of_layer(weights, "b_E", layer, rows)
        for w, rows_of in decoders.items():
            parts.tensors[f"W_dec.{group}.out-{numbers[w]}"] = rows_of / weights.factor(config.hook_points_out[w])
    written = {write for group in parts.groups.values() for write in group["writes"]}
    for w, number in enumerate(numbers):
        if f"out-{number}" in written:
            parts.writes[f"out-{number}"] = d
            parts.tensors[f"b_dec.out-{number}"] = weights.read(f"b_D.{w}") / weights.factor(config.hook_points_out[w])
    result = CrossLayerTranscoder.from_tensors(parts.config, parts.tensors)
    return _with_sites(
        result,
        {f"in-{number}": read.site for number, read in zip(numbers, reads, strict=True)},
        {f"out-{number}": site for number, site in zip(numbers, writes, strict=True)},
        [*config.hook_points_in, *config.hook_points_out],
    )


def crosscoder(config: ManySites, weights: Weights, places: Places, chosen: Chosen) -> Crosscoder:
    """Read a crosscoder, whose heads share their pre-activations, which are sums over the sites of all heads.

    Each head compares them times the norms of its own decoder, so that a feature may fire in one head and not in
    another: a group ``head-i`` for each head, which writes the site of this head alone. With relu the heads agree, and
    there is one group ``features``, which writes all sites.
    """
    d, n, count = config.d_model, config.n_features, len(config.hook_points)
    threshold: dict[str, tuple[int, ...]] = {THRESHOLD: (n,)} if weights.has_threshold else {}
    stacked = {"W_E": (count, d, n), "b_E": (count, n), "W_D": (count, n, d), "b_D": (count, d)}
    weights.check({**stacked, **threshold})
    names = [f"head-{head}" for head in range(count)]
    reads, writes = _places(places, config.hook_points, config.hook_points)
    factors = [weights.factor(hook) for hook in config.hook_points]
    b_enc, b_dec = weights.read("b_E").sum(dim=0), weights.read("b_D")
    parts = _Parts()
    parts.reads = {name: _read_config(read, d) for name, read in zip(names, reads, strict=True)}
    parts.writes = dict.fromkeys(names, d)
    shared = config.act_fn == "relu"
    groups = {"features": list(range(count))} if shared else {name: [head] for head, name in enumerate(names)}
    encoders: dict[Any, list[Tensor]] = {}
    for group, indices in chosen(list(groups)).items():
        rows = weights.columns(indices)
        key = None if rows is None else tuple(rows.tolist())
        if key not in encoders:  # groups of the same features share one encoder in memory
            planes = [weights.read("W_E", columns=rows, plane=head).T for head in range(count)]
            encoders[key] = [(plane * factors[head]).contiguous() for head, plane in enumerate(planes)]
        decoders = {head: weights.read("W_D", rows=rows, plane=head) for head in groups[group]}
        norms = torch.stack([rows_of.norm(dim=-1) for rows_of in decoders.values()]).amin(dim=0)
        gate = weights.gate(norms, weights.read(THRESHOLD, rows=rows) if threshold else None)
        parts.add_group(group, names, [names[head] for head in decoders], gate, rows, n)
        parts.tensors |= {f"W_enc.{group}.{name}": rows_of for name, rows_of in zip(names, encoders[key], strict=True)}
        parts.tensors[f"b_enc.{group}"] = b_enc if rows is None else b_enc[rows]
        for head, rows_of in decoders.items():
            parts.tensors[f"W_dec.{group}.{names[head]}"] = rows_of / factors[head]
    parts.tensors |= {f"b_dec.{name}": b_dec[head] / factors[head] for head, name in enumerate(names)}
    result = Crosscoder.from_tensors(parts.config, parts.tensors)
    return _with_sites(
        result,
        {name: read.site for name, read in zip(names, reads, strict=True)},
        dict(zip(names, writes, strict=True)),
        config.hook_points,
    )


class _Parts:
    """Config and tensors of a map while it is read."""

    def __init__(self) -> None:
        self.reads: dict[str, Any] = {}
        self.writes: dict[str, int] = {}
        self.groups: dict[str, Any] = {}
        self.tensors: dict[str, Tensor] = {}

    @property
    def config(self) -> dict[str, Any]:
        """Config of the map."""
        return {"reads": self.reads, "writes": self.writes, "groups": self.groups}

    def add_group(
        self, group: str, reads: list[str], writes: list[str], gate: Gate, rows: Tensor | None, n: int
    ) -> None:
        """Add the config of a group, the parameters of its rule, and the numbers of its features if it is a slice."""
        self.groups[group] = {
            "reads": reads,
            "writes": writes,
            "n_features": n if rows is None else len(rows),
            "rule": gate.rule,
            "rule_options": gate.options,
            "slice_of": None if rows is None else n,
        }
        self.tensors |= {f"rule_tensors.{name}.{group}": tensor for name, tensor in gate.tensors.items()}
        if rows is not None:
            self.tensors[f"numbers-{group}"] = rows


def _layers(config: CrossLayer) -> list[int]:
    """Return the numbers of the layers in the model, or those in the lists if the hooks do not agree."""
    pairs = zip(config.hook_points_in, config.hook_points_out, strict=True)
    matches = [(HOOK.fullmatch(hook_in), HOOK.fullmatch(hook_out)) for hook_in, hook_out in pairs]
    numbers = [int(a[1]) for a, b in matches if a is not None and b is not None and int(a[1]) == int(b[1])]
    return numbers if len(set(numbers)) == len(matches) else list(range(len(matches)))


def _of_layer(weights: Weights, name: str, layer: int, rows: Tensor | None) -> Tensor:
    """Read a row of a matrix, or some numbers of it."""
    return weights.read(name, rows=rows, plane=layer)


def _read_config(read: Read, width: int) -> dict[str, Any]:
    return {"width": width, "normalize": read.normalize, "eps": read.eps}


def _places(places: Places, hooks_in: list[str], hooks_out: list[str]) -> tuple[list[Read], list[Site | None]]:
    """Return what is read and written; nothing if a site is not known, so that the map takes what the hooks have."""
    reads, writes = [places.read(hook) for hook in hooks_in], [places.write(hook) for hook in hooks_out]
    if any(read.site is None for read in reads) or None in writes:
        return [Read(None)] * len(reads), [None] * len(writes)
    return reads, writes


def _with_sites(result: MapT, reads: dict[str, Site | None], writes: dict[str, Site | None], hooks: list[str]) -> MapT:
    """Set the sites of a map, or a note if they are not known."""
    known_reads = {name: site for name in result.read_widths if (site := reads[name]) is not None}
    known_writes = {name: site for name in result.write_widths if (site := writes[name]) is not None}
    if known_reads and known_writes:
        result.reads, result.writes = known_reads, known_writes
    else:
        result.metadata = {"notes": [hookless(hooks[0], hooks[-1])]}
    return result
