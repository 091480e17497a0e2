"""What TransformerLens 3 holds, and objects of it that hold no model here: used, or refused in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import featurizers
import pytest
import torch
from featurizers import Anatomy, Steer, collect, intervene
from featurizers.errors import SiteError
from torch import Tensor, nn
from transformers import AutoTokenizer

from tests.support.models import WIDTH, fresh_model, hooked, module_of, prompts, save_language_model, tiny_model

IDS = prompts(2, 6, seed=1)
MASK = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
REAL = MASK.bool()
DELTA = torch.linspace(-2, 3, WIDTH)


def add_to_first(hidden: Tensor) -> Tensor:
    edited = hidden.clone()
    edited[torch.arange(2), [2, 0]] += DELTA
    return edited


def test_a_bridge_of_the_installed_version_is_edited_as_the_model_is(tmp_path: Path) -> None:
    lens = pytest.importorskip("transformer_lens.model_bridge")
    model = tiny_model("llama")
    folder = save_language_model(fresh_model("llama"), tmp_path / "llama")
    tokenizer = AutoTokenizer.from_pretrained(folder, pad_token="w0", bos_token="w1", eos_token="w2")
    tokenizer.save_pretrained(folder)
    held = lens.TransformerBridge.boot_transformers(str(folder), device="cpu").requires_grad_(False)
    steer = Steer(featurizers.create("identity", d_in=WIDTH), delta=DELTA, positions=[0])
    for kind in ("resid.post", "attn.out", "mlp.out"):
        with torch.no_grad(), hooked(*module_of(model, "llama", kind, 1), add_to_first):
            expected = model(IDS, attention_mask=MASK, position_ids=(MASK.cumsum(-1) - 1).clamp_min(0)).logits[REAL]
        with torch.no_grad(), intervene(held, {f"{kind}:1": steer}):
            torch.testing.assert_close(held(IDS, attention_mask=MASK)[REAL], expected, rtol=1e-4, atol=1e-4)


def test_a_hooked_transformer_is_refused_in_one_line_and_its_modules_are_edited() -> None:
    lens = pytest.importorskip("transformer_lens")
    try:
        made = lens.HookedTransformer
    except (AttributeError, ImportError):
        pytest.skip("TransformerLens 4 has none")
    config = lens.HookedTransformerConfig(
        n_layers=2, d_model=WIDTH, n_ctx=8, d_head=8, n_heads=4, d_vocab=64, act_fn="relu", device="cpu"
    )
    model = made(config)
    with pytest.raises(
        SiteError, match=r"HookedTransformer of TransformerLens folds.*use the model of transformers"
    ) as caught:
        Anatomy(model).place("resid.post:1")
    assert "\n" not in str(caught.value)
    steer = Steer(featurizers.create("identity", d_in=WIDTH), delta=DELTA)
    with torch.no_grad(), intervene(model, {"module:blocks.0.hook_resid_post:output": steer}):
        found = model(IDS)
    with torch.no_grad():
        by_hand = model.run_with_hooks(IDS, fwd_hooks=[("blocks.0.hook_resid_post", lambda x, hook: x + DELTA)])
    torch.testing.assert_close(found, by_hand)


def of_lens(name: str, **fields: object) -> Any:
    """An object of a class that seems to be TransformerLens'."""
    made = type(name, (nn.Module,), {"__module__": "transformer_lens.model_bridge"})()
    vars(made).update(fields)
    return made


@pytest.mark.parametrize("marks", [{}, {"_weights_processed": True}, {"_weights_processed": None}])
def test_a_bridge_that_does_not_say_that_its_weights_are_raw_counts_as_processed(marks: dict[str, Any]) -> None:
    held = of_lens("TransformerBridge", original_model=tiny_model("llama"), **marks)
    with pytest.raises(SiteError, match="other coordinates"):
        Anatomy(held).place("resid.post:1")


def test_a_bridge_whose_model_runs_elsewhere_is_refused() -> None:
    def original_model(self: object) -> None:
        raise AttributeError("VLLMDriver does not expose an nn.Module")

    members = {"__module__": "transformer_lens.model_bridge", "original_model": property(original_model)}
    held = type("TransformerBridge", (nn.Module,), members)()
    with pytest.raises(SiteError, match=r"runs its model outside of torch.*boot_transformers.*featurizers-vllm"):
        collect(held, {"input_ids": IDS}, ["module:blocks.1:output"])
