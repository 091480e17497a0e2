"""Bridges of TransformerLens 4, which needs an environment without SAELens."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from featurizers.testing import Held, HolderContract
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.holders import places
from tests.support.models import HEAD_WIDTH, MODULES, fresh_model, save_language_model

model_bridge = pytest.importorskip("transformer_lens.model_bridge")
if version("transformer-lens").startswith("3."):
    pytest.skip("TransformerLens 4 is not installed", allow_module_level=True)
torch.set_num_threads(1)


class Bridge(Held):
    """A bridge, which takes token ids as ``input`` and returns logits."""

    def generate(self, operations: Any, inputs: Any, **options: Any) -> tuple[Tensor, dict[str, Any]]:
        import featurizers
        from featurizers_transformer_lens import fill_cache

        options = {("use_past_kv_cache" if name == "use_cache" else name): value for name, value in options.items()}
        with fill_cache(self.holder), featurizers.intervene(self.holder, operations) as collected:
            tokens = self.holder.generate(
                inputs["input_ids"], stop_at_eos=False, return_type="tokens", verbose=False, **options
            )
        return tokens, dict(collected)

    def logits(self, inputs: Mapping[str, Tensor]) -> Tensor:
        kept = {name: value for name, value in inputs.items() if name != "input_ids"}
        return self.holder(inputs["input_ids"], **kept)  # type: ignore[no-any-return]


def bridged(architecture: str, **flags: bool) -> Held:
    """Return a bridge, with its weights processed if there are flags."""
    folder = save_language_model(fresh_model(architecture), Path(tempfile.mkdtemp()))
    words = AutoTokenizer.from_pretrained(folder, pad_token="w0", bos_token="w1", eos_token="w2")
    words.save_pretrained(folder)
    plain: nn.Module = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    bridge = model_bridge.TransformerBridge.boot_transformers(str(folder), device="cpu")
    if flags:
        bridge.enable_compatibility_mode(**flags)
    modules = places(MODULES[architecture], HEAD_WIDTH[architecture])
    return Bridge(bridge.requires_grad_(False).eval(), plain.eval().requires_grad_(False), modules)


NO_BEAMS: dict[str, str] = {
    "generate*beams": "its generate has no beams",
    "generate*padded": "its generate takes no mask of tokens",
}


OTHER_COORDINATES = [
    *(f"steer {words}*" for words in ("embed", "resid", "attn", "mlp.out", "norm", "first", "a token")),
    *(f"{words}*" for words in ("ablate", "interchange", "mask", "collect", "gradient", "generate")),
]
"""Cells at sites whose activations are folded or centred: all but the features of the MLP."""


class TestBridgeOfGpt2(HolderContract):
    title = "TransformerLens 4, GPT-2"
    tolerance = 1e-5
    left_out: ClassVar = NO_BEAMS

    @classmethod
    def make(cls) -> Held:
        return bridged("gpt2")


class TestBridgeOfLlama(HolderContract):
    title = "TransformerLens 4, Llama"
    left_out: ClassVar = NO_BEAMS

    @classmethod
    def make(cls) -> Held:
        return bridged("llama")


class TestBridgeOfGemma2(HolderContract):
    title = "TransformerLens 4, Gemma 2"
    left_out: ClassVar = NO_BEAMS

    @classmethod
    def make(cls) -> Held:
        return bridged("gemma2")


class TestCompatibilityModeOfLlama(HolderContract):
    title = "TransformerLens 4, Llama in compatibility mode without center_unembed"
    tolerance = 1e-5
    refused: ClassVar = {"steer norm.out": "norm.out"}
    left_out: ClassVar = NO_BEAMS

    @classmethod
    def make(cls) -> Held:
        return bridged("llama", center_unembed=False)


class TestCompatibilityModeOfGpt2(HolderContract):
    title = "TransformerLens 4, GPT-2 in compatibility mode"
    refused: ClassVar = dict.fromkeys(OTHER_COORDINATES, "module:")
    left_out: ClassVar = NO_BEAMS

    @classmethod
    def make(cls) -> Held:
        return bridged("gpt2", center_unembed=False)
