"""Report of a dictionary by `featurizers.report`, beside the same steps written in plain torch."""

from __future__ import annotations

from typing import Any

import featurizers
import torch
from evaluate import Work, work
from timing import Benchmark, Case, Settings, same
from torch import Tensor
from torch.nn import functional

STEP = 256


def report(settings: Settings) -> Case:
    """Compare with forwards to the site, one encoding, sorted active features, and `topk` of all logits and cosines."""
    given = work(settings)
    tokenless = {"progress": False, "effect_tokens": 0}

    def ours() -> Any:
        return featurizers.report(given.ours, given.model, given.ids, **tokenless)

    def theirs() -> dict[str, Tensor]:
        return _in_plain_torch(given)

    def check() -> str:
        found, expected = ours(), theirs()
        if not torch.equal(found.count, expected["count"]):
            raise AssertionError("the counts of active features differ")
        return same(found.effects.high_values, expected["high"], 1e-4, "logits")

    documents, tokens = given.ids.shape
    config = given.model.config
    what = (
        f"report of {given.ours.n_features} features in the middle of {config.n_layer} layers, d={config.n_embd}, "
        f"vocabulary {config.vocab_size}, {documents} documents × {tokens} tokens"
    )
    peer = (
        "plain torch: forwards to the site, one encoding and decoding, sorted active features, `topk` of logits both "
        "ways and of cosines"
    )
    return Case(what, peer, ours, theirs, check)


@torch.no_grad()
def _in_plain_torch(given: Work) -> dict[str, Tensor]:
    f, model = given.ours, given.model
    x = featurizers.collect(model, {"input_ids": given.ids}, [f.site])[f.site].flatten(0, 1)
    z, _ = f.reconstruct(x)
    tokens, columns = z.nonzero(as_tuple=True)
    values = z[tokens, columns]
    order = values.argsort(descending=True)
    order = order[columns[order].argsort(stable=True)]
    found = {"count": torch.bincount(columns, minlength=f.n_features), "places": tokens[order]}
    most = torch.zeros(f.n_features).scatter_reduce(0, columns, values, "amax")
    bars = (20 * values / most[columns]).long().clamp(max=19)
    found["bars"] = torch.bincount(20 * columns + bars, minlength=20 * f.n_features)
    norm, head = model.transformer.ln_f, model.lm_head
    rows = (f.W_dec - f.W_dec.mean(dim=-1, keepdim=True)) * norm.weight
    unit = functional.normalize(f.W_dec, dim=-1)
    parts: dict[str, list[Tensor]] = {"high": [], "low": [], "near": []}
    for start in range(0, f.n_features, STEP):
        part = slice(start, start + STEP)
        logits = rows[part] @ head.weight.T
        parts["high"].append(logits.topk(10, dim=-1).values)
        parts["low"].append(logits.topk(10, dim=-1, largest=False).values)
        alike = unit[part] @ unit.T
        alike[torch.arange(len(alike)), torch.arange(start, start + len(alike))] = -1
        parts["near"].append(alike.topk(6, dim=-1).values)
    return found | {name: torch.cat(own) for name, own in parts.items()}


BENCHMARKS = (Benchmark("report-torch", report, required=1),)
