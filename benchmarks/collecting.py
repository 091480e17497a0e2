"""Speed of collecting the activations of a layer."""

from __future__ import annotations

from typing import Any

import featurizers
import torch
from models import gpt2, prompts
from peers import pyvene_model
from timing import Benchmark, Case, Settings, same, tolerance
from torch import Tensor

LAYER = 2
KEY = f"resid.post:{LAYER}"


def _case(settings: Settings, positions: list[int] | None, *, head: bool = True) -> Case:
    layers, width, vocabulary = 6, settings.size(256, 32), settings.size(50257, 500)
    batch, length = settings.size(32, 4), settings.size(64, 8)
    model: Any = gpt2(settings, layers=layers, width=width, vocabulary=vocabulary, length=length)
    model = model if head else model.transformer
    inputs = {"input_ids": prompts(settings, batch, length, vocabulary)}
    intervenable = pyvene_model(model, LAYER, "CollectIntervention")
    columns = list(range(length)) if positions is None else [position % length for position in positions]
    locations = {"base": [[columns] * batch]}  # one list for each intervention and example

    def ours() -> Tensor:
        return featurizers.collect(model, inputs, [KEY], positions=positions)[KEY]

    @torch.no_grad()
    def theirs() -> Tensor:
        (_, collected), _ = intervenable(inputs, unit_locations=locations, use_cache=False)
        return collected[0]

    where = "all positions" if positions is None else "one position"
    return Case(
        f"collect {where} after layer {LAYER} of {layers}, GPT-2 with d={width}, vocabulary {vocabulary}, "
        f"batch {batch}, {length} tokens",
        "pyvene's CollectIntervention" + ("" if head else " on the model without its language-model head"),
        ours,
        theirs,
        lambda: same(ours(), theirs(), tolerance(settings.dtype), "activations"),
    )


def everywhere(settings: Settings) -> Case:
    """Collect the activations of all tokens."""
    return _case(settings, None)


def one(settings: Settings) -> Case:
    """Collect the activations of the last token."""
    return _case(settings, [-1])


def headless(settings: Settings) -> Case:
    """Collect in a model without a language-model head; with one, `featurizers.collect` does not compute the logits."""
    return _case(settings, None, head=False)


BENCHMARKS = (
    Benchmark("collect-all", everywhere, required=5),
    Benchmark("collect-one", one, required=5),
    Benchmark("collect-headless", headless),
)
