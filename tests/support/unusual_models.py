"""Tiny random language models that are no plain decoders: with images, with linear attention, with states, with virtual
tokens."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn

from tests.support.models import fresh_model

WIDTH = 32
_NO_SPECIAL_TOKENS = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
TEXT = {
    "hidden_size": WIDTH,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    **_NO_SPECIAL_TOKENS,
}
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}


def with_large_weights(model: nn.Module) -> nn.Module:
    """Give a model weights that are large enough for every part to matter."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * 0.2 if parameter.dim() > 1 else parameter + noise * 0.1)
    return model.eval().requires_grad_(False)


def gemma3() -> nn.Module:
    """Return a Gemma 3 that sees: its decoder is given embeddings and a dict of masks."""
    text = {**TEXT, "head_dim": 8, "sliding_window": 4}
    tokens = {"image_token_index": 60, "boi_token_index": 61, "eoi_token_index": 62}
    config = transformers.Gemma3Config(text_config=text, vision_config=_VISION, mm_tokens_per_image=1, **tokens)
    return with_large_weights(transformers.Gemma3ForConditionalGeneration(config))


def paligemma() -> nn.Module:
    """Return a PaliGemma: its decoder is given embeddings and a four-dimensional mask."""
    text = {**TEXT, "model_type": "gemma", "head_dim": 8}
    vision = {**_VISION, "model_type": "siglip_vision_model", "vision_use_head": False, "projection_dim": WIDTH}
    config = transformers.PaliGemmaConfig(
        text_config=text, vision_config=vision, image_token_index=60, projection_dim=WIDTH
    )
    return with_large_weights(transformers.PaliGemmaForConditionalGeneration(config))


def llava() -> nn.Module:
    """Return a LLaVA: its decoder is given embeddings and the mask."""
    vision = {**_VISION, "model_type": "clip_vision_model", "projection_dim": 16}
    text = {**TEXT, "model_type": "llama"}
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=60)
    return with_large_weights(transformers.LlavaForConditionalGeneration(config))


def qwen2_5_vl() -> nn.Module:
    """Return a Qwen 2.5-VL: three position ids a token."""
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    vision = {
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": WIDTH,
        "patch_size": 4,
        "fullatt_block_indexes": [1],
        "window_size": 8,
    }
    tokens = {"image_token_id": 60, "video_token_id": 63, "vision_start_token_id": 61, "vision_end_token_id": 62}
    config = transformers.Qwen2_5_VLConfig(
        text_config={**TEXT, "rope_parameters": rope}, vision_config=vision, **tokens
    )
    return with_large_weights(transformers.Qwen2_5_VLForConditionalGeneration(config))


def minimax(layer_types: list[str]) -> nn.Module:
    """Return a MiniMax with ``linear_attention`` and ``full_attention`` in its layers."""
    options: dict[str, Any] = {**TEXT, "num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 8}
    config = transformers.MiniMaxConfig(**{**options, "layer_types": layer_types, "block_size": 4})
    return with_large_weights(transformers.MiniMaxForCausalLM(config))


def mamba(version: int = 1) -> nn.Module:
    """Return a Mamba, which has states and no attention."""
    options = {"hidden_size": WIDTH, "num_hidden_layers": 2, "vocab_size": 64, "state_size": 8, **_NO_SPECIAL_TOKENS}
    if version == 1:
        return with_large_weights(transformers.MambaForCausalLM(transformers.MambaConfig(**options)))
    config = transformers.Mamba2Config(**options, head_dim=8, num_heads=8, n_groups=1, chunk_size=4, expand=2)
    return with_large_weights(transformers.Mamba2ForCausalLM(config))


class PromptTuned(nn.Module):
    """A model with virtual tokens before the prompt, as in prompt tuning."""

    def __init__(self, n_virtual: int = 3) -> None:
        super().__init__()
        self.base_model = fresh_model("llama").requires_grad_(False)
        self.config = self.base_model.config
        generator = torch.Generator().manual_seed(1)
        self.prompt = nn.Parameter(torch.randn(n_virtual, WIDTH, generator=generator), requires_grad=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """Run the model on the virtual tokens and the prompt."""
        batch = input_ids.shape[0]
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        embeds = torch.cat([self.prompt.expand(batch, -1, -1), self.base_model.get_input_embeddings()(input_ids)], 1)
        mask = torch.cat([mask.new_ones(batch, len(self.prompt)), mask], 1)
        return self.base_model(inputs_embeds=embeds, attention_mask=mask, **kwargs)
