"""Decoders for patching, and their cells run one at a time with plain torch hooks."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import transformers
from featurizers import Anatomy, Site
from featurizers.errors import SiteError
from featurizers_patching.engine.cells import Cells
from featurizers_patching.engine.clean import Prompts
from featurizers_patching.engine.reading import Read
from featurizers_patching.engine.sweep import Report, Sweep
from torch import Tensor, nn

from tests.support.decoders import DECODERS, PARALLEL, decoder

KINDS = ("resid.pre", "resid.mid", "resid.post", "attn.z", "attn.out", "mlp.in", "mlp.act", "mlp.out")
_BASE: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LATENT = {
    **_EXPERTS,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "qk_nope_head_dim": 8,
    "n_shared_experts": 1,
}
_OTHERS: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen3Moe": {"head_dim": 8, "num_experts": 4, **_EXPERTS},
    "Olmo3": {"sliding_window": 3},
    "Starcoder2": {},
    "Cohere2": {"sliding_window": 3},
    "GptOss": {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 3},
    "DeepseekV3": _LATENT,
    "Nemotron": {},
    "Exaone4": {"sliding_window": 3, "sliding_window_pattern": 2},
}
ARCHITECTURES = (*DECODERS, *_OTHERS)


@functools.cache
def packable(name: str) -> nn.Module:
    """Return a tiny decoder in float64 (with experts: float32) whose cells run on packed rows; do not change it."""
    if name in DECODERS:
        return decoder(name, torch.float64).requires_grad_(False)
    config = getattr(transformers, f"{name}Config")(**{**_BASE, **_OTHERS[name]})
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = getattr(transformers, f"{name}ForCausalLM")(config).eval().requires_grad_(False)
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(noise * 0.3 if parameter.dim() > 1 else parameter + noise * 0.4)
    return model if "num_experts_per_tok" in _OTHERS[name] else model.double()


def has_interface(model: nn.Module) -> bool:
    """Return whether attention goes through `transformers`' interface; that of GPT-J did not in some releases."""
    attention = Anatomy(model).place("attn.out:0").module
    return hasattr(sys.modules[type(attention).__module__], "eager_attention_forward")


def sites_of(name: str, model: nn.Module) -> list[Site]:
    """Return all sites of a decoder, one head of each block among them."""
    anatomy, found = Anatomy(model), []
    names = [f"{kind}:{block}" for block in range(3) for kind in KINDS]
    for text in ["embed", *names, *(f"attn.z:{block}:1" for block in range(3)), "norm.out"]:
        site = Site.parse(text)
        if site.kind == "resid.mid" and (name in PARALLEL or name == "opt"):
            continue
        try:
            anatomy.place(site)
        except SiteError:
            continue
        found.append(site)
    return found


Change = Callable[[Tensor], Tensor]


@contextmanager
def plain_hook(model: nn.Module, site: Site | str, change: Change) -> Iterator[None]:
    """Change the activations ``(1, tokens, width)`` of a site by hooks of torch alone; not for ``resid.mid``."""
    place = Anatomy(model).place(site)
    columns = place.columns or slice(None)

    def changed(whole: Tensor) -> Tensor:
        whole = whole.clone()
        whole[..., columns] = change(whole[..., columns].clone())
        return whole

    def on_output(_: nn.Module, __: Any, output: Any) -> Any:
        return (changed(output[0]), *output[1:]) if isinstance(output, tuple) else changed(output)

    def on_input(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (changed(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": changed(kwargs["hidden_states"])}

    if place.side == "output":
        handle = place.module.register_forward_hook(on_output)
    else:
        handle = place.module.register_forward_pre_hook(on_input, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def activations(model: nn.Module, tokens: Sequence[int], site: Site | str) -> Tensor:
    """Return the activations ``(1, tokens, width)`` of a site, read by a plain hook."""
    found: list[Tensor] = []

    def keep(hidden: Tensor) -> Tensor:
        found.append(hidden.clone())
        return hidden

    with plain_hook(model, site, keep), torch.no_grad():
        model(torch.tensor([list(tokens)]), use_cache=False)
    return found[0]


def put(tokens: Sequence[int], values: Tensor) -> Change:
    """Return a change that puts values ``(1, all tokens, width)`` at some tokens."""

    def change(hidden: Tensor) -> Tensor:
        hidden[:, list(tokens)] = values[:, list(tokens)]
        return hidden

    return change


class Pairs:
    """Base and source prompts with their sites, whose swaps are run by the engine."""

    def __init__(self, model: nn.Module, base: list[list[int]], source: list[list[int]], sites: Sequence[Any]) -> None:
        self.model, self.base, self.source = model, base, source
        self.sites = [Site.parse(site) for site in sites]
        self.at = np.array([[len(prompt) - 1, len(prompt) - 3] for prompt in base])
        self.prompts = Prompts(base, self.at)
        self.read = Read(model, Prompts(source, self.at), self.sites)

    def run(self, cells: list[tuple[int, list[tuple[int, int]]]], *, rows: int = 1024, **options: Any) -> Any:
        """Run cells, each a pair and its edits as (site, token); return logits and the report."""
        flat = [(number, site, token) for number, (_, edits) in enumerate(cells) for site, token in edits]
        table = Cells.of([pair for pair, _ in cells], *zip(*flat, strict=True))
        row = table.pair[table.cell] * self.prompts.width + table.token

        def swap(site: int) -> Callable[[Tensor, Any], Tensor]:
            return lambda base, numbers: self.read.rows(site, torch.as_tensor(row[numbers]))

        edits = [swap(site) for site in range(len(self.sites))]
        found: dict[int, Tensor] = {}
        report = Report(batch_rows=rows)
        unknown = np.zeros(len(table.cell), dtype=bool)
        sweep = Sweep(self.model, self.prompts, table, unknown, self.sites, edits, **options)
        sweep.run(lambda numbers, logits, _: found.update(zip(numbers.tolist(), logits, strict=True)), report)
        return torch.stack([found[number] for number in range(len(cells))]), report

    def expected(self, pair: int, site: int, tokens: Sequence[int]) -> Tensor:
        """Return the logits ``(n, vocabulary)`` after a swap by plain hooks, at the tokens that are read."""
        values = activations(self.model, self.source[pair], self.sites[site])
        with plain_hook(self.model, self.sites[site], put(tokens, values)):
            return self.logits(pair)

    def logits(self, pair: int) -> Tensor:
        """Return the logits ``(n, vocabulary)`` of a base, at the tokens that are read."""
        with torch.no_grad():
            logits: Tensor = self.model(torch.tensor([self.base[pair]]), use_cache=False).logits
        return logits[0, self.at[pair]]


BASE, SOURCE = [5, 9, 3, 7, 11, 2], [5, 9, 14, 3, 9, 7]
SHORT, SHORT_SOURCE = [8, 1, 4, 6], [3, 12, 5, 1]
"""Two pairs of prompts."""


def logits_of(model: Any, tokens: list[int], token: int = -1) -> Tensor:
    """Return the logits of a model at one token of a prompt."""
    with torch.no_grad():
        return model(torch.tensor([tokens]), use_cache=False).logits[0, token]


def swapped(model: Any, base: list[int], source: list[int], site: Any, tokens: list[int], at: int = -1) -> Tensor:
    """Return the logits of the base with some tokens' activations of the source, put there by a plain hook."""
    with plain_hook(model, site, put(tokens, activations(model, source, site))):
        return logits_of(model, base, at)
