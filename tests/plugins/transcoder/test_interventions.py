"""Operations through maps between sites, beside plain hooks, closed forms and featurizers of one site."""

from contextlib import contextmanager
from functools import partial

import featurizers
import pytest
import torch
from featurizers import Ablate, Collect, Interchange, Mask, Steer, intervene, replaced
from featurizers.errors import PositionError, ShapeError, SiteError, UsageError
from featurizers_transcoder import Crosscoder, CrossLayerTranscoder, Transcoder

from tests.support.site_maps import FEATURES, WIDTH, linear_map, model, written

ARCHITECTURES = ["gpt2", "llama", "gemma2", "gemma3", "qwen3"]
IDS = torch.tensor([[3, 1, 4, 1, 5, 9], [2, 7, 1, 8, 2, 8]])
OTHER = torch.tensor([[6, 6, 2, 6, 0, 7], [1, 4, 1, 4, 2, 1]])


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / 3


def transcoder(name, layer=1, *, skip=False, read="mlp.in", **options):
    f = Transcoder.from_weights(
        random(FEATURES, WIDTH, seed=layer),
        random(FEATURES, WIDTH, seed=layer + 10),
        random(FEATURES, seed=layer + 20),
        random(WIDTH, seed=layer + 30),
        random(WIDTH, WIDTH, seed=layer + 40) if skip else None,
        **options,
    )
    f.reads, f.writes = {"in": f"{read}:{layer}"}, {"out": written(name, layer)}
    return f


def cross_layer(name, *, skip=False, off_diagonal=True):
    f = linear_map(
        CrossLayerTranscoder,
        {i: ([f"in-{i}"], [f"out-{j}" for j in range(i, 3)]) for i in range(3)},
        skips={f"out-{i}": [f"in-{i}"] for i in range(3)} if skip else None,
    )
    f.reads = {f"in-{i}": f"mlp.in:{i}" for i in range(3)}
    f.writes = {f"out-{i}": written(name, i) for i in range(3)}
    if not off_diagonal:
        for i in range(3):
            for j in range(i + 1, 3):
                f.W_dec[f"layer-{i}"][f"out-{j}"].data.zero_()
    return f


def crosscoder(*, causal):
    names = [f"site-{i}" for i in range(3)]
    groups = {i: ([names[i]], names[i:]) for i in range(3)} if causal else {0: (names, names)}
    f = linear_map(Crosscoder, groups)
    f.reads = f.writes = {f"site-{i}": f"resid.post:{i}" for i in range(3)}
    return f


def logits(m, ids=IDS, **options):
    return m(ids, **options).logits


@contextmanager
def hooked(m, path, function):
    """Pass the output of a module through a function."""
    handle = m.get_submodule(path).register_forward_hook(
        lambda _, __, out: (function(out[0]), *out[1:]) if isinstance(out, tuple) else function(out)
    )
    try:
        yield
    finally:
        handle.remove()


# ---------------------------------------------------------------------- laws


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_operation_that_changes_nothing_leaves_every_logit(name, dtype):
    m = model(name).to(dtype)
    base = logits(m)
    cases = [
        (transcoder(name), {}),
        (transcoder(name, skip=True, read="resid.mid", normalize="rms"), {}),
        (cross_layer(name, skip=True), {"writes": "additive"}),
        (cross_layer(name, skip=True), {"writes": "pinned"}),
        (crosscoder(causal=True), {"writes": "pinned", "later": "frozen"}),
        (crosscoder(causal=False), {"writes": "additive", "later": "frozen"}),
    ]
    for f, options in cases:
        with intervene(m, Interchange(f, source={"input_ids": IDS}, positions=[1, -1], **options)):
            assert torch.equal(logits(m), base), (f, options)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_write_gets_the_row_of_the_feature_that_is_set(name):
    m, f = model(name), transcoder(name, skip=True)
    x, y = (featurizers.collect(m, {"input_ids": IDS}, [site])[site] for site in (f.reads["in"], f.writes["out"]))
    z = torch.relu(x @ f.W_enc["features"]["in"].T + f.b_enc["features"])[:, -1:, 5:6]
    row = f.W_dec["features"]["out"][5]
    with intervene(m, [Ablate(f, indices=[5], value=2.0, positions=[-1])]):
        edited = featurizers.collect(m, {"input_ids": IDS}, [f.writes["out"]])[f.writes["out"]]
        after = logits(m)

    def by_hand(hidden):
        hidden = hidden.clone()
        hidden[:, -1:] += (2.0 - z) * row
        return hidden

    path = "model.layers.1.post_feedforward_layernorm" if name.startswith("gemma") else "model.layers.1.mlp"
    with hooked(m, "transformer.h.1.mlp" if name == "gpt2" else path, by_hand):
        torch.testing.assert_close(after, logits(m), atol=1e-6, rtol=0)
    y[:, -1:] += (2.0 - z) * row
    torch.testing.assert_close(edited, y, atol=1e-6, rtol=0)


def test_a_relu_mlp_is_its_own_transcoder():
    m = model("gpt2")
    maps = []
    for i, block in enumerate(m.transformer.h):
        mlp = block.mlp
        f = Transcoder.from_weights(mlp.c_fc.weight.T, mlp.c_proj.weight, mlp.c_fc.bias, mlp.c_proj.bias)
        f.reads, f.writes = {"in": f"mlp.in:{i}"}, {"out": f"mlp.out:{i}"}
        maps.append(f)
    base = logits(m)
    with replaced(m, maps):
        torch.testing.assert_close(logits(m), base, atol=2e-6, rtol=0)
    neurons = featurizers.create("identity", d_in=4 * WIDTH)
    source = {"input_ids": OTHER}
    for operation in (Interchange, Ablate, Steer, Mask):
        options = {"positions": [2], "indices": [3, 30]}
        if operation in (Interchange, Mask):
            options["source"] = source
        if operation is Mask:
            options = {"positions": [2], "source": source, "gate": torch.linspace(0, 1, 4 * WIDTH)}
        if operation is Steer:
            options["delta"] = torch.tensor([0.5, -0.5])
        with intervene(m, [operation(maps[1], **options)]):
            through_map = logits(m)
        with intervene(m, {"mlp.act:1": operation(neurons, **options)}):
            torch.testing.assert_close(through_map, logits(m), atol=2e-6, rtol=0)
        assert not torch.allclose(through_map, base, atol=1e-4)


def test_a_crosscoder_of_one_site_is_the_dictionary_bit_for_bit():
    m = model("llama")
    f = linear_map(Crosscoder, {0: (["site"], ["site"])})
    f.reads = f.writes = {"site": "resid.post:1"}
    d = featurizers.DictionaryFeaturizer.from_tensors(
        f.W_enc["layer-0"]["site"],
        f.W_dec["layer-0"]["site"],
        f.b_enc["layer-0"],
        f.b_dec["site"],
        rule="jumprelu",
        threshold=f.rule_tensors["threshold"]["layer-0"],
    )
    d.site = "resid.post:1"
    for make in (
        lambda f: Interchange(f, source={"input_ids": OTHER}, positions=[-1], indices=[1, 5]),
        lambda f: Ablate(f, indices=[[1, 2], [3]], value=1.5),
        lambda f: Steer(f, indices=[4], delta=3.0, positions=[0, 2]),
        lambda f: Ablate(f, indices=[4, 6], value="mean"),
    ):
        with intervene(m, make(f)):
            through_map = logits(m)
        with intervene(m, make(d)):
            assert torch.equal(through_map, logits(m))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_pinned_crosscoder_says_what_the_last_site_is(name):
    m, f = model(name), crosscoder(causal=True)
    x = featurizers.collect(m, {"input_ids": IDS}, ["resid.post:0", "resid.post:2"])
    z = f.encode("layer-0", {"site-0": x["resid.post:0"]})[..., 7:8]
    last = x["resid.post:2"] + (1.0 - z) * f.W_dec["layer-0"]["site-2"][7]
    base = m.transformer if name == "gpt2" else m.model
    expected = m.lm_head((base.ln_f if name == "gpt2" else base.norm)(last))
    operation = Ablate(f, indices={"layer-0": [7]}, value=1.0, writes="pinned")
    with intervene(m, operation):
        torch.testing.assert_close(logits(m), expected, atol=1e-6, rtol=0)
    f.W_dec["layer-0"]["site-0"].data.mul_(5)  # what the model itself makes of earlier writes is overwritten
    with intervene(m, operation):
        torch.testing.assert_close(logits(m), expected, atol=1e-6, rtol=0)
    with intervene(m, Ablate(f, indices={"layer-0": [7]}, value=1.0, writes="additive")):
        assert not torch.allclose(logits(m), expected, atol=1e-2)


@pytest.mark.parametrize("name", ["gpt2", "gemma3"])
def test_a_cross_layer_transcoder_without_cross_layers_is_transcoders(name):
    m, f = model(name), cross_layer(name, off_diagonal=False)
    parts = []
    for i in range(3):
        g = Transcoder.from_weights(
            f.W_enc[f"layer-{i}"][f"in-{i}"],
            f.W_dec[f"layer-{i}"][f"out-{i}"],
            f.b_enc[f"layer-{i}"],
            rule="jumprelu",
            threshold=f.rule_tensors["threshold"][f"layer-{i}"],
        )
        g.reads, g.writes = {"in": f"mlp.in:{i}"}, {"out": written(name, i)}
        parts.append(g)
    indices = {"layer-0": [1], "layer-2": [3, 4]}
    with intervene(m, Interchange(f, source={"input_ids": OTHER}, positions=[-1], indices=indices, writes="additive")):
        whole = logits(m)
    operations = [
        Interchange(parts[i], source={"input_ids": OTHER}, positions=[-1], indices=indices[f"layer-{i}"])
        for i in (0, 2)
    ]
    with intervene(m, operations):
        torch.testing.assert_close(logits(m), whole, atol=1e-6, rtol=0)
    with intervene(m, operations[0]), intervene(m, operations[1]):
        torch.testing.assert_close(logits(m), whole, atol=1e-6, rtol=0)


def test_later_features_are_recomputed_or_frozen():
    m, f = model("llama"), cross_layer("llama")
    x = featurizers.collect(m, {"input_ids": IDS}, [f"mlp.in:{i}" for i in range(3)])
    changes = {}
    for i in (0, 2):
        z = f.encode(f"layer-{i}", {f"in-{i}": x[f"mlp.in:{i}"]})
        changes[i] = (2.0 - z[..., :1]) * f.W_dec[f"layer-{i}"]["out-2"][0]
    early = [
        (2.0 - f.encode("layer-0", {"in-0": x["mlp.in:0"]})[..., :1]) * f.W_dec["layer-0"][f"out-{j}"][0]
        for j in (0, 1)
    ]
    operation = {"indices": {"layer-0": [0], "layer-2": [0]}, "value": 2.0, "writes": "additive"}
    with (
        hooked(m, "model.layers.0.mlp", lambda h: h + early[0]),
        hooked(m, "model.layers.1.mlp", lambda h: h + early[1]),
        hooked(m, "model.layers.2.mlp", lambda h: h + changes[0] + changes[2]),
    ):
        expected = logits(m)
    with intervene(m, Ablate(f, later="frozen", **operation)):
        torch.testing.assert_close(logits(m), expected, atol=1e-6, rtol=0)
    with intervene(m, Ablate(f, **operation)):
        assert not torch.allclose(logits(m), expected, atol=1e-4)
    one = {"indices": {"layer-0": [0]}, "value": 2.0, "writes": "additive"}
    with intervene(m, Ablate(f, later="frozen", **one)):
        frozen = logits(m)
    with intervene(m, Ablate(f, **one)):
        torch.testing.assert_close(logits(m), frozen, atol=1e-6, rtol=0)


def test_a_feature_is_read_in_a_run_with_the_edits_before_it():
    m, f = model("gpt2"), cross_layer("gpt2")
    steer = Steer(f, indices={"layer-0": [2]}, delta=4.0, writes="additive")
    with intervene(m, steer):
        x = {}
        handle = m.transformer.h[2].mlp.register_forward_pre_hook(lambda _, args: x.update(at=args[0]))
        logits(m)
        handle.remove()
    collect = Collect(f, indices={"layer-2": [0, 1]})
    with intervene(m, [steer, collect]) as collected:
        logits(m)
    assert set(collected[collect]) == {"layer-2"}
    expected = f.encode("layer-2", {"in-2": x["at"]})[..., :2]
    torch.testing.assert_close(collected[collect]["layer-2"], expected, atol=1e-6, rtol=0)


def test_operations_through_one_map_see_those_before_them():
    m, f = model("llama"), transcoder("llama")
    first, second = Ablate(f, indices=[0, 1], value=1.0), Steer(f, indices=[1, 2], delta=0.5, positions=[-1])
    late = Collect(f, indices=[2, 1, 0])
    with intervene(m, [first, second, late]) as collected:
        both = logits(m)
    x = featurizers.collect(m, {"input_ids": IDS}, ["mlp.in:1"])["mlp.in:1"]
    z = f.encode("features", {"in": x}).clone()
    before = z.clone()
    z[..., :2] = 1.0
    z[:, -1, 1:3] += 0.5
    torch.testing.assert_close(collected[late], z[..., [2, 1, 0]], atol=1e-6, rtol=0)
    change = (z - before) @ f.W_dec["features"]["out"]
    with hooked(m, "model.layers.1.mlp", lambda h: h + change):
        torch.testing.assert_close(logits(m), both, atol=1e-6, rtol=0)


def test_padding_positions_and_generated_tokens():
    m, f = model("llama"), transcoder("llama")
    swap = {"source": {"input_ids": OTHER[:1]}, "positions": [0, -1], "indices": [1, 3]}
    with intervene(m, Interchange(f, **swap)):
        alone = logits(m, IDS[:1])
        generated = m.generate(IDS[:1], max_new_tokens=4, do_sample=False, pad_token_id=0)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), IDS[:1]], dim=1)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1]])
    ids = mask.cumsum(-1).sub(1).clamp(min=0)
    with intervene(m, Interchange(f, **swap)):
        left = logits(m, padded, attention_mask=mask, position_ids=ids)
        again = m.generate(padded, attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=0)
    torch.testing.assert_close(left[:, 3:], alone, atol=1e-5, rtol=0)
    assert torch.equal(generated[:, 6:], again[:, 9:])
    collect = Collect(f)
    with intervene(m, collect) as collected:
        m.generate(IDS, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert collected[collect].shape == (2, 8, FEATURES)


def test_special_tokens_are_left_alone():
    m, f = model("gpt2"), transcoder("gpt2", special_tokens=[1])
    mark = IDS == 1
    for context in (intervene(m, Ablate(f, value=3.0)), replaced(m, f)):
        seen = {}
        with context:
            note = partial(seen.__setitem__, "out")
            handle = m.transformer.h[1].mlp.register_forward_hook(lambda _, __, out, note=note: note(out))
            logits(m)
            handle.remove()
        plain = featurizers.collect(m, {"input_ids": IDS}, ["mlp.out:1"])["mlp.out:1"]
        assert torch.equal(seen["out"][mark], plain[mark])
        assert not torch.isclose(seen["out"][~mark], plain[~mark]).all(dim=-1).any()


# ---------------------------------------------------------------------- replacement


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_replaced_activations_are_the_reconstruction(name):
    m, f = model(name), transcoder(name, skip=True)
    x = featurizers.collect(m, {"input_ids": IDS}, ["mlp.in:1"])["mlp.in:1"]
    value = f.decode("out", {"features": f.encode("features", {"in": x})}, {"in": x})
    path = "model.layers.1.post_feedforward_layernorm" if name == "gemma2" else "model.layers.1.mlp"
    with hooked(m, path, lambda _: value):
        expected = logits(m)
    with replaced(m, f):
        assert torch.equal(logits(m), expected)
    steer = Steer(f, indices=[2], delta=1.0)
    with replaced(m, f), intervene(m, steer):
        inside = logits(m)
    with intervene(m, steer), replaced(m, f):
        assert torch.equal(logits(m), inside)
    change = f.W_dec["features"]["out"][2]
    with hooked(m, path, lambda _: value + change):
        torch.testing.assert_close(logits(m), inside, atol=1e-6, rtol=0)


def test_an_edit_of_what_a_replaced_part_reads_counts():
    m, f = model("llama"), transcoder("llama")
    identity = featurizers.create("identity", d_in=WIDTH)
    push = random(WIDTH, seed=5)
    x = featurizers.collect(m, {"input_ids": IDS}, ["mlp.in:1"])["mlp.in:1"] + push
    value = f.decode("out", {"features": f.encode("features", {"in": x})}, {"in": x})
    with hooked(m, "model.layers.1.mlp", lambda _: value):
        expected = logits(m)
    edit = {"mlp.in:1": Steer(identity, delta=push)}
    with replaced(m, f), intervene(m, edit):
        torch.testing.assert_close(logits(m), expected, atol=1e-6, rtol=0)
    with intervene(m, edit), replaced(m, f):
        torch.testing.assert_close(logits(m), expected, atol=1e-6, rtol=0)


def test_a_kept_error_keeps_the_values_and_gives_the_gradient_of_the_map():
    m, f = model("gpt2"), transcoder("gpt2", skip=True)
    embeddings = m.transformer.wte(IDS).requires_grad_()
    base = m(inputs_embeds=embeddings).logits
    with replaced(m, f, error="kept"):
        kept = m(inputs_embeds=embeddings).logits
    assert torch.equal(kept, base)
    weight = random(*base.shape, seed=9)
    (actual,) = torch.autograd.grad((kept * weight).sum(), embeddings)

    y = featurizers.collect(m, {"inputs_embeds": embeddings}, ["mlp.out:1"])["mlp.out:1"].detach()
    mlp, plain = m.transformer.h[1].mlp, m.transformer.h[1].mlp.forward

    def by_hand(x):
        value = f.decode("out", {"features": f.encode("features", {"in": x})}, {"in": x})
        return value + (y - value.detach())

    mlp.forward = by_hand
    (expected,) = torch.autograd.grad((m(inputs_embeds=embeddings).logits * weight).sum(), embeddings)
    mlp.forward = plain
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)


def test_the_gradient_of_an_edited_value_is_that_of_its_row():
    m, f = model("llama"), transcoder("llama", layer=2)
    value = torch.tensor([0.7], requires_grad=True)
    with intervene(m, Ablate(f, indices=[4], value=value, positions=[-1])):
        loss = logits(m)[:, -1].square().sum()
    (actual,) = torch.autograd.grad(loss, value)
    x = featurizers.collect(m, {"input_ids": IDS}, ["resid.post:2", "mlp.in:2"])
    z = f.encode("features", {"in": x["mlp.in:2"][:, -1]})[..., 4:5]
    again = torch.tensor([0.7], requires_grad=True)
    last = x["resid.post:2"][:, -1] + (again - z) * f.W_dec["features"]["out"][4]
    (expected,) = torch.autograd.grad(m.lm_head(m.model.norm(last)).square().sum(), again)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)


# ---------------------------------------------------------------------- what is refused


def generating(m, operation):
    with intervene(m, operation):
        m.generate(IDS, max_new_tokens=2, do_sample=False, pad_token_id=0)


@pytest.mark.parametrize(
    ("act", "error", "message"),
    [
        (lambda m: intervene(m, Ablate(crosscoder(causal=False), writes="additive")).__enter__(), UsageError, "frozen"),
        (lambda m: intervene(m, Ablate(cross_layer("llama"))).__enter__(), UsageError, "writes='additive'"),
        (lambda m: intervene(m, {"mlp.out:1": Ablate(transcoder("llama"))}).__enter__(), UsageError, "in a list"),
        (lambda m: intervene(m, Ablate(transcoder("llama", layer=7))).__enter__(), SiteError, "3 layers"),
        (lambda m: replaced(m, crosscoder(causal=False)).__enter__(), UsageError, "comes later"),
        (lambda m: replaced(m, transcoder("llama"), error="lost").__enter__(), UsageError, "'dropped' or 'kept'"),
        (lambda m: Ablate(transcoder("llama"), later="never"), UsageError, "'recomputed' or 'frozen'"),
        (lambda m: Ablate(featurizers.create("identity", d_in=4), writes="pinned"), UsageError, "maps between sites"),
        (
            lambda m: intervene(m, Ablate(cross_layer("llama"), indices=[0], writes="additive")).__enter__(),
            UsageError,
            "indices by group",
        ),
        (
            lambda m: generating(m, Ablate(cross_layer("llama"), writes="pinned")),
            UsageError,
            "continues from a cache",
        ),
        (
            lambda m: generating(m, Ablate(crosscoder(causal=False), writes="additive", later="frozen")),
            UsageError,
            "cache",
        ),
    ],
)
def test_what_cannot_be_right_is_refused(act, error, message):
    with pytest.raises(error, match=message):
        act(model("llama"))


def test_a_map_without_sites_or_with_others_is_refused():
    m, f = model("llama"), transcoder("llama")
    f.reads = {}
    with pytest.raises(UsageError, match="does not say where it belongs"):
        intervene(m, Ablate(f)).__enter__()
    wide = Transcoder.from_weights(random(3, WIDTH + 1), random(3, WIDTH))
    wide.reads, wide.writes = {"in": "mlp.in:1"}, {"out": "mlp.out:1"}
    with pytest.raises(ShapeError, match="width 17"):
        wide.attach(m)
    f.reads = {"in": featurizers.Site("mlp.in", 1).at(model="owner/one")}
    f.writes = {"out": featurizers.Site("mlp.out", 1).at(model="owner/two")}
    with pytest.raises(UsageError, match="several models"):
        f.attach(m)


def test_attach_interchanges_the_selected_features():
    m, f = model("llama"), transcoder("llama")
    f.reads = {"in": featurizers.Site("mlp.in", 1).at(position=(-1,))}
    f.feature_sets["selected"] = torch.tensor([2, 5])
    attached = f.attach(m)
    with intervene(m, Interchange(f, source={"input_ids": OTHER}, positions=[-1], indices=[2, 5])):
        expected = logits(m)
    assert torch.equal(attached({"input_ids": IDS}, {"input_ids": OTHER}).logits, expected)
    (collected,) = attached.collect({"input_ids": IDS})
    assert collected.shape == (2, 1, 2)


def test_positions_of_a_prompt_that_was_computed_before_are_refused():
    m, f = model("llama"), transcoder("llama")
    cache = m(IDS[:, :4]).past_key_values
    with pytest.raises(PositionError, match="in a cache already"), intervene(m, Ablate(f, positions=[-1])):
        m(IDS[:, 4:], past_key_values=cache)


@pytest.mark.parametrize("writes", ["pinned", "pinned-everywhere"])
def test_writes_are_pinned_at_the_tokens_of_the_operation_or_at_all(writes):
    m, f = model("llama"), cross_layer("llama")
    at = {i: featurizers.collect(m, {"input_ids": IDS}, [f"mlp.in:{i}", f"mlp.out:{i}"]) for i in range(3)}
    z = f.encode("layer-0", {"in-0": at[0]["mlp.in:0"]})[:, 2, 3:4]
    handles = []
    for i in range(3):

        def by_hand(_, __, output, i=i):
            output = (output if writes == "pinned" else at[i][f"mlp.out:{i}"]).clone()
            output[:, 2] = at[i][f"mlp.out:{i}"][:, 2] + (2.0 - z) * f.W_dec["layer-0"][f"out-{i}"][3]
            return output

        handles.append(m.model.layers[i].mlp.register_forward_hook(by_hand))
    expected = logits(m)
    for handle in handles:
        handle.remove()
    options = {"positions": [2], "later": "frozen"}
    with intervene(m, Ablate(f, indices={"layer-0": [3]}, value=2.0, writes=writes, **options)):
        torch.testing.assert_close(logits(m), expected, atol=1e-5, rtol=0)
    other = ({"pinned", "pinned-everywhere"} - {writes}).pop()
    with intervene(m, Ablate(f, indices={"layer-0": [3]}, value=2.0, writes=other, **options)):
        assert not torch.allclose(logits(m), expected, atol=1e-3)


def test_a_pinned_write_follows_its_skip_connection():
    m, f = model("llama"), cross_layer("llama", skip=True)
    at = {i: featurizers.collect(m, {"input_ids": IDS}, [f"mlp.in:{i}", f"mlp.out:{i}"]) for i in range(3)}
    z = f.encode("layer-0", {"in-0": at[0]["mlp.in:0"]})[..., 3:4]
    handles = []
    for i in range(3):
        row = f.W_dec["layer-0"][f"out-{i}"][3]
        skip = f.W_skip[f"out-{i}"][f"in-{i}"]
        base = at[i]

        def by_hand(_, args, __, i=i, row=row, skip=skip, base=base):
            return base[f"mlp.out:{i}"] + (args[0] - base[f"mlp.in:{i}"]) @ skip + (2.0 - z) * row

        handles.append(m.model.layers[i].mlp.register_forward_hook(by_hand))
    expected = logits(m)
    for handle in handles:
        handle.remove()
    with intervene(m, Ablate(f, indices={"layer-0": [3]}, value=2.0, writes="pinned")):
        torch.testing.assert_close(logits(m), expected, atol=1e-5, rtol=0)
