"""Models with transcoders, for tests of attribution graphs; and golden graphs of circuit-tracer."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from featurizers import SiteMap
from featurizers_transcoder import CrossLayerTranscoder, Transcoder
from safetensors import safe_open
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

FOLDER = Path(__file__).parents[1] / "fixtures/attribution-graphs"
CASES = sorted(path.stem for path in FOLDER.glob("*.safetensors"))
PROMPT = [1, 5, 9, 14, 22, 31, 47, 60]
SMALL: dict[str, Any] = {
    "num_hidden_layers": 3, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 100, "max_position_embeddings": 64, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
NARROW = {**SMALL, "head_dim": 8}
NEOX = {key: value for key, value in SMALL.items() if key != "num_key_value_heads"}
GPT: dict[str, Any] = {
    "n_layer": 3, "n_embd": 32, "n_head": 4, "vocab_size": 100, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def made(name: str, config: str, **settings: Any) -> Callable[[], Any]:
    """Return a function that makes a model."""
    return lambda: getattr(transformers, name)(getattr(transformers, config)(**settings))


MODELS: dict[str, Callable[[], Any]] = {
    "gpt2": made("GPT2LMHeadModel", "GPT2Config", **GPT),
    "llama": made("LlamaForCausalLM", "LlamaConfig", **SMALL),
    "gemma2": made("Gemma2ForCausalLM", "Gemma2Config", **NARROW, attn_implementation="eager"),
    "gemma3": made("Gemma3ForCausalLM", "Gemma3TextConfig", **NARROW),
    "qwen3": made("Qwen3ForCausalLM", "Qwen3Config", **NARROW),
    "olmo2": made("Olmo2ForCausalLM", "Olmo2Config", **SMALL),
    "mistral": made("MistralForCausalLM", "MistralConfig", **SMALL, sliding_window=4),
    "phi3": made("Phi3ForCausalLM", "Phi3Config", **SMALL),
    "granite": made("GraniteForCausalLM", "GraniteConfig", **SMALL, residual_multiplier=0.4, logits_scaling=2.0),
    "neox": made("GPTNeoXForCausalLM", "GPTNeoXConfig", **NEOX, use_parallel_residual=False),
    "neox-parallel": made("GPTNeoXForCausalLM", "GPTNeoXConfig", **NEOX),
    "gptj-parallel": made("GPTJForCausalLM", "GPTJConfig", **GPT, rotary_dim=4),
    "cohere-parallel": made("CohereForCausalLM", "CohereConfig", **SMALL),
    "starcoder2": made("Starcoder2ForCausalLM", "Starcoder2Config", **SMALL),
}


def at(site: str, layer: int) -> str:
    """Return the site of a kind, or of a module whose path has ``{}`` for the layer."""
    return site.format(layer) if "{}" in site else f"{site}:{layer}"


def per_layer(
    W_enc: Tensor,
    W_dec: Tensor,
    b_enc: Tensor,
    b_dec: Tensor,
    W_skip: Tensor | None = None,
    reads: str = "mlp.in",
    writes: str = "mlp.out",
) -> list[SiteMap[Any]]:
    """Return a transcoder for each layer of stacked weights."""
    maps: list[SiteMap[Any]] = []
    for layer in range(len(W_enc)):
        skip = None if W_skip is None else W_skip[layer]
        f = Transcoder.from_weights(W_enc[layer], W_dec[layer], b_enc[layer], b_dec[layer], skip)
        f.reads, f.writes = {"in": at(reads, layer)}, {"out": at(writes, layer)}
        maps.append(f)
    return maps


def cross_layer(
    W_enc: Any, W_dec: Any, b_enc: Any, b_dec: Any, reads: str = "mlp.in", writes: str = "mlp.out", W_skip: Any = None
) -> CrossLayerTranscoder:
    """Return a cross-layer transcoder; ``W_dec[l]`` is ``(n, layers - l, d)``."""
    layers, d = len(W_enc), W_enc[0].shape[1]
    names = [f"out-{layer}" for layer in range(layers)]
    config = {
        "reads": {f"in-{layer}": {"width": d} for layer in range(layers)},
        "writes": dict.fromkeys(names, d),
        "groups": {
            f"layer-{layer}": {"reads": [f"in-{layer}"], "writes": names[layer:], "n_features": len(W_enc[layer])}
            for layer in range(layers)
        },
        "skips": {} if W_skip is None else {f"out-{layer}": [f"in-{layer}"] for layer in range(layers)},
    }
    tensors: dict[str, Tensor] = {}
    for layer in range(layers):
        tensors |= {f"W_enc.layer-{layer}.in-{layer}": W_enc[layer], f"b_enc.layer-{layer}": b_enc[layer]}
        tensors |= {
            f"W_dec.layer-{layer}.out-{to}": W_dec[layer][:, to - layer].contiguous() for to in range(layer, layers)
        }
        tensors[f"b_dec.out-{layer}"] = b_dec[layer]
        if W_skip is not None:
            tensors[f"W_skip.out-{layer}.in-{layer}"] = W_skip[layer]
    f = CrossLayerTranscoder.from_tensors(config, tensors)
    f.reads = {f"in-{layer}": at(reads, layer) for layer in range(layers)}
    f.writes = {f"out-{layer}": at(writes, layer) for layer in range(layers)}
    return f


def random_transcoders(
    layers: int, d: int, n: int, seed: int = 0, reads: str = "mlp.in", writes: str = "mlp.out", bias: float = 0.3
) -> list[SiteMap[Any]]:
    """Return a random transcoder for each layer."""
    normal = _normal(seed)
    b_enc = normal(layers, n) - bias
    return per_layer(normal(layers, n, d), normal(layers, n, d), b_enc, normal(layers, d), reads=reads, writes=writes)


def random_cross_layer(
    layers: int, d: int, n: int, seed: int = 0, reads: str = "mlp.in", writes: str = "mlp.out", skip: bool = False
) -> CrossLayerTranscoder:
    """Return a random cross-layer transcoder."""
    normal = _normal(seed)
    W_enc, W_dec = normal(layers, n, d), [normal(n, layers - layer, d) for layer in range(layers)]
    skips = normal(layers, d, d) if skip else None
    return cross_layer(W_enc, W_dec, normal(layers, n) - 0.3, normal(layers, d), reads, writes, skips)


def _normal(seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=generator) / 6


def own_mlps(model: GPT2LMHeadModel) -> list[SiteMap[Any]]:
    """Return the MLPs of a GPT-2 with ReLU as transcoders, which leave nothing out."""
    blocks = [block.mlp for block in model.transformer.h]
    parts = zip(*((m.c_fc.weight.T, m.c_proj.weight, m.c_fc.bias, m.c_proj.bias) for m in blocks), strict=True)
    W_enc, W_dec, b_enc, b_dec = (torch.stack([part.detach() for part in each]) for each in parts)
    return per_layer(W_enc, W_dec, b_enc, b_dec)


def shaken(model: Any, seed: int = 0) -> Any:
    """Return a model with large weights and with biases and gains that are not trivial, in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = parameter.data * 4 if parameter.dim() > 1 else parameter.data + 0.2 * noise
    return model.eval().requires_grad_(False)


def relu_gpt2(layers: int = 3, d: int = 32, vocabulary: int = 100) -> GPT2LMHeadModel:
    """Return a random GPT-2 with ReLU."""
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=layers,
        n_embd=d,
        n_head=4,
        vocab_size=vocabulary,
        n_positions=128,
        activation_function="relu",
        bos_token_id=1,
        eos_token_id=2,
    )
    return shaken(GPT2LMHeadModel(config))  # type: ignore[no-any-return]


def llama(layers: int = 3, d: int = 32, vocabulary: int = 100) -> LlamaForCausalLM:
    """Return a random Llama with grouped queries."""
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=d,
        intermediate_size=2 * d,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=vocabulary,
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=2,
    )
    return shaken(LlamaForCausalLM(config))  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Golden:
    """A model, its maps, and the graph that circuit-tracer makes of them."""

    model: Any
    maps: Any
    tensors: dict[str, Tensor]
    thresholds: list[tuple[float, float]]


def golden(name: str) -> Golden:
    """Read a golden graph; ``tests/fixtures/attribution-graphs/make.py`` wrote it."""
    with safe_open(FOLDER / f"{name}.safetensors", "pt") as file:
        tensors, about = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    settings = json.loads(about["config"])
    model: Any = (
        GPT2LMHeadModel(GPT2Config(**settings))
        if about["family"] == "gpt2"
        else LlamaForCausalLM(LlamaConfig(**settings))
    )
    weights = {key.removeprefix("model."): value for key, value in tensors.items() if key.startswith("model.")}
    model.load_state_dict(weights, strict=False)
    parts = {key.removeprefix("maps."): value for key, value in tensors.items() if key.startswith("maps.")}
    if about["kind"] == "clt":
        decoders = [parts[f"W_dec.{layer}"] for layer in range(len(parts["W_enc"]))]
        maps: Any = cross_layer(parts["W_enc"], decoders, parts["b_enc"], parts["b_dec"], about["reads"])
    else:
        maps = per_layer(**parts, reads=about["reads"])
    return Golden(model.eval().requires_grad_(False), maps, tensors, json.loads(about["thresholds"]))
