"""The circuit of a model: where things are, what they write, and how they are computed anew."""

from __future__ import annotations

import types
from dataclasses import replace

import pytest
import torch
import transformers
from featurizers import Site, hookimpl
from featurizers.errors import PluginError, ShapeError, SiteError, UsageError
from featurizers.registry.plugin_host import host
from featurizers_derived_scalars.capturing import capture
from featurizers_derived_scalars.circuit import KINDS, Circuit, Need, Place, find_layout
from featurizers_derived_scalars.circuit.attention import NAME
from torch import Tensor, nn

from tests.support.decoders import (
    DECODERS,
    LAYERS,
    POST_NORM,
    VOCABULARY,
    WIDTH,
    decoder,
    shared_decoder,
    tokens,
    without_its_softcap,
)

RECOMPUTED = (
    *(f"attn.{part}" for part in ("q", "k", "v", "logits", "probs", "z", "out", "delta")),
    *(f"mlp.{part}" for part in ("pre", "neurons", "out", "delta")),
)


def close(first: Tensor, second: Tensor, tolerance: float = 1e-6) -> None:
    assert first.shape == second.shape
    assert float(second.detach().norm()) > 0
    assert float((first - second).detach().norm()) <= tolerance * float(second.detach().norm())


@pytest.fixture(params=DECODERS, scope="module")
def captured(request):
    circuit = Circuit(shared_decoder(request.param))
    [raw] = capture(circuit, tokens(), [Need(kind) for kind in KINDS if circuit.places(kind)])
    return circuit, raw


def before(circuit, raw, place):
    return raw[circuit.residual_before(place), "forward"]


def noise(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- computing anew


def test_what_is_computed_anew_is_what_was_captured(captured):
    circuit, raw = captured
    for kind in (*RECOMPUTED, "logits"):
        for place in circuit.places(kind):
            resid, known = before(circuit, raw, place), raw[place, "forward"]
            for freeze in (False, True):
                found = raw.recompute(place, resid, freeze_norm=freeze)
                if kind == "attn.logits":
                    assert torch.equal(known.isinf(), found.isinf())
                    known, found = (each.masked_fill(known.isinf(), 0) for each in (known, found))
                close(found, known)
                known = raw[place, "forward"]
            for through in ("q", "k", "v") if kind.startswith("attn.") else ():
                assert torch.allclose(raw.recompute(place, resid, through=through), known, atol=1e-5)


def test_derivatives_through_queries_keys_and_values_add_up(captured):
    circuit, raw = captured
    place = Place("attn.z", 1)
    resid, tangent = before(circuit, raw, place), noise(7, WIDTH)
    cotangent = noise(*raw[place, "forward"].shape, seed=4)

    def compute(through=None):
        return lambda x: raw.recompute(place, x, through=through)

    whole, *each = (torch.func.jvp(compute(by), (resid,), (tangent,))[1].detach() for by in (None, "q", "k", "v"))
    parts = dict(zip("qkv", each, strict=True))
    close(sum(parts.values()), whole)
    assert all(part.norm() > 1e-3 * whole.norm() for part in parts.values())
    for through, part in ((None, whole), *parts.items()):
        back = torch.func.vjp(compute(through), resid)[1](cotangent)[0].detach()
        assert float((part * cotangent).sum()) == pytest.approx(float((back * tangent).sum()), rel=1e-5)
    # through values alone, probabilities are those captured
    values = torch.func.jvp(lambda x: raw.recompute(Place("attn.v", 1), x), (resid,), (tangent,))[1]
    close(parts["v"], torch.einsum("qkh,khd->qhd", raw[Place("attn.probs", 1), "forward"], values))
    logits = Place("attn.logits", 1)
    for part in ("q", "k"):
        moved = torch.func.jvp(lambda x, p=part: raw.recompute(logits, x, through=p), (resid,), (tangent,))[1]
        probs = raw[Place("attn.probs", 1), "forward"]
        moved = probs * (moved - (probs * moved).sum(1, keepdim=True))
        close(torch.einsum("qkh,khd->qhd", moved, raw[Place("attn.v", 1), "forward"]), parts[part])


def test_with_the_norm_frozen_values_are_affine_in_the_stream(captured):
    circuit, raw = captured
    place = Place("attn.v", 1)
    resid, step = before(circuit, raw, place), noise(7, WIDTH)
    once, twice = (raw.recompute(place, resid + by * step) for by in (1, 2))
    once, twice = once.detach(), twice.detach()
    here = raw.recompute(place, resid).detach()
    close(twice - here, 2 * (once - here))
    if circuit.norm(Place("norm.attn.scale", 1)) is not None:
        free = [raw.recompute(place, resid + by * step, freeze_norm=False).detach() for by in (0, 1, 2)]
        assert float((free[2] - 2 * free[1] + free[0]).norm()) > 1e-3 * float(free[0].norm())


def test_gradients_of_what_is_computed_anew_are_those_of_the_model(captured):
    """One block's whole gradient, by the model's own norms, against autograd through the block itself."""
    circuit, raw = captured
    place = Place("attn.delta", 1)
    resid = before(circuit, raw, place).clone().requires_grad_()
    cotangent = noise(7, WIDTH)
    [found] = torch.autograd.grad(raw.recompute(place, resid, freeze_norm=False), resid, cotangent)
    model, arguments = circuit.model, raw.arguments[1]
    path, norms = circuit.layout.blocks[1].attention, circuit.layout.blocks[1]
    model.set_attn_implementation("eager")
    x = resid if norms.attn_norm is None else model.get_submodule(norms.attn_norm)(resid)
    out = model.get_submodule(path)(x[None], *arguments.positional, **arguments.named)[0][0]
    out = out if norms.attn_post_norm is None else model.get_submodule(norms.attn_post_norm)(out)
    [known] = torch.autograd.grad(out * norms.attn_factor, resid, cotangent)
    close(found, known, 1e-9)


# ---- writing


def test_a_direction_seen_from_a_place_is_the_adjoint_of_writing(captured):
    _, raw = captured
    for kind in ("attn.z", "attn.out", "attn.delta", "mlp.neurons", "mlp.out", "resid.post", "attn.bias"):
        place = Place(kind, 1)
        node = raw[place, "forward"].shape[1:] if (place, "forward") in raw else (WIDTH,)
        x, direction = noise(2, 7, *node), noise(2, 7, WIDTH, seed=5)
        written, seen = raw.write(place, x), raw.write_vjp(place, direction)
        assert written.shape == direction.shape
        assert seen.shape == x.shape
        assert float((written * direction).sum()) == pytest.approx(float((x * seen).sum()), rel=1e-9)
        close(raw.write(place, 3 * x), 3 * written, 1e-9)


def test_a_unit_writes_its_row_of_the_matrix(captured):
    circuit, raw = captured
    for kind, index in (("mlp.neurons", (5,)), ("attn.z", (2, 3))):
        place = Place(kind, 1)
        one = torch.zeros(7, *raw[place, "forward"].shape[1:], dtype=torch.float64)
        one[4][index] = 1
        row, scale = circuit.write_matrix(place)[index], raw.write_scale(place)
        assert (scale is not None) == bool(circuit.places(f"norm.{kind[:4].rstrip('.')}.post.scale"))
        written = raw.write(place, one)
        close(written[4], row if scale is None else row / scale[4])
        assert not written[:4].any()
    head = raw[Place("attn.z", 1), "forward"].clone()
    head[:, 1:] = 0
    whole = raw.write(Place("attn.z", 1), raw[Place("attn.z", 1), "forward"])
    others = raw.write(Place("attn.z", 1), raw[Place("attn.z", 1), "forward"] - head)
    close(raw.write(Place("attn.z", 1), head) + others, whole)


# ---- tokens and logits


def test_token_embeddings_are_what_enters_the_first_block(captured):
    circuit, raw = captured
    embeddings = circuit.token_embeddings()
    other = tokens(seed=9)
    [second] = capture(circuit, other, [Need("resid.embed")])
    embed = Place("resid.embed")
    moved = raw[embed, "forward"] - second[embed, "forward"]  # positions are the same
    close(moved, embeddings[tokens()] - embeddings[other])


def test_logits_are_the_final_stream_unembedded(captured):
    circuit, raw = captured
    final = raw[Place("resid.final"), "forward"]
    norm, head = circuit.norm(Place("norm.final.scale")), circuit.unembedding
    logits = circuit.unembed(final) / raw.scale("final")
    logits = logits + (0 if norm.bias is None else norm.bias @ head.weight) + (0 if head.bias is None else head.bias)
    logits = logits if head.softcap is None else head.softcap * (logits / head.softcap).tanh()
    close(logits, raw[Place("logits"), "forward"])
    for factor, name in ((1 / 2.5, "Granite"), (0.0625, "Cohere")):
        if name in type(circuit.model).__name__:
            assert head.scale == pytest.approx(factor)


def test_logits_of_a_model_without_a_final_norm_are_the_last_stream_times_the_head():
    model = decoder("opt", torch.float64, _remove_final_layer_norm=True)
    circuit = Circuit(model)
    [raw] = capture(circuit, tokens(), [Need("logits"), Need("resid.final")])
    final = raw[Place("resid.final"), "forward"]
    close(circuit.unembed(final), final @ model.lm_head.weight.T)
    close(raw[Place("logits"), "forward"], final @ model.lm_head.weight.T)


# ---- where things are


def test_every_place_is_behind_what_it_is_computed_from(captured):
    circuit, _ = captured
    order = circuit.order
    for kind in KINDS:
        for place in circuit.places(kind):
            if not kind.startswith("resid."):
                assert order(circuit.residual_before(place)) < order(place)
            if place.layer == 1:
                assert order(Place("mlp.delta", 0)) < order(place) < order(Place("attn.delta", 2))
    for layer in range(LAYERS):
        attention, mlp = order(Place("attn.z", layer)), order(Place("mlp.neurons", layer))
        assert (attention == mlp) if circuit.parallel else (attention < mlp)
        assert mlp < order(Place("resid.post", layer))
    assert order(Place("resid.embed")) == order(Place("resid.pre", 0))
    assert order(Place("resid.final")) == order(Place("resid.post", LAYERS - 1)) < order(Place("logits"))


def test_tap_points_are_modules(captured):
    circuit, _ = captured
    for kind in KINDS:
        derived = kind.startswith("norm.") or kind.endswith((".bias", "logits")) or kind in (
            "attn.q", "attn.k", "attn.v", "attn.probs", "attn.z",
        )  # fmt: skip
        for place in circuit.places(kind):
            point = circuit.tap_point(place)
            assert (point is None) == derived
            if point is not None:
                assert isinstance(circuit.model.get_submodule(point[0]), nn.Module)


def test_granites_factor_is_found_and_used():
    circuit = Circuit(shared_decoder("granite"))
    assert circuit.factor(Place("attn.delta", 1)) == circuit.factor(Place("mlp.delta", 2)) == 0.4
    assert Circuit(shared_decoder("llama")).factor(Place("attn.delta", 1)) == 1.0
    [raw] = capture(circuit, tokens(), [Need("mlp.out"), Need("mlp.delta")])
    assert torch.equal(raw[Place("mlp.out", 1), "forward"] * 0.4, raw[Place("mlp.delta", 1), "forward"])
    doubled = Circuit(decoder("granite", torch.float64, residual_multiplier=2.0))
    [raw] = capture(doubled, tokens(), [Need("mlp.delta"), Need("attn.delta"), Need("resid.pre"), Need("resid.post")])
    written = raw[Place("mlp.delta", 1), "forward"] + raw[Place("attn.delta", 1), "forward"]
    close(raw[Place("resid.pre", 1), "forward"] + written, raw[Place("resid.post", 1), "forward"])


def test_sites_of_the_core_are_places():
    assert Place.parse(Site.parse("mlp.act:2")) == Place("mlp.neurons", 2)
    assert Place.parse(Site.parse("resid.post:0")) == Place("resid.post", 0)
    for wrong in (
        Site.parse("attn.z:1:2"),
        Site.parse("embed"),
        Site.parse("module:lm_head:output"),
        "mlp:1",
        "attn.z",
    ):
        with pytest.raises(SiteError):
            Place.parse(wrong)
    for wrong in ("attn.z:x", "logits:1", "attn.z:", 3):
        with pytest.raises(SiteError):
            Place.parse(wrong)
    assert sorted(map(Place.parse, ["logits", "attn.z:1", "mlp.pre:0", "resid.embed", "attn.q:1"])) == [
        *map(Place.parse, ["resid.embed", "mlp.pre:0", "attn.q:1", "attn.z:1", "logits"])
    ]
    with pytest.raises(UsageError, match="a pass is"):
        Need("attn.z", "both")
    with pytest.raises(SiteError, match="has no layer"):
        Need("logits", layers=frozenset({0}))


def test_a_place_outside_the_blocks_is_in_none(captured):
    circuit, _ = captured
    for kind in ("resid.embed", "resid.final"):
        with pytest.raises(SiteError, match=f"{kind} is in no block"):
            circuit.block(Place(kind))


def test_misuse_is_named(captured):
    circuit, raw = captured
    x = raw[Place("resid.pre", 1), "forward"]
    with pytest.raises(SiteError, match=r"attn.probs:1 does not write.*multiply it with attn.v"):
        raw.write(Place("attn.probs", 1), x)
    with pytest.raises(ShapeError, match=r"mlp\.neurons:1"):
        raw.write(Place("mlp.neurons", 1), x)
    with pytest.raises(ShapeError, match="residual stream is"):
        raw.recompute(Place("attn.q", 1), x[:3])
    with pytest.raises(UsageError, match="through is"):
        raw.recompute(Place("mlp.neurons", 1), x, through="q")
    with pytest.raises(SiteError, match="not computed from one"):
        circuit.residual_before(Place("resid.pre", 1))
    with pytest.raises(SiteError, match="3 layers"):
        circuit.tap_point(Place("attn.out", 3))


# ---- norms


class Absolute(nn.Module):
    """Divides by the mean absolute value, so that it is no norm."""

    def forward(self, x: Tensor) -> Tensor:
        return x / x.abs().mean(-1, keepdim=True)


def test_a_model_with_such_a_layer_is_refused():
    model = decoder("llama")
    model.model.norm = Absolute()
    with pytest.raises(SiteError, match=r"model\.norm \(Absolute\) is not a norm"):
        Circuit(model)


# ---- other architectures

_SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 40}


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (transformers.GPTNeoConfig(**{k: v for k, v in _SMALL.items() if k[:4] != "num_"}, num_layers=2, num_heads=4,
                                   attention_types=[[["global", "local"], 1]]), "AttentionInterface"),
        (transformers.BloomConfig(**_SMALL), "AttentionInterface|MLP|was not called"),
        (transformers.FalconConfig(**_SMALL), "AttentionInterface|MLP|was not called"),
        (transformers.MixtralConfig(**_SMALL, intermediate_size=48, num_key_value_heads=2, num_local_experts=2),
         "mixture of experts"),
        (transformers.BitNetConfig(**_SMALL, intermediate_size=48, num_key_value_heads=2, pad_token_id=None),
         "something stands between the heads and the output projection"),
        (transformers.Glm4MoeConfig(**_SMALL, intermediate_size=48, moe_intermediate_size=8, num_key_value_heads=2,
                                    first_k_dense_replace=1, n_routed_experts=2, num_experts_per_tok=1, head_dim=8,
                                    pad_token_id=None), r"layers\.1\.mlp\.down_proj does not exist.*mixture"),
        (transformers.OPTConfig(**_SMALL, ffn_dim=48, do_layer_norm_before=False, word_embed_proj_dim=32,
                                max_position_embeddings=64), "input and what attention and MLP add|reads neither"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)  # fmt: skip
def test_other_architectures_are_refused_by_name(config, problem):
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(SiteError, match=problem) as caught:
        Circuit(model)
    assert str(caught.value).startswith(type(model).__name__)
    assert "featurizers_circuits" in str(caught.value)


def test_a_softcap_that_the_attention_leaves_out_is_refused(monkeypatch):
    """Eager attention, by which places are looked into, gives other numbers than this model."""
    model = without_its_softcap(monkeypatch)
    with pytest.raises(SiteError, match=r"has a softcap that its sdpa attention leaves out.*attn_implem.*='eager'"):
        Circuit(model)
    model.config._attn_implementation_internal = "eager"
    [raw] = capture(Circuit(model), tokens(), [Need("logits")])
    close(raw[Place("logits"), "forward"], model(tokens()[None]).logits[0])


def test_a_model_that_does_not_run_is_named():
    model = decoder("llama")
    model.model.layers[1].mlp.up_proj = nn.Linear(WIDTH, 3)
    with pytest.raises(SiteError, match="LlamaForCausalLM: it cannot run a prompt of 5 tokens: RuntimeError"):
        Circuit(model)


def test_a_model_that_masks_only_plain_attention_is_refused(monkeypatch):
    """Without a mask of its own for our function, attention would look ahead and say nothing of it."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    model = decoder("llama")
    Circuit(model)
    monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS, NAME, lambda *_, **__: None)
    monkeypatch.setattr(type(ALL_MASK_ATTENTION_FUNCTIONS), "register", lambda *_: None)
    with pytest.raises(SiteError, match="while it is looked into, perhaps for want of a mask"):
        Circuit(model)


def test_a_model_without_a_head_has_no_logits():
    circuit = Circuit(decoder("gpt2").transformer)
    assert circuit.d_vocab == 0
    [raw] = capture(circuit, tokens(), [Need("resid.final"), Need("norm.final.scale")])
    assert raw[Place("resid.final"), "forward"].shape == (7, WIDTH)
    with pytest.raises(SiteError, match="no language-model head"):
        capture(circuit, tokens(), [Need("logits")])
    with pytest.raises(SiteError, match="no language-model head"):
        circuit.unembed(raw[Place("resid.final"), "forward"])


def test_a_plugin_adds_an_architecture():
    """A llama whose parts have names that no one knows, until a plugin names them."""
    model = decoder("llama")
    layout = find_layout(model)
    for block in model.model.layers:
        block.self_attn.strange = block.self_attn.o_proj
        del block.self_attn.o_proj
        block.self_attn.forward = types.MethodType(_strange(type(block.self_attn).forward), block.self_attn)
    with pytest.raises(SiteError, match="no attention module with an output projection"):
        Circuit(model)
    renamed = type(layout)(
        tuple(
            replace(block, out_projection=block.out_projection.replace("o_proj", "strange")) for block in layout.blocks
        ),
        layout.final_norm,
        layout.head,
    )

    class Plugin:
        @staticmethod
        @hookimpl(optionalhook=True)
        def featurizers_circuits(model):
            return renamed if hasattr(model.model.layers[0].self_attn, "strange") else None

    manager = host()._manager
    manager.register(Plugin, "strange-llama")
    try:
        circuit = Circuit(model)
        assert Circuit(decoder("gpt2")).n_layers == LAYERS  # which the plugin says nothing of
    finally:
        manager.unregister(name="strange-llama")
    needs = [Need("attn.z"), Need("attn.delta")]
    [raw], [known] = capture(circuit, tokens(), needs), capture(decoder("llama"), tokens(), needs)
    assert all(torch.equal(raw[key], known[key]) for key in known)


def _strange(forward):
    def run(self, *args, **kwargs):
        object.__setattr__(self, "o_proj", self.strange)
        try:
            return forward(self, *args, **kwargs)
        finally:
            object.__delattr__(self, "o_proj")

    return run


def test_a_plugin_that_answers_something_else_is_named():
    class Plugin:
        @staticmethod
        @hookimpl(optionalhook=True)
        def featurizers_circuits(model):
            return {"blocks": 3}

    manager = host()._manager
    manager.register(Plugin, "else")
    try:
        with pytest.raises(PluginError, match=r"featurizers_circuits gives \{'blocks': 3\}; it gives a Layout"):
            Circuit(decoder("gpt2"))
    finally:
        manager.unregister(name="else")


def test_layouts_that_the_model_contradicts_are_refused():
    model = decoder("llama")
    layout = find_layout(model)

    def with_first(**changes):
        blocks = (replace(layout.blocks[0], **changes), *layout.blocks[1:])

        class Plugin:
            @staticmethod
            @hookimpl(optionalhook=True)
            def featurizers_circuits(model):
                return replace(layout, blocks=blocks)

        manager = host()._manager
        manager.register(Plugin, "wrong")
        try:
            Circuit(model)
        finally:
            manager.unregister(name="wrong")

    block = layout.blocks[0]
    with_first()
    for changes, match in (
        ({"attn_factor": 0.9}, "is not its input and what attention and MLP add"),
        ({"out_projection": block.attention + ".q_proj"}, "something stands between|gives is not"),
        ({"down_projection": block.mlp + ".up_proj"}, "is not what its projection"),
        ({"mlp_post_norm": block.attn_norm}, "is not its input"),
    ):
        with pytest.raises(SiteError, match=match):
            with_first(**changes)


def test_bfloat16_models_have_circuits():
    for name in ("gpt2", "llama", "gemma2", "granite", "phi", "olmo2"):
        circuit = Circuit(decoder(name, torch.bfloat16))
        assert circuit.layout == Circuit(shared_decoder(name)).layout
        assert circuit.fingerprint() == Circuit(shared_decoder(name)).fingerprint()
        [raw] = capture(
            circuit, tokens(), [Need("resid.embed"), Need("resid.final"), Need("attn.delta"), Need("mlp.delta")]
        )
        total = raw[Place("resid.embed"), "forward"].float()
        for kind in ("attn.delta", "mlp.delta"):
            total = total + sum(raw[place, "forward"].float() for place in circuit.places(kind))
        close(total, raw[Place("resid.final"), "forward"].float(), 2e-2)
        written = circuit.write_matrix(Place("mlp.neurons", 1))
        assert written.dtype == torch.float32
        assert (name in POST_NORM) == (raw.write_scale(Place("mlp.neurons", 1)) is not None)
    assert circuit.d_vocab == VOCABULARY
