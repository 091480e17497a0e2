"""Overhead of the hooks over the forward passes of an intervention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import featurizers
import torch
from models import gpt2, prompts
from peers import pyvene_model, transformer_bridge
from timing import Benchmark, Case, Settings, same, tolerance
from torch import Tensor, nn


@dataclass(frozen=True)
class Patching:
    """A model and two prompts, to patch the last token at one layer."""

    model: Any
    base: dict[str, Tensor]
    source: dict[str, Tensor]
    layer: int
    activations: Tensor
    featurizer: featurizers.Featurizer[Any]
    what: str

    @classmethod
    def build(cls, settings: Settings, *, layers: int, width: int, batch: int, length: int, layer: int) -> Patching:
        """Make a random model and random prompts."""
        vocabulary = settings.size(1000, 100)
        model = gpt2(settings, layers=layers, width=width, vocabulary=vocabulary, length=length)
        base, source = ({"input_ids": prompts(settings, batch, length, vocabulary, seed)} for seed in range(2))
        site = f"resid.post:{layer}"
        activations = featurizers.collect(model, source, [site], positions=[-1])[site]
        what = f"layer {layer} of {layers}, d={width}, batch {batch}, {length} tokens"
        return cls(model, base, source, layer, activations, featurizers.create("identity", d_in=width), what)

    @torch.no_grad()
    def plain(self, passes: int = 1) -> Tensor:
        """Run one or two plain forward passes; return the logits of the base."""
        if passes == 2:
            self.model(**self.source, use_cache=False)
        return self.model(**self.base, use_cache=False).logits

    @torch.no_grad()
    def ours(self, source: Tensor | dict[str, Tensor]) -> Tensor:
        """Return the patched logits, computed by `featurizers.intervene`."""
        swap = featurizers.Interchange(self.featurizer, source=source, positions=[-1])
        with featurizers.intervene(self.model, {f"resid.post:{self.layer}": swap}):
            return self.model(**self.base, use_cache=False).logits

    def theirs(self) -> Callable[[], Tensor]:
        """Return a function that computes the patched logits with pyvene, from a source given as inputs."""
        intervenable = pyvene_model(self.model, self.layer, "VanillaIntervention")
        batch, length = self.base["input_ids"].shape
        units = [[[length - 1]] * batch]  # one list for each intervention and example
        locations = {"sources->base": (units, units)}

        @torch.no_grad()
        def call() -> Tensor:
            patched = intervenable(self.base, [self.source], unit_locations=locations, use_cache=False)
            return patched[1].logits

        return call

    @torch.no_grad()
    def by_hand(self) -> Tensor:
        """Return the patched logits, computed with one plain torch hook."""

        def patch(_: nn.Module, __: object, output: Any) -> Any:
            hidden = (output[0] if isinstance(output, tuple) else output).clone()
            hidden[:, -1] = self.activations[:, 0]
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        handle = self.model.transformer.h[self.layer].register_forward_hook(patch)
        try:
            return self.model(**self.base, use_cache=False).logits
        finally:
            handle.remove()


def _large(settings: Settings, layer: int) -> Patching:
    sizes = {"width": settings.size(256, 32), "batch": settings.size(32, 4), "length": settings.size(64, 8)}
    return Patching.build(settings, layers=6, layer=layer, **sizes)


def _against_plain(patching: Patching, source: Tensor | dict[str, Tensor], passes: int, named: str) -> Case:
    peer = "one plain forward pass" if passes == 1 else "two plain forward passes"
    return Case(
        f"patch one position, the source given as {named}: {patching.what}",
        peer,
        lambda: patching.ours(source),
        lambda: patching.plain(passes),
        lambda: same(patching.ours(source), patching.by_hand(), 0.0, "logits, with a hook by hand"),
    )


def inputs_last(settings: Settings) -> Case:
    """Patch the last layer, where the pass over the source ends just before the head."""
    patching = _large(settings, 5)
    return _against_plain(patching, patching.source, 2, "inputs")


def inputs_middle(settings: Settings) -> Case:
    """Patch an early layer, where the pass over the source ends early."""
    patching = _large(settings, 2)
    return _against_plain(patching, patching.source, 2, "inputs")


def activations(settings: Settings) -> Case:
    """Patch with activations as the source, which needs one forward pass."""
    patching = _large(settings, 2)
    return _against_plain(patching, patching.activations, 1, "activations")


def by_hand(settings: Settings) -> Case:
    """Compare with a hook written for the purpose."""
    patching = _large(settings, 2)
    case = _against_plain(patching, patching.activations, 1, "activations")
    return Case(case.what, "one torch hook by hand", case.ours, patching.by_hand, case.check)


def _against_pyvene(patching: Patching, settings: Settings) -> Case:
    theirs = patching.theirs()
    return Case(
        f"patch one position, the source given as inputs: {patching.what}",
        "pyvene's VanillaIntervention",
        lambda: patching.ours(patching.source),
        theirs,
        lambda: same(patching.ours(patching.source), theirs(), tolerance(settings.dtype), "logits"),
    )


def pyvene_large(settings: Settings) -> Case:
    """Compare with pyvene in a model whose arithmetic dominates."""
    return _against_pyvene(_large(settings, 5), settings)


def pyvene_tiny(settings: Settings) -> Case:
    """Compare with pyvene in a model so small that only the overhead remains."""
    return _against_pyvene(Patching.build(settings, layers=2, width=16, batch=1, length=4, layer=1), settings)


def tiny(settings: Settings) -> Case:
    """Measure the overhead alone, in a tiny model."""
    patching = Patching.build(settings, layers=2, width=16, batch=1, length=4, layer=1)
    return _against_plain(patching, patching.source, 2, "inputs")


def transformer_lens(settings: Settings) -> Case:
    """Compare an edit of a TransformerBridge with a hook function that TransformerLens runs on the same hook point."""
    patching = _large(settings, 2)
    bridge = transformer_bridge(patching.model)
    swap = featurizers.Interchange(patching.featurizer, source=patching.activations, positions=[-1])

    def patch(hidden: Tensor, **_: object) -> Tensor:
        hidden = hidden.clone()
        hidden[:, -1] = patching.activations[:, 0]
        return hidden

    @torch.no_grad()
    def ours() -> Tensor:
        with featurizers.intervene(bridge, {"blocks.2.hook_resid_post": swap}):
            return bridge(patching.base["input_ids"])

    @torch.no_grad()
    def theirs() -> Tensor:
        return bridge.run_with_hooks(patching.base["input_ids"], fwd_hooks=[("blocks.2.hook_resid_post", patch)])

    return Case(
        f"patch one position of a TransformerBridge: {patching.what}",
        "TransformerLens' run_with_hooks",
        ours,
        theirs,
        lambda: same(ours(), theirs(), 0.0, "logits"),
    )


BENCHMARKS = (
    Benchmark("hooks-inputs-last", inputs_last, "at most", 1.02),
    Benchmark("hooks-inputs-middle", inputs_middle, "at most", 1.02),
    Benchmark("hooks-activations", activations, "at most"),
    Benchmark("hooks-by-hand", by_hand, "at most"),
    Benchmark("hooks-pyvene", pyvene_large),
    Benchmark("hooks-tiny", tiny, "at most"),
    Benchmark("hooks-tiny-pyvene", pyvene_tiny),
    Benchmark("hooks-transformer-lens", transformer_lens, "at most"),
)
