"""Speed of swapping many features, given in the forms that each library accepts."""

from __future__ import annotations

from collections.abc import Callable

import featurizers
import torch
from featurizers.features import Indices
from peers import pyvene
from timing import Benchmark, Case, Settings, same
from torch import Tensor

BATCH = 32


def _case(settings: Settings, form: Callable[[Tensor], Indices], named: str, *, use_fast: bool = False) -> Case:
    """Compare a swap of half of the features; ``form`` converts the sorted indices to the argument of `interchange`."""
    n_features = settings.size(16384, 256)
    chosen = torch.randperm(n_features, generator=torch.Generator().manual_seed(0))[: n_features // 2]
    chosen = chosen.sort().values.to(settings.device)
    indices = form(chosen)
    rows = [chosen.tolist()] * BATCH
    # (batch, one position, features), as both libraries pass the activations of one token
    base, source = (settings.randn(BATCH, 1, n_features, seed=seed) for seed in range(2))
    featurizer = featurizers.create("identity", d_in=n_features)
    intervention = pyvene().VanillaIntervention(embed_dim=n_features, use_fast=use_fast).to(settings.device)

    def ours() -> Tensor:
        return featurizer.interchange(base, source, indices)

    scratch = base.clone()

    def theirs() -> Tensor:
        return intervention(scratch, source, subspaces=rows)  # in place; repeating it changes nothing

    return Case(
        f"swap {n_features // 2} of {n_features} features of {BATCH} examples, {named}",
        f"pyvene's VanillaIntervention, lists of indices{', use_fast=True' if use_fast else ''}",
        ours,
        theirs,
        lambda: same(ours(), theirs(), 0.0, "activations"),
    )


def mask(settings: Settings) -> Case:
    """Give the features as a boolean mask."""
    n_features = settings.size(16384, 256)

    def form(chosen: Tensor) -> Tensor:
        return torch.zeros(n_features, dtype=torch.bool, device=chosen.device).index_fill(0, chosen, True)

    return _case(settings, form, "boolean mask")


def tensor(settings: Settings) -> Case:
    """Give the features as a tensor of indices."""
    return _case(settings, lambda chosen: chosen, "tensor of indices")


def lists(settings: Settings) -> Case:
    """Give the features as pyvene takes them, a list of numbers for each example."""
    return _case(settings, lambda chosen: [chosen.tolist()] * BATCH, "the peer's lists")


def trusted(settings: Settings) -> Case:
    """Tell the peer that all examples have the same list, so that it does not compare them."""
    return _case(settings, lambda chosen: chosen, "tensor of indices", use_fast=True)


BENCHMARKS = (
    Benchmark("swap-mask", mask, required=50),
    Benchmark("swap-index", tensor, required=50),
    Benchmark("swap-lists", lists),
    Benchmark("swap-use-fast", trusted),
)
