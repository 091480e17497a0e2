"""Small models of transformers, and the same models held by nnsight."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import nn

SIZE = {"vocab_size": 48, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0, "initializer_range": 0.2}
WIDE = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4}
CONFIGS: dict[str, Any] = {
    "gpt2": lambda: transformers.GPT2Config(n_layer=3, n_embd=32, n_head=4, **SIZE),
    "llama": lambda: transformers.LlamaConfig(num_key_value_heads=2, **WIDE, **SIZE),
    "gemma2": lambda: transformers.Gemma2Config(num_key_value_heads=2, head_dim=8, **WIDE, **SIZE),
}


def model_of(family: str) -> nn.Module:
    """Return a model of a family with random weights and perturbed norms."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[family](), attn_implementation="eager").eval()
    for name, parameter in model.named_parameters():
        if "norm" in name or "ln_" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model.requires_grad_(False)


def tokenizer() -> Any:
    """Return a tokenizer whose words are ``t1`` to ``t47``."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({f"t{number}": number for number in range(48)}, unk_token="t1"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="t0")


def held(model: nn.Module) -> Any:
    """Return a deep copy of a model, held by nnsight."""
    nnsight = pytest.importorskip("nnsight", reason="nnsight is not installed")
    return nnsight.TransformersModel(copy.deepcopy(model), tokenizer=tokenizer(), task="text-generation")
