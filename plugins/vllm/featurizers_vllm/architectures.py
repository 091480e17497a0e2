"""Architectures of vLLM that are supported: their decoder layers, and what these return."""

from __future__ import annotations

from typing import Final, NamedTuple


class Architecture(NamedTuple):
    """Where vLLM defines a model, and where its decoder layers are.

    Attributes:
        module: of vLLM, with the class of the architecture's name.
        layers: path of the list of decoder layers.
        attention: path of the attention module within a layer.
        mlp: path of the MLP module within a layer.
    """

    module: str
    layers: str = "model.layers"
    attention: str = "self_attn"
    mlp: str = "mlp"


_MODELS = "vllm.model_executor.models"
ARCHITECTURES: Final = {
    "GPT2LMHeadModel": Architecture(f"{_MODELS}.gpt2", layers="transformer.h", attention="attn"),
    "LlamaForCausalLM": Architecture(f"{_MODELS}.llama"),
    "Qwen2ForCausalLM": Architecture(f"{_MODELS}.qwen2"),
    "Qwen3ForCausalLM": Architecture(f"{_MODELS}.qwen3"),
}
"""By the name of the architecture; each was compared with `featurizers.intervene` on transformers."""
