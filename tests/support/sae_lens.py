"""Random weights under SAELens' names, and comparisons relative to the largest element."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

D, F = 16, 64
D_OUT = 10
"""Width of what a transcoder writes."""


def batch(*shape: int, seed: int = 1) -> Tensor:
    """Return random activations ``(*shape, D)`` whose mean is not zero."""
    return torch.randn(*shape, D, generator=torch.Generator().manual_seed(seed)) * 2 + 0.5


def weights(*extra: str) -> dict[str, Tensor]:
    """Return the tensors of a standard SAE, and extra tensors ``(F,)`` of numbers between 0 and 1."""
    g = torch.Generator().manual_seed(0)
    shapes = {"W_enc": (D, F), "b_enc": (F,), "W_dec": (F, D), "b_dec": (D,)}
    tensors = {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}
    return {**tensors, **{name: torch.rand(F, generator=g) for name in extra}}


def linear(joint: str = ".") -> dict[str, Tensor]:
    """Return `weights` under the names of two `torch.nn.Linear`; ``joint`` stands before ``weight`` and ``bias``."""
    t = weights()
    return {
        f"encoder{joint}weight": t["W_enc"].T.contiguous(),
        f"encoder{joint}bias": t["b_enc"],
        f"decoder{joint}weight": t["W_dec"].T.contiguous(),
        f"decoder{joint}bias": t["b_dec"],
    }


def same(result: Tensor, expected: Tensor, tolerance: float = 1e-6) -> None:
    """Assert that no element differs by more than ``tolerance`` times the largest expected element, above zero."""
    __tracebackhide__ = True
    assert result.shape == expected.shape
    scale = float(expected.detach().abs().max())
    assert scale > 0
    difference = float((result - expected).abs().max())
    assert difference <= tolerance * scale, difference / scale


def make(architecture: str, *, seed: int = 0, **options: Any) -> Any:
    """Return a random SAE of SAELens whose parameters are not zero."""
    from sae_lens.registry import get_sae_class

    cls, config = get_sae_class(architecture)
    extra: dict[str, Any] = {"k": 7} if "topk" in architecture else {}
    extra |= {"d_out": D_OUT} if "transcoder" in architecture else {}
    pre_bias = {"apply_b_dec_to_input": "transcoder" not in architecture}
    sae = cls(config(**{"d_in": D, "d_sae": F, **pre_bias, **extra, **options}))
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=g) * (0.3 if parameter.dim() < 2 else 1))
            if name == "W_dec" and architecture == "matching_pursuit":
                parameter.copy_(torch.nn.functional.normalize(parameter, dim=-1))
    return sae.eval()


def gemma(version: int) -> Any:
    """Return a random Gemma 2 or 3 of the width of `weights` whose norms have gains."""
    from transformers import Gemma2Config, Gemma2ForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "num_hidden_layers": 3,
        "hidden_size": D,
        "intermediate_size": 24,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "vocab_size": 50,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    model: Any = (
        Gemma2ForCausalLM(Gemma2Config(**sizes)) if version == 2 else Gemma3ForCausalLM(Gemma3TextConfig(**sizes))
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layernorm" in name:
                parameter.normal_()
    return model.eval()
