"""Tiny decoders of many architectures, whose random biases and gains all matter, so that no test passes by default."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

VOCABULARY, LAYERS, WIDTH, HEADS = 48, 3, 32, 4

_BASE: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 40,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_ONE_KV = {key: value for key, value in _BASE.items() if key != "num_key_value_heads"}
_GPT2 = {"n_layer": LAYERS, "n_embd": WIDTH, "n_head": HEADS, "n_inner": 40, "n_positions": 64}
_OPT = {
    "hidden_size": WIDTH,
    "ffn_dim": 40,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 64,
    "word_embed_proj_dim": WIDTH,
    "activation_function": "gelu",
}
_ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]
_GEMMA = {**_BASE, "head_dim": 10, "sliding_window": 4, "layer_types": _ALTERNATING}
_GRANITE = {"residual_multiplier": 0.4, "embedding_multiplier": 3.0, "logits_scaling": 2.5, "attention_multiplier": 0.3}

_DECODERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", _GPT2),
    "gpt2_inverse": ("GPT2Config", "GPT2LMHeadModel", {**_GPT2, "scale_attn_by_inverse_layer_idx": True}),
    "llama": ("LlamaConfig", "LlamaForCausalLM", {**_BASE, "attention_bias": True, "mlp_bias": True}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {**_BASE, "sliding_window": 3}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", _BASE),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**_BASE, "head_dim": 10, "attention_bias": True}),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", {**_ONE_KV, "use_parallel_residual": True}),
    "gpt_neox_sequential": ("GPTNeoXConfig", "GPTNeoXForCausalLM", {**_ONE_KV, "use_parallel_residual": False}),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", {**_BASE, "head_dim": 10, "attention_bias": True}),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", {**_GEMMA, "attention_bias": True, "attn_implementation": "eager"}),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", {**_GEMMA, "attention_bias": True}),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", {**_BASE, "attention_bias": True}),
    "olmo2_biased": ("Olmo2Config", "Olmo2ForCausalLM", {**_BASE, "attention_bias": True}),
    "phi": ("PhiConfig", "PhiForCausalLM", {**_ONE_KV, "partial_rotary_factor": 0.5}),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", _BASE),
    "opt": ("OPTConfig", "OPTForCausalLM", _OPT),
    "stablelm": ("StableLmConfig", "StableLmForCausalLM", {**_BASE, "use_qkv_bias": True}),
    "stablelm_parallel": ("StableLmConfig", "StableLmForCausalLM", {**_BASE, "use_parallel_residual": True}),
    "gptj": ("GPTJConfig", "GPTJForCausalLM", {**_GPT2, "rotary_dim": 4}),
    "cohere": ("CohereConfig", "CohereForCausalLM", {**_BASE, "attention_bias": True}),
    "smollm3": ("SmolLM3Config", "SmolLM3ForCausalLM", {**_BASE, "attention_bias": True, "mlp_bias": True}),
    "granite": ("GraniteConfig", "GraniteForCausalLM", {**_BASE, "attention_bias": True, "mlp_bias": True, **_GRANITE}),
}

DECODERS = tuple(_DECODERS)
PARALLEL = ("gpt_neox", "phi", "stablelm_parallel", "gptj", "cohere")
POST_NORM = ("gemma2", "gemma3", "olmo2", "olmo2_biased")


def decoder(name: str, dtype: torch.dtype = torch.float32, **overrides: Any) -> Any:
    """Build a decoder in evaluation mode, whose parameters require gradients."""
    config_name, model_name, options = _DECODERS[name]
    special = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    config = getattr(transformers, config_name)(
        **{"vocab_size": VOCABULARY, "tie_word_embeddings": False, **special, **options, **overrides}
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = getattr(transformers, model_name)(config).eval()
        if name == "olmo2_biased":  # no architecture of transformers has post-norms with biases
            for block in model.model.layers:
                block.post_attention_layernorm = nn.LayerNorm(WIDTH)
                block.post_feedforward_layernorm = nn.LayerNorm(WIDTH)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn_like(parameter)
                # vectors are gains around 1 (around 0 in Gemma) and biases around 0
                parameter.copy_(noise * 0.3 if parameter.dim() > 1 else parameter + noise * 0.4)
    return model.to(dtype)


def without_its_softcap(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a Gemma 2 in float64 whose attention is sdpa, which leaves out its softcap, as in some releases."""
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def without(*args: Any, softcap: float | None = None, **named: Any) -> Any:
        return sdpa(*args, **named)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", without)
    model = decoder("gemma2", torch.float64, attn_logit_softcapping=0.5)
    capped = model(tokens()[None]).logits
    monkeypatch.setattr(model.config, "_attn_implementation_internal", "sdpa")
    assert not torch.allclose(model(tokens()[None]).logits, capped, atol=1e-3)
    return model


@functools.cache
def shared_decoder(name: str) -> nn.Module:
    """Return a decoder in float64, for close comparisons. Each call returns the same object, so do not change it."""
    return decoder(name, torch.float64)


def tokens(length: int = 7, seed: int = 0) -> torch.Tensor:
    """Return random token ids."""
    return torch.randint(1, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed))
