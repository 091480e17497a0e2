"""Edits inside traces of nnsight, beside the same edits written by hand in the trace."""

from __future__ import annotations

import importlib.util
from typing import Any

import featurizers
import torch
from models import gpt2, prompts
from timing import Benchmark, Case, Settings, Skipped, same
from torch import Tensor


def _traced(settings: Settings, layers: tuple[int, ...], *, depth: int, width: int, batch: int, length: int) -> Case:
    """Steer the last token at some layers.

    Args:
        settings: of the run.
        layers: to edit.
        depth: number of layers of the model.
        width: of the model.
        batch: number of prompts.
        length: of each prompt.
    """
    if importlib.util.find_spec("nnsight") is None:
        raise Skipped("nnsight is not installed")
    import nnsight
    from featurizers_nnsight import edit

    vocabulary = settings.size(1000, 100)
    lm: Any = nnsight.NNsight(gpt2(settings, layers=depth, width=width, vocabulary=vocabulary, length=length))
    ids, delta = prompts(settings, batch, length, vocabulary, 0), settings.randn(width)
    identity = featurizers.create("identity", d_in=width)
    operations = {f"resid.post:{layer}": featurizers.Steer(identity, delta=delta, positions=[-1]) for layer in layers}

    @torch.no_grad()
    def ours() -> Tensor:
        with lm.trace(input_ids=ids):
            edit(lm, operations)
            logits = lm.output.logits.save()
        return logits

    @torch.no_grad()
    def by_hand() -> Tensor:
        with lm.trace(input_ids=ids):
            for layer in layers:
                block = lm.transformer.h[layer]
                output = block.output
                hidden = (output[0] if isinstance(output, tuple) else output).clone()
                hidden[:, -1] += delta
                block.output = (hidden, *output[1:]) if isinstance(output, tuple) else hidden
            logits = lm.output.logits.save()
        return logits

    sites = "one layer" if len(layers) == 1 else f"{len(layers)} layers"
    return Case(
        f"steer the last token at {sites} in a trace: {depth} layers, d={width}, batch {batch}, {length} tokens",
        "the same edit by hand in the trace",
        ours,
        by_hand,
        lambda: same(ours(), by_hand(), 0.0, "logits"),
    )


def large(settings: Settings) -> Case:
    """Edit a model whose arithmetic dominates."""
    sizes = {"width": settings.size(256, 32), "batch": settings.size(32, 4), "length": settings.size(64, 8)}
    return _traced(settings, (2,), depth=6, **sizes)


def several(settings: Settings) -> Case:
    """Edit three layers of it in one call."""
    sizes = {"width": settings.size(256, 32), "batch": settings.size(32, 4), "length": settings.size(64, 8)}
    return _traced(settings, (1, 2, 4), depth=6, **sizes)


def tiny(settings: Settings) -> Case:
    """Measure the overhead alone, in a tiny model."""
    return _traced(settings, (1,), depth=2, width=16, batch=1, length=4)


BENCHMARKS = (
    Benchmark("nnsight-edit", large, "at most"),
    Benchmark("nnsight-edit-three", several, "at most"),
    Benchmark("nnsight-edit-tiny", tiny, "at most"),
)
