"""Activation patching of a whole grid: `featurizers.patch` beside one run for each cell, and beside batches.

A peer that runs each cell by itself does some of the cells only, evenly spread; all of them take as long as each other.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import featurizers
import torch
from models import gpt2, prompts
from patching_floor import Sizes as Work
from patching_floor import counted
from patching_peer import ANSWER, COUNTER, Peer
from timing import Benchmark, Case, Settings, Sizes, Skipped, same
from torch import Tensor

EVERY = 7
"""A peer runs each seventh cell."""


@dataclass(frozen=True)
class Grid:
    """A model, pairs of prompts and the cells of a grid.

    Attributes:
        model: a decoder.
        base: token ids, ``(pairs, tokens)``.
        source: token ids, ``(pairs, tokens)``.
        sites: rows of the grid.
        positions: columns of the grid.
        featurizer: to patch through; None for the whole activations.
        indices: features to patch.
        what: description for the table.
    """

    model: Any
    base: Tensor
    source: Tensor
    sites: Sequence[str]
    positions: Sequence[int]
    featurizer: featurizers.Featurizer[Any] | None
    indices: Any
    what: str

    @property
    def some(self) -> list[tuple[int, int]]:
        """Cells that a peer runs, as rows and columns."""
        every = [(row, column) for row in range(len(self.sites)) for column in range(len(self.positions))]
        return every[EVERY // 2 :: EVERY]

    @property
    def share(self) -> float:
        """Share of all cells that a peer runs."""
        return len(self.some) / (len(self.sites) * len(self.positions))

    def packed(self, **options: Any) -> Tensor:
        """Return the logit differences ``(sites, pairs, positions)``."""
        grid = featurizers.patch(
            self.model,
            self.base,
            self.source,
            self.sites,
            positions=list(self.positions),
            featurizer=self.featurizer,
            indices=self.indices,
            metric=("logit_difference", ANSWER, COUNTER),
            normalize=False,
            **options,
        )
        return grid.raw[0]

    def cells(self, grid: Tensor) -> Tensor:
        """Return the cells of a grid of one pair that a peer runs."""
        return torch.stack([grid[row, 0, column] for row, column in self.some])

    @torch.no_grad()
    def forward(self) -> Tensor:
        """Run the base once."""
        logits: Tensor = self.model(self.base, use_cache=False).logits
        return logits

    @torch.no_grad()
    def hooks(self) -> Tensor:
        """Return some cells by one run with a plain hook for each."""
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
        found = []
        for row, column in self.some:
            place, token = places[row], self.positions[column]
            change = functools.partial(self._put, kept[row], token, place.columns or slice(None))
            handle = place.module.register_forward_pre_hook(change, with_kwargs=True)
            found.append(_difference(self.forward())[0])
            handle.remove()
        return torch.stack(found)

    def _put(self, values: Tensor, token: int, columns: slice, _: Any, args: Any, kwargs: Any) -> Any:
        hidden = (args[0] if args else kwargs["hidden_states"]).clone()
        base, source = hidden[:, token : token + 1, columns], values[:, token : token + 1, columns]
        f = self.featurizer
        hidden[:, token : token + 1, columns] = source if f is None else f.interchange(base, source, self.indices)
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    @torch.no_grad()
    def batches(self, rows: Sequence[int]) -> Tensor:
        """Return some rows by `featurizers.intervene`, with a prompt of a batch for each position of a site."""
        f = self.featurizer or featurizers.create("identity")
        inputs = {"input_ids": self.base.expand(len(self.positions), -1)}
        found = []
        for row in rows:
            swap = featurizers.Interchange(
                f,
                source=featurizers.collect(self.model, {"input_ids": self.source}, [self.sites[row]])[self.sites[row]][
                    0, list(self.positions)
                ].unsqueeze(1),
                positions=[[token] for token in self.positions],
                indices=self.indices,
            )
            with featurizers.intervene(self.model, {self.sites[row]: swap}):
                found.append(_difference(self.model(**inputs, use_cache=False).logits))
        return torch.stack(found)

    @torch.no_grad()
    def pairs(self, rows: Sequence[int], activations: dict[str, Tensor]) -> Tensor:
        """Return some rows of the last position by one batch of all pairs through `featurizers.intervene`."""
        f = featurizers.create("identity")
        found = []
        for row in rows:
            site = self.sites[row]
            swap = featurizers.Interchange(f, source=activations[site][:, -1:], positions=[-1])
            with featurizers.intervene(self.model, {site: swap}):
                found.append(_difference(self.model(self.base, use_cache=False, logits_to_keep=1).logits))
        return torch.stack(found)


def _keep(kept: dict[int, Tensor], number: int, _: Any, args: Any, kwargs: Any) -> None:
    kept[number] = (args[0] if args else kwargs["hidden_states"]).clone()


def _difference(logits: Tensor) -> Tensor:
    return logits[:, -1, ANSWER] - logits[:, -1, COUNTER]


def _sizes(settings: Settings, length: int) -> dict[str, int]:
    return {
        "layers": settings.size(12, 2),
        "width": settings.size(768, 32),
        "vocabulary": settings.size(50257, 100),
        "length": length,
    }


@functools.lru_cache(maxsize=1)
def _model(settings: Settings) -> Any:
    return gpt2(settings, **_sizes(settings, 64)).requires_grad_(False)


def _gpt2(settings: Settings, featurizer: Any = None, indices: Any = None, through: str = "") -> Grid:
    sizes = _sizes(settings, settings.size(16, 6))
    base, source = (prompts(settings, 1, sizes["length"], sizes["vocabulary"], seed) for seed in range(2))
    sites = [f"resid.pre:{layer}" for layer in range(sizes["layers"])]
    what = f"patch resid.pre{through}, {sizes['layers']} layers × {sizes['length']} tokens, d={sizes['width']}"
    return Grid(_model(settings), base, source, sites, range(sizes["length"]), featurizer, indices, what)


def _llama(settings: Settings) -> Grid:
    """Return a grid of some heads and positions of a decoder with the sizes of SmolLM2-135M."""
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        raise Skipped(f"transformers cannot be imported: {error}") from error
    layers, length, vocabulary = settings.size(30, 4), settings.size(64, 8), settings.size(49152, 100)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=settings.size(576, 36),
        intermediate_size=settings.size(1536, 48),
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=vocabulary,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False).to(settings.device, settings.dtype)
    base, source = (prompts(settings, 1, length, vocabulary, seed) for seed in range(2))
    chosen, heads = range(layers // 6, layers, layers // 3 or 1), range(0, 9, 3)
    sites = [f"attn.z:{layer}:{head}" for layer in chosen for head in heads]
    positions = range(3, length, settings.size(8, 4))
    what = (
        f"patch {len(heads)} heads in {len(chosen)} of {layers} layers × {len(positions)} of {length} tokens, sizes of "
        "SmolLM2-135M"
    )
    return Grid(model, base, source, sites, positions, None, None, what)


def _case(
    grid: Grid, peer: str, theirs: Callable[[], Any], expected: Callable[[Any, Tensor], str], share: float
) -> Case:
    """Return a case whose timed results are compared; it has no warm-up."""
    found: dict[str, Any] = {}

    def ours() -> None:
        found["ours"] = grid.packed().float().cpu()

    def other() -> Any:
        found["theirs"] = theirs()
        return found["theirs"]

    return Case(grid.what, peer, ours, other, str, lambda: expected(found["theirs"], found["ours"]), share)


def _by_cells(grid: Grid) -> Case:
    def check(theirs: Tensor, ours: Tensor) -> str:
        return same(grid.cells(ours), theirs.float().cpu(), 1e-4, "logit differences")

    return _case(grid, "one run with a torch hook for each cell", grid.hooks, check, grid.share)


def hooks(settings: Settings) -> Case:
    """Compare with one run for each cell."""
    return _by_cells(_gpt2(settings))


def transformer_lens(settings: Settings) -> Case:
    """Compare with TransformerLens, which runs each cell."""
    if settings.device.type != "cpu":
        raise Skipped("TransformerLens is compared on the CPU")
    grid = _gpt2(settings)
    peer = Peer(_sizes(settings, 64) | {"prompt": grid.base.shape[1]}, grid.some)

    def check(_: Any, ours: Tensor) -> str:
        peer.close()
        return same(grid.cells(ours), torch.tensor(peer.found), 1e-3, "logit differences")

    return _case(grid, "`get_act_patch_resid_pre` of TransformerLens 4.3", peer, check, grid.share)


def batches(settings: Settings) -> Case:
    """Compare with batches of positions."""
    grid = _gpt2(settings)
    rows = range(1, len(grid.sites), 4)

    def check(theirs: Tensor, ours: Tensor) -> str:
        return same(ours[list(rows), 0], theirs.float().cpu(), 1e-4, "logit differences")

    name = "`intervene`, the positions of a layer as a batch"
    return _case(grid, name, lambda: grid.batches(rows), check, len(rows) / len(grid.sites))


def forwards(settings: Settings) -> Case:
    """Compare with one forward pass: the ratio is the cost of the grid in forward passes."""
    grid = _gpt2(settings)
    theirs = functools.partial(_repeat, grid.forward, 10)
    return _case(grid, "one forward pass of the base", theirs, lambda *_: "", 10)


def _repeat(call: Callable[[], Any], times: int) -> None:
    for _ in range(times):
        call()


def subspace(settings: Settings) -> Case:
    """Patch through a subspace."""
    width, k = settings.size(768, 32), settings.size(64, 8)
    f = featurizers.create("subspace", d_in=width, n_features=k, seed=0).to(settings.device)
    return _by_cells(_gpt2(settings, f, None, f" through a {k}-dimensional subspace"))


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
    return _by_cells(_gpt2(settings, f, list(range(0, n, n // k))[:k], f", {k} of {n} features"))


def heads(settings: Settings) -> Case:
    """Patch heads × positions."""
    return _by_cells(_llama(settings))


def pairs(settings: Settings) -> Case:
    """Patch the last position of many pairs in all layers."""
    sizes, count, length = _sizes(settings, 64), settings.size(100, 6), settings.size(12, 5)
    base, source = (prompts(settings, count, length, sizes["vocabulary"], seed) for seed in range(2))
    sites = [f"resid.pre:{layer}" for layer in range(sizes["layers"])]
    what = f"patch resid.pre, {sizes['layers']} layers, last of {length} tokens, {count} pairs, d={sizes['width']}"
    grid = Grid(_model(settings), base, source, sites, [-1], None, None, what)
    rows = range(len(sites) // 3, len(sites), max(1, len(sites) // 2))
    activations = featurizers.collect(grid.model, {"input_ids": source}, sites)
    by_site = {site: activations[site] for site in sites}

    def check(theirs: Tensor, ours: Tensor) -> str:
        return same(ours[list(rows), :, 0], theirs.float().cpu(), 1e-4, "logit differences")

    name = "`intervene`, the pairs as a batch for each layer, activations of the sources given"
    return _case(grid, name, lambda: grid.pairs(rows, by_site), check, len(rows) / len(sites))


def work(settings: Settings) -> Sizes:
    """Compare the FLOPs of a grid with the least that an engine can do."""
    grid = _gpt2(settings)
    sizes = _sizes(settings, 64)
    least, tokens = Work(sizes["layers"], sizes["width"], sizes["vocabulary"]), grid.base.shape[1]
    done = counted(lambda: grid.packed(verify=0))
    floor = least.floor(tokens, 2) + 2 * least.forward(tokens, 1)
    checked = "counted in products with weights, with the runs of base and source and without those that verify"
    return Sizes(f"FLOPs: {grid.what}", "the least, counted cell by cell", done, floor, checked, "FLOP")


BENCHMARKS = (
    Benchmark("patching-hooks", hooks, required=10),
    Benchmark("patching-transformer-lens", transformer_lens, required=10),
    Benchmark("patching-forwards", forwards, "at most", 20),
    Benchmark("patching-batches", batches),
    Benchmark("patching-subspace", subspace, required=8),
    Benchmark("patching-features", features, required=8),
    Benchmark("patching-heads", heads, required=5),
    Benchmark("patching-pairs", pairs, required=2),
    Benchmark("patching-work", work, "at most", 1.1),
)
