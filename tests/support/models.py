"""Tiny random decoders, the paths of their modules (written by hand), and plain torch hooks to compare with."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor, nn

LAYERS, WIDTH, HEADS, KV_HEADS, MLP_WIDTH, VOCABULARY = 3, 32, 4, 2, 48, 64

_MODERN = {
    "hidden_size": WIDTH,
    "intermediate_size": MLP_WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": 64,
}
_NEOX = {**_MODERN, "rotary_pct": 0.5}
del _NEOX["num_key_value_heads"]

# Class names in transformers, and options of the config. Sliding windows are shorter than the prompts of the tests.
_MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": (
        "GPT2Config",
        "GPT2LMHeadModel",
        {"n_layer": LAYERS, "n_embd": WIDTH, "n_head": HEADS, "n_inner": MLP_WIDTH, "n_positions": 64},
    ),
    "gpt_neo": (
        "GPTNeoConfig",
        "GPTNeoForCausalLM",
        {
            "num_layers": LAYERS,
            "hidden_size": WIDTH,
            "num_heads": HEADS,
            "intermediate_size": MLP_WIDTH,
            "attention_types": [[["global", "local", "global"], 1]],
            "window_size": 4,
            "max_position_embeddings": 64,
        },
    ),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", {**_NEOX, "use_parallel_residual": True}),
    "gpt_neox_sequential": ("GPTNeoXConfig", "GPTNeoXForCausalLM", {**_NEOX, "use_parallel_residual": False}),
    "llama": ("LlamaConfig", "LlamaForCausalLM", _MODERN),
    "mistral": ("MistralConfig", "MistralForCausalLM", {**_MODERN, "sliding_window": 4}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", _MODERN),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**_MODERN, "head_dim": 12}),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", {**_MODERN, "head_dim": 16, "sliding_window": 4}),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", {**_MODERN, "head_dim": 16, "sliding_window": 4}),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", _MODERN),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", _MODERN),
    "smollm3": ("SmolLM3Config", "SmolLM3ForCausalLM", _MODERN),
}

ARCHITECTURES = tuple(_MODELS)

HEAD_WIDTH = {**dict.fromkeys(ARCHITECTURES, 8), "qwen3": 12, "gemma2": 16, "gemma3": 16}
"""Width of an attention head, by architecture."""

_GPT2 = {
    "embed": ("transformer.wte", "output"),
    "resid.pre": ("transformer.h.{}", "input"),
    "resid.post": ("transformer.h.{}", "output"),
    "attn.out": ("transformer.h.{}.attn", "output"),
    "attn.z": ("transformer.h.{}.attn.c_proj", "input"),
    "mlp.out": ("transformer.h.{}.mlp", "output"),
    "mlp.act": ("transformer.h.{}.mlp.c_proj", "input"),
    "norm.out": ("transformer.ln_f", "output"),
}
_GPT_NEOX = {
    "embed": ("gpt_neox.embed_in", "output"),
    "resid.pre": ("gpt_neox.layers.{}", "input"),
    "resid.post": ("gpt_neox.layers.{}", "output"),
    "attn.out": ("gpt_neox.layers.{}.attention", "output"),
    "attn.z": ("gpt_neox.layers.{}.attention.dense", "input"),
    "mlp.out": ("gpt_neox.layers.{}.mlp", "output"),
    "mlp.act": ("gpt_neox.layers.{}.mlp.dense_4h_to_h", "input"),
    "norm.out": ("gpt_neox.final_layer_norm", "output"),
}
_LLAMA = {
    "embed": ("model.embed_tokens", "output"),
    "resid.pre": ("model.layers.{}", "input"),
    "resid.post": ("model.layers.{}", "output"),
    "attn.out": ("model.layers.{}.self_attn", "output"),
    "attn.z": ("model.layers.{}.self_attn.o_proj", "input"),
    "mlp.out": ("model.layers.{}.mlp", "output"),
    "mlp.act": ("model.layers.{}.mlp.down_proj", "input"),
    "norm.out": ("model.norm", "output"),
}

MODULES: dict[str, dict[str, tuple[str, str]]] = {
    **dict.fromkeys(ARCHITECTURES, _LLAMA),
    "gpt2": _GPT2,
    "gpt_neo": {**_GPT2, "attn.z": ("transformer.h.{}.attn.attention.out_proj", "input")},
    "gpt_neox": _GPT_NEOX,
    "gpt_neox_sequential": _GPT_NEOX,
}
"""Module path ('{}' is the layer) and side of each kind of site, by architecture; written by hand."""


_HEAD_COLUMNS: dict[str, dict[str, tuple[str, int, int, int]]] = {
    "gpt2": {
        "attn.q": ("transformer.h.{}.attn.c_attn", HEADS, 0, 8),
        "attn.k": ("transformer.h.{}.attn.c_attn", HEADS, 32, 8),
        "attn.v": ("transformer.h.{}.attn.c_attn", HEADS, 64, 8),
    },
    "gpt_neox": {
        "attn.q": ("gpt_neox.layers.{}.attention.query_key_value", HEADS, 0, 24),
        "attn.k": ("gpt_neox.layers.{}.attention.query_key_value", HEADS, 8, 24),
        "attn.v": ("gpt_neox.layers.{}.attention.query_key_value", HEADS, 16, 24),
    },
    "phi3": {
        "attn.q": ("model.layers.{}.self_attn.qkv_proj", HEADS, 0, 8),
        "attn.k": ("model.layers.{}.self_attn.qkv_proj", KV_HEADS, 32, 8),
        "attn.v": ("model.layers.{}.self_attn.qkv_proj", KV_HEADS, 48, 8),
    },
}
"""Module, number of heads, first column of head 0, and step from head to head; written by hand."""
_HEAD_COLUMNS["gpt_neox_sequential"] = _HEAD_COLUMNS["gpt_neox"]


def head_columns(architecture: str, kind: str) -> tuple[str, list[list[int]]]:
    """Return the module that returns queries, keys or values ('{}' is the layer), and the columns of each head."""
    width = HEAD_WIDTH[architecture]
    if architecture in _HEAD_COLUMNS:
        path, heads, start, step = _HEAD_COLUMNS[architecture][kind]
    else:
        attention = "transformer.h.{}.attn.attention" if architecture == "gpt_neo" else "model.layers.{}.self_attn"
        heads = HEADS if kind == "attn.q" or architecture == "gpt_neo" else KV_HEADS
        path, start, step = f"{attention}.{kind[-1]}_proj", 0, width
    return path, [list(range(first := start + head * step, first + width)) for head in range(heads)]


def tiny_model(architecture: str, **overrides: Any) -> nn.Module:
    """Return a small random decoder in eval mode. Each call returns the same object, so do not change it.

    The weights are large enough for every part to matter. The model has no special tokens, so ``generate`` never stops
    early. The parameters require gradients, even if pyvene froze them in another test.
    """
    return _build(architecture, tuple(sorted(overrides.items()))).requires_grad_(True)


def fresh_model(architecture: str, **overrides: Any) -> nn.Module:
    """Return a new copy of the model of `tiny_model`, for tests that change it."""
    return _build.__wrapped__(architecture, tuple(sorted(overrides.items())))


@functools.cache
def _build(architecture: str, overrides: tuple[tuple[str, Any], ...]) -> nn.Module:
    config_name, model_name, options = _MODELS[architecture]
    special = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    options = {"vocab_size": VOCABULARY, "tie_word_embeddings": False, **special, **options, **dict(overrides)}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, model_name)(getattr(transformers, config_name)(**options)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn_like(parameter)
                parameter.copy_(noise * 0.25 if parameter.dim() > 1 else parameter + noise * 0.1)
    return model


def save_language_model(model: nn.Module, folder: Any) -> Any:
    """Write a model to a folder with a tokenizer of the words ``w0`` to ``w63``; return the folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    return folder


def prompts(*shape: int, seed: int = 0) -> Tensor:
    """Return random token ids of a shape."""
    return torch.randint(1, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def module_of(model: nn.Module, architecture: str, kind: str, layer: int = 0) -> tuple[nn.Module, str]:
    """Return the module of a kind of site and its side, from `MODULES`."""
    path, side = MODULES[architecture][kind]
    return model.get_submodule(path.format(layer)), side


@contextmanager
def hooked(module: nn.Module, side: str, edit: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Apply ``edit`` to the input or output of a module with a plain torch hook."""

    def on_input(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (edit(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": edit(kwargs["hidden_states"])}

    def on_output(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return (edit(output[0]), *output[1:]) if isinstance(output, tuple) else edit(output)

    if side == "input":
        handle = module.register_forward_pre_hook(on_input, with_kwargs=True)
    else:
        handle = module.register_forward_hook(on_output)
    try:
        yield
    finally:
        handle.remove()


def read(model: nn.Module, module: nn.Module, side: str, **inputs: Any) -> Tensor:
    """Run a model and return a copy of the input or output of a module, taken by a plain torch hook."""
    seen: list[Tensor] = []

    def copy(hidden: Tensor) -> Tensor:
        seen.append(hidden.detach().clone())
        return hidden

    with torch.no_grad(), hooked(module, side, copy):
        model(**inputs)
    return seen[-1]


def hooks_of(model: nn.Module) -> list[tuple[str, str, list[int]]]:
    """Return the ids of all hooks on all modules, to compare before and after."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [
        (name, kind, list(getattr(module, kind)))
        for name, module in model.named_modules()
        for kind in kinds
        if getattr(module, kind)
    ]
