"""Random models and prompts; random weights cost as much as trained ones."""

from __future__ import annotations

from typing import Any

import torch
from timing import Settings, Skipped
from torch import Tensor


def gpt2(settings: Settings, *, layers: int, width: int, vocabulary: int, length: int) -> Any:
    """Build a GPT-2 with a language-model head and random weights, in eval mode.

    Raises:
        Skipped: transformers is not installed.
    """
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError as error:
        raise Skipped(f"transformers cannot be imported: {error}") from error
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=layers,
        n_embd=width,
        n_head=4,
        vocab_size=vocabulary,
        n_positions=length,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config).eval().to(settings.device, settings.dtype)


def prompts(settings: Settings, batch: int, length: int, vocabulary: int, seed: int = 0) -> Tensor:
    """Return random token ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, vocabulary, (batch, length), generator=generator).to(settings.device)
