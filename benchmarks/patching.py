"""Activation patching of a whole grid: `featurizers.patch` beside one run for each cell, and beside batches."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import featurizers
import torch
from models import gpt2, prompts
from timing import Benchmark, Case, Settings, Skipped, same
from torch import Tensor

ANSWER, COUNTER = 7, 9


@dataclass(frozen=True)
class Grid:
    """A model, a pair of prompts and the sites of a grid.

    Attributes:
        model: a decoder.
        base: token ids, ``(1, tokens)``.
        source: token ids, ``(1, tokens)``.
        sites: rows of the grid.
        featurizer: to patch through; None for the whole activations.
        indices: features to patch.
        what: description for the table.
    """

    model: Any
    base: Tensor
    source: Tensor
    sites: Sequence[str]
    featurizer: featurizers.Featurizer[Any] | None
    indices: Any
    what: str

    @property
    def length(self) -> int:
        """Number of tokens."""
        return self.base.shape[1]

    def packed(self) -> Tensor:
        """Return the logit differences ``(sites, tokens)``."""
        grid = featurizers.patch(
            self.model,
            self.base,
            self.source,
            self.sites,
            featurizer=self.featurizer,
            indices=self.indices,
            metric=("logit_difference", ANSWER, COUNTER),
            normalize=False,
        )
        return grid.raw[0, :, 0]

    @torch.no_grad()
    def forward(self) -> Tensor:
        """Run the base once."""
        logits: Tensor = self.model(self.base, use_cache=False).logits
        return logits

    @torch.no_grad()
    def hooks(self) -> Tensor:
        """Return the same by one run with a plain hook for each cell."""
        anatomy = featurizers.Anatomy(self.model)
        places = [anatomy.place(site) for site in self.sites]
        kept: dict[int, Tensor] = {}
        handles = [
            place.module.register_forward_pre_hook(functools.partial(_keep, kept, number), with_kwargs=True)
            for number, place in enumerate(places)
        ]
        self.model(self.source, use_cache=False)
        for handle in handles:
            handle.remove()
        found = torch.empty(len(places), self.length)
        for number, place in enumerate(places):
            for token in range(self.length):
                change = functools.partial(_put, kept[number], token)
                handle = place.module.register_forward_pre_hook(change, with_kwargs=True)
                found[number, token] = _difference(self.forward())[0]
                handle.remove()
        return found

    @torch.no_grad()
    def batches(self) -> Tensor:
        """Return the same by `featurizers.intervene`, one run of a batch with a prompt for each position of a site."""
        f = self.featurizer or featurizers.create("identity")
        activations = featurizers.collect(self.model, {"input_ids": self.source}, self.sites)
        rows = self.base.expand(self.length, -1)
        positions = [[token] for token in range(self.length)]
        found = []
        for site in self.sites:
            source = activations[site][0].unsqueeze(1)
            swap = featurizers.Interchange(f, source=source, positions=positions, indices=self.indices)
            with featurizers.intervene(self.model, {site: swap}):
                found.append(_difference(self.model(rows, use_cache=False).logits))
        return torch.stack(found)


def _keep(kept: dict[int, Tensor], number: int, _: Any, args: Any, kwargs: Any) -> None:
    kept[number] = (args[0] if args else kwargs["hidden_states"]).clone()


def _put(values: Tensor, token: int, _: Any, args: Any, kwargs: Any) -> Any:
    hidden = args[0].clone()
    hidden[:, token] = values[:, token]
    return (hidden, *args[1:]), kwargs


def _difference(logits: Tensor) -> Tensor:
    return logits[:, -1, ANSWER] - logits[:, -1, COUNTER]


def _gpt2(settings: Settings, featurizer: Any = None, indices: Any = None, through: str = "") -> Grid:
    layers, width = settings.size(12, 2), settings.size(768, 32)
    length, vocabulary = settings.size(16, 6), settings.size(50257, 100)
    model = gpt2(settings, layers=layers, width=width, vocabulary=vocabulary, length=length).requires_grad_(False)
    base, source = (prompts(settings, 1, length, vocabulary, seed) for seed in range(2))
    sites = [f"resid.pre:{layer}" for layer in range(layers)]
    what = f"patch resid.pre{through}, {layers} layers × {length} tokens, d={width}"
    return Grid(model, base, source, sites, featurizer, indices, what)


def _llama(settings: Settings) -> Grid:
    """Return a grid of the heads of some layers of a decoder with the sizes of SmolLM2-135M."""
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        raise Skipped(f"transformers cannot be imported: {error}") from error
    layers, length = settings.size(30, 4), settings.size(8, 5)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=settings.size(576, 36),
        intermediate_size=settings.size(1536, 48),
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=settings.size(49152, 100),
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False).to(settings.device, settings.dtype)
    base, source = (prompts(settings, 1, length, settings.size(49152, 100), seed) for seed in range(2))
    chosen = range(0, layers, settings.size(6, 2))
    sites = [f"attn.z:{layer}:{head}" for layer in chosen for head in range(9)]
    what = f"patch the heads of {len(chosen)} of {layers} layers × {length} tokens, sizes of SmolLM2-135M"
    return Grid(model, base, source, sites, None, None, what)


def _against(grid: Grid, peer: str, theirs: Callable[[], Tensor]) -> Case:
    def check() -> str:
        return same(grid.packed().float().cpu(), theirs().float().cpu(), 1e-4, "logit differences")

    return Case(grid.what, peer, grid.packed, theirs, check)


def hooks(settings: Settings) -> Case:
    """Compare with one run for each cell."""
    grid = _gpt2(settings)
    return _against(grid, "one run with a torch hook for each cell", grid.hooks)


def batches(settings: Settings) -> Case:
    """Compare with batches of positions."""
    grid = _gpt2(settings)
    return _against(grid, "`intervene`, the positions of a layer as a batch", grid.batches)


def forwards(settings: Settings) -> Case:
    """Compare with one forward pass: the ratio is the cost of the grid in forward passes."""
    grid = _gpt2(settings)
    return Case(grid.what, "one forward pass", grid.packed, grid.forward, _against(grid, "", grid.batches).check)


def subspace(settings: Settings) -> Case:
    """Patch through a subspace."""
    width, k = settings.size(768, 32), settings.size(64, 8)
    f = featurizers.create("subspace", d_in=width, n_features=k, seed=0).to(settings.device)
    grid = _gpt2(settings, f, None, f" through a {k}-dimensional subspace")
    return _against(grid, "`intervene`, the positions of a layer as a batch", grid.batches)


def features(settings: Settings) -> Case:
    """Patch some features of a dictionary."""
    width, n, k = settings.size(768, 32), settings.size(16384, 64), settings.size(32, 4)
    f = featurizers.DictionaryFeaturizer.from_tensors(
        W_enc=settings.randn(n, width, seed=1) / width**0.5,
        W_dec=settings.randn(n, width, seed=2) / width**0.5,
        b_enc=settings.randn(n, seed=3) / 10,
        b_dec=settings.randn(width, seed=4) / 10,
        rule="relu",
    )
    grid = _gpt2(settings, f, list(range(0, n, n // k))[:k], f", {k} of {n} features")
    return _against(grid, "`intervene`, the positions of a layer as a batch", grid.batches)


def heads(settings: Settings) -> Case:
    """Patch heads × positions."""
    grid = _llama(settings)
    return _against(grid, "`intervene`, the positions of a head as a batch", grid.batches)


BENCHMARKS = (
    Benchmark("patching-hooks", hooks),
    Benchmark("patching-batches", batches),
    Benchmark("patching-forwards", forwards, "at most"),
    Benchmark("patching-subspace", subspace),
    Benchmark("patching-features", features),
    Benchmark("patching-heads", heads),
)
