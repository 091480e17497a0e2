"""What the conformance suite tries a kind with: another featurizer, and a small language model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from featurizers.features.derivatives import Error
from featurizers.features.featurizer import Featurizer


class _NoConfig(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class Identity(Featurizer[_NoConfig]):
    """Activations as their own features, so that the suite needs no plugin beside the one that it tests."""

    kind = "identity"
    Config = _NoConfig

    def __init__(self) -> None:
        super().__init__(_NoConfig())
        self.d_in = self.n_features = None

    def featurize(self, x: Tensor) -> tuple[Tensor, Error]:
        """Return a copy of x and no error."""
        return x.clone(), None

    def inverse_featurize(self, features: Tensor, error: Error) -> Tensor:
        """Return a copy of the features."""
        return features.clone()

    def apply_edit(self, base: Tensor, features: Tensor, edited: Tensor, columns: Tensor | None = None) -> Tensor:
        """Put the edited coordinates in their columns; nothing is rounded."""
        edited = edited.to(base.dtype)
        return edited if columns is None else base.index_copy(-1, columns, edited)


def tiny_gpt2(width: int) -> tuple[Any, Tensor, Tensor]:
    """Build a model with random weights and a residual stream of a given width, and two batches of prompts."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_layer=2, n_embd=width, n_head=1, vocab_size=16, n_positions=8, bos_token_id=None, eos_token_id=None
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.GPT2LMHeadModel(config).eval().requires_grad_(False)
        base, source = torch.randint(0, 16, (2, 3, 5))
    return model, base, source
