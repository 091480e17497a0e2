"""The 106 names of transformer-debugger: what each derives to, beside formulas that know nothing of the library."""

import functools

import featurizers
import pytest
import torch
from featurizers.errors import FeatureIndexError, UsageError
from featurizers_derived_scalars import deriver
from featurizers_derived_scalars.capturing import capture, logit_difference
from featurizers_derived_scalars.circuit import KINDS, Circuit, Need, Place
from featurizers_derived_scalars.nodes import Basis, Node
from featurizers_derived_scalars.quantities import write, write_norm, write_to
from featurizers_derived_scalars.registry import spec, specs
from featurizers_transformer_debugger import upstream
from featurizers_transformer_debugger.scalars import SPECS
from featurizers_transformer_debugger.table import NEED_A_LATENT, NEED_A_NODE, ROWS

from tests.support.debugger_formulas import FORMULAS, Layer
from tests.support.decoders import POST_NORM, shared_decoder
from tests.support.models import HEADS, LAYERS, MLP_WIDTH, VOCABULARY, WIDTH, prompts, tiny_model

TOKENS, FEATURES, LATENT = 6, 20, 3
NODE, SOURCE = (1, 4, 7), (0, 2, 11)
METRIC = logit_difference(5, [7, 8])
SIZES = {
    "token": TOKENS,
    "key": TOKENS,
    "pair": TOKENS * (TOKENS + 1) // 2,
    "head": HEADS,
    "d_head": WIDTH // HEADS,
    "neuron": MLP_WIDTH,
    "d_model": WIDTH,
    "vocab": VOCABULARY,
    "feature": FEATURES,
    "one": 1,
}


def _dictionary(width, seed):
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(2, FEATURES, width, generator=generator) / width**0.5
    biases = torch.randn(FEATURES, generator=generator) / 10, torch.randn(width, generator=generator) / 10
    return featurizers.DictionaryFeaturizer.from_tensors(*weights, *biases, rule="relu", pre_bias=True)


WIDTHS = {"mlp.neurons": MLP_WIDTH, "mlp.delta": WIDTH, "attn.delta": WIDTH}


@pytest.fixture(scope="module")
def dictionaries():
    return {
        kind: {layer: _dictionary(width, 10 * number + layer) for layer in range(LAYERS)}
        for number, (kind, width) in enumerate(WIDTHS.items())
    }


@pytest.fixture(scope="module")
def circuit():
    return Circuit(tiny_model("gpt2"))


@pytest.fixture(scope="module")
def everything(circuit):
    """Every place of a prompt, and the gradient in those that have one."""
    there = [kind for kind in KINDS if circuit.places(kind)]
    graded = [kind for kind in there if not kind.startswith("norm.") and not kind.endswith(".bias")]
    needs = [Need(kind) for kind in there] + [Need(kind, "backward") for kind in graded if kind != "attn.logits"]
    (raw,) = capture(circuit, prompts(TOKENS), needs, metric=METRIC)
    return raw


def _source(name):
    """A neuron of the first layer; at the last token, where the metric's gradient is, for effects on the metric."""
    return (*SOURCE[:1], TOKENS - 1, *SOURCE[2:]) if ROWS[name].quantity == "node_write_to" else SOURCE


def _given(name, dictionaries):
    """What a name needs: of several autoencoders the one that it is of, and a neuron."""
    row = ROWS[name]
    kinds = {"any": ["mlp.delta"], "residual": ["mlp.delta"], "mlp": ["mlp.neurons"], "attention": ["attn.delta"]}
    chosen = {kind: dictionaries[kind] for kind in kinds.get(row.kind, dictionaries)}
    from_it = row.quantity in ("edge_from", "activation_from", "node_write", "node_write_to")
    layer, token, neuron = _source(name) if from_it else NODE
    return {
        "featurizers": chosen,
        "node": Node(Basis("mlp.neurons"), layer, (token, neuron)) if row.quantity in NEED_A_NODE else None,
        "latent": LATENT if row.quantity in NEED_A_LATENT else None,
    }


def test_there_is_a_formula_for_every_name():
    made = {name for name in FORMULAS if name in ROWS}
    assert len(ROWS) == 106
    assert made == set(ROWS)


@pytest.mark.parametrize("name", ROWS)
def test_a_name_gives_transformer_debuggers_number(name, circuit, everything, dictionaries):
    scalar = upstream(name, **_given(name, dictionaries))
    (raw,) = capture(circuit, prompts(TOKENS), scalar.needs(circuit), metric=METRIC)
    found = scalar.derive(raw)
    assert scalar.axes == ROWS[name].shape
    somewhere = 0.0

    def tensor(kind, pass_, layer):
        return everything[Place(kind, layer), pass_]

    for key in found:
        value = found[key]
        assert tuple(value.shape) == tuple(SIZES[axis] for axis in scalar.axes)
        allowed = torch.isneginf(value) if name == "attn_qk_logits" else torch.zeros_like(value, dtype=torch.bool)
        assert (value.isfinite() | allowed).all()
        somewhere = max(somewhere, float(value[~allowed].abs().max()))
        state = Layer(circuit.model, tensor, key[1] or 0, LAYERS, dictionaries, NODE, _source(name), LATENT)
        wanted = FORMULAS[name](state)
        assert wanted is not None, f"{name} has a result at layer {key[1]}, which is not before the node"
        wanted = wanted.detach()
        scale = float(wanted[~allowed].abs().max())
        torch.testing.assert_close(value, wanted, rtol=1e-4, atol=2e-5 * scale)
    assert somewhere > 0


@pytest.mark.parametrize("name", ROWS)
def test_a_name_is_a_registered_spec_that_says_what_it_is(name, dictionaries):
    found = specs()[f"transformer-debugger.{name}"]
    assert found.name == f"transformer-debugger.{name}"
    assert spec(name) is spec(name.upper()) is found
    assert ROWS[name].spelled in found.text
    given = {key: value for key, value in _given(name, dictionaries).items() if value is not None}
    assert deriver(name, **given).axes == ROWS[name].shape


def test_specs_are_all_the_names():
    assert [one.name for one in SPECS] == [f"transformer-debugger.{name}" for name in ROWS]


# ---------------------------------------------------------------------- oddities


def test_a_write_norm_is_a_length_but_under_their_names(everything):
    theirs = upstream("mlp_write_norm").derive(everything)["mlp_write_norm", 1]
    ours = write_norm(Basis("mlp.neurons")).derive(everything)
    (own,) = (ours[key] for key in ours if key[1] == 1)
    assert theirs.min() < 0 <= own.min()
    assert torch.equal(theirs.abs(), own)


def test_the_last_projection_is_zero_but_under_our_name(everything):
    name = "resid_post_mlp_proj_to_final_residual_grad"
    theirs = upstream(name).derive(everything)
    ours = write_to(Basis("resid.post", whole=True)).derive(everything)
    last = {key[1]: ours[key] for key in ours}
    assert not theirs[name, LAYERS - 1].any()
    assert last[LAYERS - 1].abs().max() > 0
    assert torch.equal(theirs[name, 0], last[0])


def test_with_a_traced_node_the_residual_stream_before_it_is_zero_too(circuit, everything):
    node = Node(Basis("mlp.neurons"), *(NODE[0], NODE[1:]))
    name = "resid_post_attn_proj_to_final_residual_grad"
    scalar = upstream(name, node=node)
    (raw,) = capture(circuit, prompts(TOKENS), scalar.needs(circuit))
    found = scalar.derive(raw)
    assert not found[name, NODE[0]].any()
    assert found[name, 0].abs().max() > 0
    assert (name, NODE[0] + 1) not in found


def test_final_residual_grad_names_go_to_a_node_if_one_is_given(circuit, dictionaries):
    node = Node(Basis("mlp.neurons"), NODE[0], NODE[1:])
    for traced, name in (
        ("mlp_write_to_final_activation_residual_grad", "mlp_write_to_final_residual_grad"),
        ("unflattened_attn_write_to_final_activation_residual_grad", "unflattened_attn_write_to_final_residual_grad"),
    ):
        a, b = upstream(traced, node=node), upstream(name, node=node)
        (raw,) = capture(circuit, prompts(TOKENS), a.needs(circuit) | b.needs(circuit))
        first, second = a.derive(raw), b.derive(raw)
        assert [key[1] for key in first] == [key[1] for key in second]
        assert all(torch.equal(first[traced, key[1]], second[name, key[1]]) for key in first)


# ---------------------------------------------------------------------- errors


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.quantity in NEED_A_NODE])
def test_a_name_that_needs_a_node_says_so(name, dictionaries):
    given = {**_given(name, dictionaries), "node": None}
    with pytest.raises(UsageError, match=rf"{name} is that of one node; give node=Node\("):
        upstream(name, **given)


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.quantity in NEED_A_LATENT])
def test_a_name_that_needs_a_latent_says_so(name, dictionaries):
    given = {**_given(name, dictionaries), "latent": None}
    with pytest.raises(UsageError, match=rf"{name} is that of one feature; give latent="):
        upstream(name, **given)
    with pytest.raises(FeatureIndexError, match=f"no latent {FEATURES}"):
        upstream(name, **{**given, "latent": FEATURES})


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.featurized])
def test_a_name_that_needs_a_featurizer_says_where(name, dictionaries):
    given = _given(name, dictionaries)
    with pytest.raises(UsageError, match=rf"{name} is of the features of one featurizer at .*; there is none"):
        upstream(name, **{**given, "featurizers": {}})


def test_a_name_of_any_featurizer_refuses_to_choose(dictionaries):
    with pytest.raises(UsageError, match=r"there is mlp\.neurons, mlp\.delta, attn\.delta"):
        upstream("autoencoder_latent", featurizers=dictionaries)


def test_a_name_that_there_is_not():
    with pytest.raises(UsageError, match=r"no scalar 'mlp_write_nrom'.*mlp_write_norm"):
        upstream("mlp_write_nrom")


def test_an_embedding_is_put_before_an_mlp_only(circuit):
    head = Node(Basis("attn.probs"), 1, (4, 2, 0))
    with pytest.raises(UsageError, match=r"vocab_read takes any node"):
        upstream("vocab_token_write_to_input_direction", node=head)


@functools.cache
def _llama():
    return Circuit(tiny_model("llama"))


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if not row.featurized])
def test_a_name_derives_on_a_gated_model_with_fewer_keys_than_heads(name):
    scalar = upstream(name, **_given(name, {}))
    circuit = _llama()
    (raw,) = capture(circuit, prompts(TOKENS), scalar.needs(circuit), metric=METRIC)
    found = scalar.derive(raw)
    for key in found:
        assert tuple(found[key].shape) == tuple(SIZES[axis] for axis in scalar.axes)


@pytest.mark.parametrize("name", POST_NORM)
def test_the_sum_of_heads_writes_goes_through_the_norm_behind_attention(name):
    circuit = Circuit(shared_decoder(name))
    total, each = upstream("attn_write_sum_heads"), write(Basis("attn.probs"))
    (raw,) = capture(circuit, prompts(5) % circuit.d_vocab, total.needs(circuit) | each.needs(circuit))
    for layer in range(circuit.n_layers):
        torch.testing.assert_close(total.tensor(raw, layer), each.tensor(raw, layer).sum(2))
