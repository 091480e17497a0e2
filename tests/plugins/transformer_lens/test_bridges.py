"""Bridges of TransformerLens, against plain hooks on the model of transformers; sites are refused where they differ."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import featurizers
import pytest
import torch
from featurizers import Anatomy, Collect, Interchange, Steer, collect, intervene
from featurizers.errors import PositionError, SiteError
from torch import Tensor, nn
from transformers import AutoTokenizer

from tests.support.models import (
    MODULES,
    WIDTH,
    fresh_model,
    hooked,
    module_of,
    prompts,
    read,
    save_language_model,
    tiny_model,
)

torch.set_num_threads(1)

KINDS = ("resid.pre", "resid.post", "attn.out", "mlp.out")
IDS = prompts(2, 6, seed=1)
MASK = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
REAL = MASK.bool()
POSITION_IDS = (MASK.cumsum(-1) - 1).clamp_min(0)
FIRST = torch.tensor([2, 0])
"""Column of the first token of each prompt."""

DELTA = torch.linspace(-2, 3, WIDTH)

Boot = Callable[[str], Any]
two_architectures = pytest.mark.parametrize("architecture", ["gpt2", "llama"])


@pytest.fixture
def bridge(tmp_path: Path) -> Boot:
    """Makes a bridge of TransformerLens from a copy of a tiny model."""
    lens = pytest.importorskip("transformer_lens.model_bridge")

    def boot(architecture: str) -> Any:
        folder = save_language_model(fresh_model(architecture), tmp_path / architecture)
        tokenizer = AutoTokenizer.from_pretrained(folder, pad_token="w0", bos_token="w1", eos_token="w2")
        tokenizer.save_pretrained(folder)
        return lens.TransformerBridge.boot_transformers(str(folder), device="cpu").requires_grad_(False)

    return boot


def steer(positions: list[int] | None = None) -> Steer:
    return Steer(featurizers.create("identity", d_in=WIDTH), delta=DELTA, positions=positions)


def add_to_first(hidden: Tensor) -> Tensor:
    edited = hidden.clone()
    edited[torch.arange(2), FIRST] += DELTA
    return edited


@two_architectures
@pytest.mark.parametrize("kind", KINDS)
def test_a_raw_bridge_is_edited_as_the_model_is(architecture: str, kind: str, bridge: Boot) -> None:
    model, held = tiny_model(architecture), bridge(architecture)
    inputs = {"input_ids": IDS, "attention_mask": MASK, "position_ids": POSITION_IDS}
    with torch.no_grad():
        clean = model(**inputs).logits[REAL]
        with hooked(*module_of(model, architecture, kind, 1), add_to_first):
            expected = model(**inputs).logits[REAL]
        with intervene(held, {f"{kind}:1": steer([0])}):
            found = [
                held(IDS, attention_mask=MASK),
                held.original_model(input_ids=IDS, attention_mask=MASK, position_ids=POSITION_IDS).logits,
            ]
    assert (expected - clean).abs().max() > 1e-2
    for logits in found:
        torch.testing.assert_close(logits[REAL], expected, rtol=1e-4, atol=1e-4)


@two_architectures
def test_a_raw_bridge_takes_inputs_by_the_names_of_transformers(architecture: str, bridge: Boot) -> None:
    model, held, other = tiny_model(architecture), bridge(architecture), prompts(2, 6, seed=2)
    expected = read(model, *module_of(model, architecture, "resid.post", 1), input_ids=other)
    torch.testing.assert_close(
        collect(held, {"input_ids": other}, ["resid.post:1"])["resid.post:1"], expected, rtol=1e-4, atol=1e-4
    )
    swap = Interchange(featurizers.create("identity", d_in=WIDTH), source={"input_ids": other})
    with torch.no_grad(), intervene(held, {"resid.post:2": swap}):
        torch.testing.assert_close(held(IDS), model(other).logits, rtol=1e-4, atol=1e-4)


@two_architectures
def test_positions_in_the_generation_of_a_bridge_are_those_of_the_prompt(architecture: str, bridge: Boot) -> None:
    held, model = bridge(architecture), tiny_model(architecture)
    tokens = IDS
    with torch.no_grad(), hooked(*module_of(model, architecture, "resid.post", 1), _last_of_prompt):
        for _ in range(4):  # without a cache each pass computes the whole prompt
            tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], dim=1)
    options = {"max_new_tokens": 4, "do_sample": False, "stop_at_eos": False, "verbose": False}
    with intervene(held, {"resid.post:1": steer([-1])}):
        found = held.generate(IDS, use_past_kv_cache=False, return_type="tokens", **options)
        hf = held.original_model.generate(IDS, use_cache=False, max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert found.tolist() == tokens.tolist()
    assert hf.tolist() == tokens.tolist()


def _last_of_prompt(hidden: Tensor) -> Tensor:
    edited = hidden.clone()
    edited[:, IDS.shape[1] - 1] += DELTA
    return edited


@pytest.mark.parametrize("operation", [steer([0]), steer([-1])], ids=["first", "last"])
def test_positions_of_texts_are_refused(operation: Steer, bridge: Boot) -> None:
    held = bridge("llama")
    texts = ["w1 w2", "w3 w4 w5 w6"]
    with intervene(held, {"resid.post:1": operation}):
        with pytest.raises(PositionError, match=r"given texts.*pass token ids"):
            held(texts, prepend_bos=False)
        with pytest.raises(PositionError, match=r"given texts.*turn them into token ids"):
            held.generate(texts, max_new_tokens=2, verbose=False, prepend_bos=False)
    with intervene(held, {"resid.post:1": Collect(featurizers.create("identity", d_in=WIDTH))}) as collected:
        held(texts, prepend_bos=False)
    assert collected["resid.post:1"].shape == (2, 4, WIDTH)


FLAGS = ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases")


@two_architectures
@pytest.mark.parametrize("processed", [None, *FLAGS, "all"])
def test_a_bridge_with_processed_weights_is_refused_or_equal_at_every_site(
    architecture: str, processed: str | None, bridge: Boot
) -> None:
    model, held = tiny_model(architecture), bridge(architecture)
    flags = {flag: processed in (flag, "all") for flag in FLAGS}
    held.enable_compatibility_mode(disable_warnings=True, **({"no_processing": True} if processed is None else flags))
    equal = set()
    for kind in MODULES[architecture]:
        site = kind if kind in ("embed", "norm.out") else f"{kind}:1"
        expected = read(model, *module_of(model, architecture, kind, 1), input_ids=IDS)
        with pytest.raises(SiteError, match="pass the bridge itself"):
            collect(held.original_model, {"input_ids": IDS}, [site])
        try:
            found = collect(held, {"input_ids": IDS}, [site])[site]
        except SiteError:
            continue
        equal.add(kind)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    allowed = {"gpt2": {"mlp.act"}, "llama": {*MODULES["llama"]} - {"norm.out"}}[architecture]
    assert equal == ({*MODULES[architecture]} if processed is None else allowed)


def test_the_refusal_of_processed_weights_says_what_to_do(bridge: Boot) -> None:
    held = bridge("gpt2")
    held.enable_compatibility_mode(disable_warnings=True)
    with pytest.raises(SiteError, match=r"folds norms and centres weights.*other coordinates.*no_processing=True"):
        intervene(held, {"resid.post:1": steer()}).__enter__()
    with pytest.raises(SiteError, match="pass the bridge itself"):
        collect(held.original_model, {"input_ids": IDS}, ["resid.post:1"])
    with torch.no_grad(), intervene(held, {"module:blocks.1:output": steer()}):  # named in this very model
        found = held(IDS)
    with torch.no_grad(), hooked(held.blocks[1], "output", lambda hidden: hidden + DELTA):
        torch.testing.assert_close(found, held(IDS))


def test_a_hooked_transformer_is_refused_in_one_line() -> None:
    lens = pytest.importorskip("transformer_lens")
    try:
        made = lens.HookedTransformer
    except (AttributeError, ImportError):
        pytest.skip("TransformerLens 4 has none")
    config = lens.HookedTransformerConfig(
        n_layers=2, d_model=WIDTH, n_ctx=8, d_head=8, n_heads=4, d_vocab=9, act_fn="relu", device="cpu"
    )
    with pytest.raises(
        SiteError, match=r"HookedTransformer of TransformerLens folds.*use the model of transformers"
    ) as caught:
        Anatomy(made(config)).place("resid.post:1")
    assert "\n" not in str(caught.value)


def of_lens(name: str, *bases: type, **fields: object) -> Any:
    """An object of a class that seems to be TransformerLens'."""
    made = type(name, bases or (nn.Module,), {"__module__": "transformer_lens.model_bridge"})()
    vars(made).update(fields)
    return made


@pytest.mark.parametrize("marks", [{}, {"_weights_processed": True}, {"_weights_processed": None}])
def test_a_bridge_that_does_not_say_that_its_weights_are_raw_is_refused(marks: dict[str, Any]) -> None:
    held = of_lens("TransformerBridge", original_model=tiny_model("llama"), **marks)
    with pytest.raises(SiteError, match="other coordinates"):
        Anatomy(held).place("resid.post:1")
