"""TransformerLens 4 against plain torch hooks on the model of transformers; `test_with_tl4.py` runs this in a process.

TransformerLens 4 cannot be installed beside SAELens, and so is not in the environment of the other tests.
"""

from __future__ import annotations

import functools
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import featurizers
import pytest
import torch
from featurizers import Anatomy, Collect, Interchange, Steer, attach, collect, intervene
from featurizers.errors import FeaturizerError, PositionError, SiteError, UsageError
from featurizers_transformer_lens import fill_cache
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoTokenizer

from tests.support.models import (
    HEAD_WIDTH,
    LAYERS,
    WIDTH,
    fresh_model,
    head_columns,
    hooked,
    hooks_of,
    module_of,
    prompts,
    save_language_model,
)

ARCHITECTURES = ("gpt2", "llama", "gemma2", "qwen2")
IDS, OTHER = prompts(2, 6, seed=1), prompts(2, 6, seed=2)
MASK = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
REAL = MASK.bool()
POSITION_IDS = (MASK.cumsum(-1) - 1).clamp_min(0)
PADDED = {"input_ids": IDS, "attention_mask": MASK, "position_ids": POSITION_IDS}
FLAGS = ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases")
every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)

NAMES = {
    "embed": "hook_embed",
    "resid.pre:1": "blocks.1.hook_resid_pre",
    "resid.mid:1": "blocks.1.hook_resid_mid",
    "resid.post:1": "blocks.1.hook_resid_post",
    "attn.out:1": "blocks.1.attn.hook_out",
    "attn.q:1": "blocks.1.attn.hook_q",
    "attn.k:1": "blocks.1.attn.hook_k",
    "attn.v:1": "blocks.1.attn.hook_v",
    "attn.z:1": "blocks.1.attn.hook_z",
    "mlp.in:1": "blocks.1.mlp.hook_in",
    "mlp.out:1": "blocks.1.mlp.hook_out",
    "mlp.act:1": "blocks.1.mlp.hook_post",
    "norm.out": "ln_final.hook_out",
}
"""TransformerLens' name of each site."""
HEADS = ("attn.q:1:3", "attn.k:1:1", "attn.v:1:0", "attn.z:1:2")


@functools.cache
def reference(architecture: str) -> nn.Module:
    """A model of transformers with eager attention, which TransformerLens forces."""
    return fresh_model(architecture, attn_implementation="eager").requires_grad_(False)


@functools.cache
def _folder(architecture: str) -> Path:
    folder = save_language_model(reference(architecture), Path(tempfile.mkdtemp()) / architecture)
    AutoTokenizer.from_pretrained(folder, pad_token="w0", bos_token="w1", eos_token="w2").save_pretrained(folder)
    return Path(folder)


def boot(architecture: str) -> Any:
    """A bridge of a copy of the reference."""
    return TransformerBridge.boot_transformers(str(_folder(architecture)), device="cpu").requires_grad_(False)


@functools.cache
def raw(architecture: str) -> Any:
    """A bridge that no test changes."""
    return boot(architecture)


def edited(hidden: Tensor, columns: Any = slice(None)) -> Tensor:
    """Activations with a ramp added at the first and the last token of each padded prompt."""
    result = hidden.clone()
    ramp = torch.linspace(-2, 3, result[..., columns].shape[-1])
    for row, column in ((0, 2), (1, 0), (0, 5), (1, 5)):
        result[row, column, columns] += ramp
    return result


def steer(width: int, positions: list[int] | None = None) -> Steer:
    return Steer(featurizers.create("identity", d_in=width), delta=torch.linspace(-2, 3, width), positions=positions)


def _place(model: nn.Module, architecture: str, site: str) -> tuple[nn.Module, str, Any]:
    """Module, side and columns of a site in the model of transformers, written by hand."""
    kind, *rest = site.split(":")
    columns: Any = slice(None)
    if kind in ("attn.q", "attn.k", "attn.v"):
        path, heads = head_columns(architecture, kind)
        columns = [column for head in heads for column in head] if len(rest) < 2 else heads[int(rest[1])]
        return model.get_submodule(path.format(1)), "output", columns
    if kind == "attn.z" and len(rest) == 2:
        width = HEAD_WIDTH[architecture]
        columns = slice(int(rest[1]) * width, (int(rest[1]) + 1) * width)
    if kind == "resid.mid":  # adding to what attention adds is adding to the sum
        if architecture == "gemma2":
            return model.model.layers[1].post_attention_layernorm, "output", columns
        return *module_of(model, architecture, "attn.out", 1), columns
    if kind == "mlp.in":
        return module_of(model, architecture, "mlp.out", 1)[0], "input", columns
    return *module_of(model, architecture, kind, 1), columns


@every_architecture
@pytest.mark.parametrize("site", [*NAMES, *HEADS])
def test_an_edit_is_that_of_the_model_and_the_cache_shows_it(architecture: str, site: str) -> None:
    model, held = reference(architecture), raw(architecture)
    module, side, columns = _place(model, architecture, site)
    seen: list[Tensor] = []

    def edit(hidden: Tensor) -> Tensor:
        seen.append(edited(hidden, columns))
        return seen[-1]

    with torch.no_grad():
        clean = model(**PADDED).logits[REAL]
        with hooked(module, side, edit):
            expected = model(**PADDED).logits[REAL]
        width = seen[0][..., columns].shape[-1]
        for key in (site, NAMES.get(site, site)):
            with intervene(held, {key: steer(width, [0, -1])}):
                logits, cache = held.run_with_cache(IDS, attention_mask=MASK)
            torch.testing.assert_close(logits[REAL], expected, rtol=1e-4, atol=1e-5)
    assert (expected - clean).abs().max() > 1e-2
    if site == "resid.mid:1":
        return  # the edit is added to what attention adds, and its sum is shown where the MLP's norm reads it
    shown = cache[NAMES[":".join(site.split(":")[:2])]]
    if site in HEADS:
        head = int(site[-1])
        shown = shown.flatten(2)[..., head * width : (head + 1) * width]
    elif shown.dim() == 4:
        shown = shown.flatten(2)
    torch.testing.assert_close(shown[REAL], seen[0][..., columns][REAL], rtol=1e-4, atol=1e-5)


@every_architecture
def test_the_middle_of_a_block_is_read_where_the_norm_of_the_mlp_reads_it(architecture: str) -> None:
    model, held = reference(architecture), raw(architecture)
    norm = {"gpt2": "ln_2", "gemma2": "pre_feedforward_layernorm"}.get(architecture, "post_attention_layernorm")
    block = module_of(model, architecture, "resid.post", 1)[0]
    with torch.no_grad():
        seen = []
        with hooked(getattr(block, norm), "input", lambda hidden: seen.append(hidden) or hidden):
            model(**PADDED)
        inputs = {"input_ids": IDS, "attention_mask": MASK}
        found = collect(held, inputs, ["blocks.1.hook_resid_mid"])["blocks.1.hook_resid_mid"]
    torch.testing.assert_close(found[REAL], seen[0][REAL], rtol=1e-4, atol=1e-5)


def test_names_around_sandwich_norms_are_those_norms() -> None:
    model, held = reference("gemma2"), raw("gemma2")
    for name, norm in (("attn", "post_attention_layernorm"), ("mlp", "post_feedforward_layernorm")):
        key = f"blocks.1.hook_{name}_out"
        with torch.no_grad(), hooked(getattr(model.model.layers[1], norm), "output", edited):
            expected = model(**PADDED).logits[REAL]
        with torch.no_grad(), intervene(held, {key: steer(WIDTH, [0, -1])}):
            logits = held(IDS, attention_mask=MASK)
        torch.testing.assert_close(logits[REAL], expected, rtol=1e-4, atol=1e-5)
        assert Anatomy(held).site(key).kind == "module"
        assert Anatomy(raw("llama")).site(key) == featurizers.Site(f"{name}.out", 1)


def test_other_hook_points_are_module_sites_and_no_hook_point_is_an_error() -> None:
    held = raw("llama")
    name = "blocks.1.ln1.hook_normalized"
    found = collect(held, {"input_ids": IDS}, [name])[name]
    with torch.no_grad():
        _, cache = held.run_with_cache(IDS)
    assert torch.equal(found, cache[name])
    for wrong in ("blocks.1.hook_resid_pots", "hook_nothing", "blocks.9.hook_mlp_in"):
        with pytest.raises(SiteError, match="has no such hook point"):
            collect(held, {"input_ids": IDS}, [wrong])
    with pytest.raises(SiteError, match="hook_resid_post"):
        collect(held, {"input_ids": IDS}, ["blocks.1.hook_resid_pots"])
    for site, error in (("mlp.router:1", "no hook point for mlp.router"), ("resid.post:9", "3 layers, 0 to 2")):
        with pytest.raises(SiteError, match=error):
            Anatomy(held).place(site)
    for site in ("attn.z:1:4", "attn.k:1:2"):
        with pytest.raises(SiteError, match="such heads, 0 to"):
            Anatomy(held).place(site)


# ---------------------------------------------------------------- inputs and positions
@every_architecture
def test_inputs_have_the_names_of_transformers_and_sources_are_padded_as_generate_pads(architecture: str) -> None:
    model, held = reference(architecture), raw(architecture)
    f = featurizers.create("identity", d_in=WIDTH)
    f.site = featurizers.Site("resid.post", 1)
    source = {"input_ids": OTHER, "attention_mask": MASK}
    with torch.no_grad():
        with intervene(model, {"resid.post:1": Interchange(f, source=source, positions=[0, -1])}):
            expected = model(**PADDED).logits[REAL]
        with intervene(held, {"resid.post:1": Interchange(f, source=source, positions=[0, -1])}):
            found = held(IDS, attention_mask=MASK)[REAL]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        swapped = attach(held, f)({"input_ids": IDS}, {"input_ids": OTHER})
    torch.testing.assert_close(swapped, model(OTHER).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_positions_of_texts_are_refused(side: str) -> None:
    held = raw("llama")
    texts = ["w1 w2", "w3 w4 w5 w6"]
    for positions in ([0], [-1]):
        with pytest.raises(PositionError, match=r"given texts.*pass token ids"):
            collect(held, {"input": texts, "padding_side": side}, ["resid.post:1"], positions=positions)
        with intervene(held, {"resid.post:1": steer(WIDTH, positions)}):
            with pytest.raises(PositionError, match=r"given texts"):
                held(texts, padding_side=side)
            with pytest.raises(PositionError, match=r"given texts"):
                held.generate(texts, max_new_tokens=2, verbose=False)


# ---------------------------------------------------------------- generation
def _generated(model: nn.Module, mask: Tensor | None, **options: Any) -> list[list[int]]:
    options |= {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(IDS, attention_mask=torch.ones_like(IDS) if mask is None else mask, **options).tolist()


@every_architecture
@pytest.mark.parametrize("positions", [[-1], None], ids=["last", "all"])
def test_generation_with_and_without_a_cache_is_that_of_the_model(
    architecture: str, positions: list[int] | None
) -> None:
    model, held = reference(architecture), raw(architecture)
    f = featurizers.create("identity", d_in=WIDTH)
    operation = {"resid.post:1": Steer(f, delta=4 * torch.linspace(-2, 3, WIDTH), positions=positions)}
    options = {"max_new_tokens": 5, "do_sample": False, "stop_at_eos": False, "verbose": False}
    with intervene(model, operation):
        expected = _generated(model, None)
        expected_padded = _generated(model, MASK)
    assert expected != _generated(model, None)
    with intervene(held, operation):
        found = held.generate(IDS, return_type="tokens", use_past_kv_cache=False, **options)
        assert found.tolist() == expected
        assert _generated(held.original_model, MASK, use_cache=False) == expected_padded
        with fill_cache(held):
            assert held.generate(IDS, return_type="tokens", **options).tolist() == expected
            assert _generated(held.original_model, MASK) == expected_padded
        with pytest.raises(UsageError, match=r"does not fill the cache.*fill_cache\(bridge\).*use_past_kv_cache=False"):
            held.generate(IDS, return_type="tokens", **options)


def test_a_single_pass_with_a_cache_is_no_error_and_filling_leaves_no_hook() -> None:
    held = boot("llama")
    clean, before = held(IDS), hooks_of(held)  # the first pass of a model leaves hooks of transformers
    with intervene(held, {"resid.post:1": steer(WIDTH)}):
        held(IDS, use_cache=True)
        held(OTHER, use_cache=True)
        with fill_cache(held):
            pass
    assert hooks_of(held) == before
    assert torch.equal(held(IDS), clean)
    with pytest.raises(UsageError, match="takes a TransformerBridge, not Linear"), fill_cache(nn.Linear(2, 2)):
        pass


# ---------------------------------------------------------------- compatibility mode
COMBINATIONS = [(), FLAGS, *((flag,) for flag in FLAGS), FLAGS[:2], FLAGS[1:]]


@every_architecture
@pytest.mark.parametrize("flags", COMBINATIONS, ids=lambda flags: "+".join(flags) or "no_processing")
def test_a_bridge_with_processed_weights_is_refused_or_equal_at_every_site(
    architecture: str, flags: tuple[str, ...]
) -> None:
    model, held = reference(architecture), boot(architecture)
    options = {flag: flag in flags for flag in FLAGS} if flags else {"no_processing": True}
    held.enable_compatibility_mode(disable_warnings=True, **options)
    allowed = set()
    for site in NAMES:
        module, side, columns = _place(model, architecture, site)
        try:
            found = collect(held, {"input_ids": IDS}, [site])[site]
        except SiteError:
            continue
        allowed.add(site.partition(":")[0])
        if site != "resid.mid:1":
            seen: list[Tensor] = []
            with torch.no_grad(), hooked(module, side, _keep(seen)):
                model(IDS)
            torch.testing.assert_close(found, seen[0][..., columns], rtol=1e-4, atol=1e-4)
    everything = {site.partition(":")[0] for site in NAMES}
    if not flags:
        assert allowed == everything
    elif architecture == "gpt2":
        assert allowed == {"attn.q", "attn.k", "mlp.act"}
    else:
        biased = {"attn.v", "attn.z"} if architecture == "qwen2" else set()
        assert allowed == everything - {"norm.out", "mlp.in"} - biased


def _keep(seen: list[Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda hidden: seen.append(hidden.detach().clone()) or hidden  # type: ignore[func-returns-value]


def test_the_refusal_says_what_to_do_and_a_module_of_this_very_bridge_is_edited() -> None:
    held = boot("gpt2")
    held.enable_compatibility_mode(disable_warnings=True)
    f = featurizers.create("identity", d_in=WIDTH)
    f.site = featurizers.Site("resid.post", 1)
    for use in (
        lambda: attach(held, f),
        lambda: intervene(held, {"blocks.1.hook_resid_post": steer(WIDTH)}).__enter__(),
    ):
        with pytest.raises(SiteError, match=r"folds norms and centres weights.*other coordinates.*no_processing=True"):
            use()
    with pytest.raises(FeaturizerError, match="pass the bridge itself"):
        collect(held.original_model, {"input_ids": IDS}, ["resid.post:1"])
    with torch.no_grad(), intervene(held, {"module:blocks.1.hook_out:output": steer(WIDTH, [0])}):
        found = held(IDS)
    with torch.no_grad(), hooked(held.blocks[1], "output", _first_of):
        torch.testing.assert_close(found, held(IDS))


def _first_of(hidden: Tensor) -> Tensor:
    result = hidden.clone()
    result[:, 0] += torch.linspace(-2, 3, WIDTH)
    return result


# ---------------------------------------------------------------- the rest
def test_a_passport_of_the_model_fits_its_bridge_and_not_another(tmp_path: Path) -> None:
    f = featurizers.create("identity", d_in=WIDTH)
    f.site = featurizers.Site("resid.post", 1)
    loaded = featurizers.load(f.save_pretrained(tmp_path / "f", model=reference("llama")))
    attach(raw("llama"), loaded)
    with pytest.raises(UsageError, match="the activations of this TransformerBridge are not those"):
        attach(raw("qwen2"), loaded)


def test_gradients_and_features_go_through_a_bridge_and_nothing_stays() -> None:
    held, model = boot("llama"), reference("llama")
    clean, before = held(IDS), hooks_of(held)  # the first pass of a model leaves hooks of transformers
    f = featurizers.create("subspace", d_in=WIDTH, n_features=3, seed=0)
    gradients = []
    for each in (model, held):
        operation = Interchange(f, source={"input_ids": OTHER}, positions=[-1])
        with intervene(each, {"resid.post:1": operation, "mlp.out:0": Collect(f, positions=[0])}) as collected:
            output = each(IDS)
        logits = output if isinstance(output, Tensor) else output.logits
        f.zero_grad()
        logits.square().sum().backward()
        gradients.append((next(f.parameters()).grad.clone(), collected["mlp.out:0"]))
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert gradients[0][0].abs().max() > 1e-3
    assert hooks_of(held) == before
    assert torch.equal(held(IDS), clean)
    assert "generate" not in vars(held)


def test_the_sites_of_a_bridge_are_printed_with_their_heads() -> None:
    assert repr(Anatomy(raw("llama"))) == (
        f"Anatomy(TransformerBridge, {LAYERS} layers with resid.pre, resid.post, attn.out, attn.q, attn.k, attn.v, "
        "attn.z (4 heads), resid.mid, mlp.in, mlp.out, mlp.act; embed, norm.out)"
    )


def test_the_examples_of_the_page_run() -> None:
    page = (Path(__file__).parents[4] / "docs" / "transformer-lens.md").read_text()
    names = {"torch": torch, "featurizers": featurizers, "folder": str(_folder("llama")), "tokens": IDS}
    names["f"] = featurizers.create("subspace", d_in=WIDTH, n_features=8, seed=0)
    examples = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    for example in examples:
        exec(example, names)
    assert len(examples) == 2
