"""transformer-debugger's scalar sources and derivers by their own names, composed as its code composes them."""

import featurizers_transformer_debugger as debugger
import pytest
import torch
from featurizers.errors import SiteError, UsageError
from featurizers_derived_scalars.capturing import capture, logit_difference
from featurizers_derived_scalars.circuit import Circuit, Need
from featurizers_transformer_debugger.table import ROWS

from tests.support.models import LAYERS, prompts, tiny_model

LOCATION, DST = debugger.ActivationLocationType, debugger.DerivedScalarType
FORWARD, BACKWARD = debugger.PassType.FORWARD, debugger.PassType.BACKWARD


@pytest.fixture(scope="module")
def store():
    kinds = ["resid.embed", "resid.pre", "resid.post", "mlp.neurons", "attn.probs", "attn.v", "attn.q", "attn.z"]
    needs = [Need(kind, pass_) for kind in kinds for pass_ in ("forward", "backward")]
    model = Circuit(tiny_model("gpt2"))
    (raw,) = capture(model, prompts(6), [*needs, Need("resid.final", "backward")], metric=logit_difference(5, 7))
    return debugger.RawActivationStore(raw)


def _raw(store, location, pass_type, layer=None):
    return store.get_activations_and_metadata(location, pass_type).activations_by_layer_index[layer]


def test_the_enumeration_is_the_106_names():
    assert [dst.value for dst in DST] == list(ROWS)
    assert all(dst.name.lower() == dst.value for dst in DST)
    assert DST.MLP_WRITE_NORM.shape_spec_per_token_sequence == ("token", "neuron")
    assert DST.MLP_WRITE_NORM.spelled == "signed(write_norm(mlp.neurons))"


def test_raw_locations_are_kinds_of_places_and_values_of_their_own_names():
    assert LOCATION.MLP_POST_ACT.kind == "mlp.neurons"
    assert {location.value for location in LOCATION} <= {dst.value for dst in DST}
    assert LOCATION.RESID_POST_EMBEDDING.has_no_layers
    assert not LOCATION.RESID_POST_MLP.has_no_layers
    where = [LOCATION.ATTN_VALUE, LOCATION.RESID_POST_ATTN, LOCATION.MLP_PRE_ACT, LOCATION.RESID_POST_MLP]
    places = [location.location_within_layer for location in where]
    assert places == sorted(places)
    assert places[-1] is debugger.LocationWithinLayer.RESID_POST_MLP


def test_a_raw_source_gives_what_was_captured(store):
    for pass_type in debugger.PassType:
        source = debugger.RawScalarSource(LOCATION.MLP_POST_ACT, pass_type)
        found = source.derive_from_raw(store, [0, 2])
        assert found.layer_indices == (0, 2)
        assert found.dst is DST.MLP_POST_ACT
        assert torch.equal(found.activations_by_layer_index[2], _raw(store, LOCATION.MLP_POST_ACT, pass_type, 2))
    assert source.dst_and_pass_type == debugger.DerivedScalarTypeAndPassType(DST.MLP_POST_ACT, BACKWARD)
    assert source.exists_by_default
    assert source.sub_activation_location_type_and_pass_types == (
        debugger.ActivationLocationTypeAndPassType(LOCATION.MLP_POST_ACT, BACKWARD),
    )


def test_queries_carry_their_factor_in_both_passes(store):
    raw = {place.kind + pass_: x for (place, pass_), x in store.raw.items() if place.layer == 1}
    width = raw["attn.qforward"].shape[-1]
    forward, backward = (_raw(store, LOCATION.ATTN_QUERY, pass_type, 1) for pass_type in (FORWARD, BACKWARD))
    torch.testing.assert_close(forward, raw["attn.qforward"] / width**0.25)
    torch.testing.assert_close((forward * backward).sum(), (raw["attn.qforward"] * raw["attn.qbackward"]).sum())


def test_layer_indexers(store):
    residual = LOCATION.RESID_POST_MLP
    before = debugger.RawScalarSource(residual, FORWARD, debugger.OffsetLayerIndexer(-1)).derive_from_raw(store, None)
    assert torch.equal(before.activations_by_layer_index[1], _raw(store, residual, FORWARD, 0))
    assert 0 not in before.layer_indices
    last = debugger.RawScalarSource(residual, FORWARD, debugger.ConstantLayerIndexer(LAYERS - 1))
    found = last.derive_from_raw(store, [0, 1]).activations_by_layer_index
    assert all(torch.equal(x, _raw(store, residual, FORWARD, LAYERS - 1)) for x in found.values())
    assert last.layer_index == LAYERS - 1
    embedding = debugger.RawScalarSource(LOCATION.RESID_POST_EMBEDDING, FORWARD, debugger.NoLayersLayerIndexer())
    assert embedding.derive_from_raw(store, [None]).layer_indices == (None,)
    assert embedding.layer_index is None
    with pytest.raises(UsageError, match=r"gives no single layer; At\(layer\) and Unlayered\(\) do"):
        _ = debugger.RawScalarSource(residual, FORWARD).layer_index
    with pytest.raises(UsageError, match=r"RESID_POST_EMBEDDING has no layers: give it NoLayersLayerIndexer\(\)"):
        debugger.RawScalarSource(LOCATION.RESID_POST_EMBEDDING, FORWARD)


def _act_times_grad(config=None):
    sources = tuple(debugger.RawScalarSource(LOCATION.MLP_POST_ACT, pass_type) for pass_type in debugger.PassType)
    return debugger.ScalarDeriver(
        DST.MLP_ACT_TIMES_GRAD,
        config or debugger.DstConfig(),
        sources,
        lambda tensors, layer, pass_type: tensors[0] * tensors[1],
    )


def test_a_deriver_of_two_sources(store):
    deriver = _act_times_grad()
    assert (deriver.n_input_tensors, deriver.n_total_required_tensors) == (2, 2)
    assert deriver.derivable_pass_types == (FORWARD,)
    assert deriver.shape_of_activation_per_token_spec == ("neuron",)
    assert deriver.location_within_layer is debugger.LocationWithinLayer.MLP
    assert [pair.pass_type for pair in deriver.get_sub_dst_and_pass_types()] == [FORWARD, BACKWARD]
    found = deriver.derive_from_raw(store, FORWARD)
    assert found.layer_indices == (0, 1, 2)
    ready = debugger.make_scalar_deriver(DST.MLP_ACT_TIMES_GRAD).derive_from_raw(store, FORWARD)
    for layer in found.layer_indices:
        assert torch.equal(found.activations_by_layer_index[layer], ready.activations_by_layer_index[layer])
        product = _raw(store, LOCATION.MLP_POST_ACT, FORWARD, layer) * _raw(
            store, LOCATION.MLP_POST_ACT, BACKWARD, layer
        )
        assert torch.equal(found.activations_by_layer_index[layer], product)
    assert deriver.to_serializable_dict() == {"dst": DST.MLP_ACT_TIMES_GRAD, "dst_config": debugger.DstConfig()}


def test_layers_are_those_of_the_configuration(store):
    deriver = _act_times_grad(debugger.DstConfig(layer_indices=[1]))
    assert deriver.derive_from_raw(store, FORWARD).layer_indices == (1,)


def test_transforms_compose(store):
    model = store.raw.circuit.model
    lengths = [block.mlp.c_proj.weight.norm(dim=-1).detach() for block in model.transformer.h]
    activations = debugger.make_scalar_deriver(DST.MLP_POST_ACT, debugger.DstConfig(derive_gradients=True))
    assert activations.derivable_pass_types == (FORWARD, BACKWARD)
    by_layer = activations.apply_layerwise_transform_fn_to_output(
        lambda tensor, layer, pass_type: tensor * lengths[layer], FORWARD, DST.MLP_WRITE_NORM
    )
    found = by_layer.derive_from_raw(store, FORWARD)
    theirs = debugger.make_scalar_deriver(DST.MLP_WRITE_NORM).derive_from_raw(store, FORWARD)
    for layer, x in found.activations_by_layer_index.items():
        torch.testing.assert_close(x, theirs.activations_by_layer_index[layer])
    doubled = by_layer.apply_transform_fn_to_output(lambda tensor: 2 * tensor, FORWARD, DST.MLP_WRITE_NORM)
    assert (doubled.n_input_tensors, doubled.n_total_required_tensors) == (1, 2)  # the activations have two passes
    assert doubled.location_within_layer is debugger.LocationWithinLayer.MLP
    twice = doubled.derive_from_raw(store, FORWARD)
    assert torch.equal(twice.activations_by_layer_index[1], 2 * found.activations_by_layer_index[1])
    assert torch.equal(twice.sum(), torch.stack([x.sum() for x in twice.activations_by_layer_index.values()]).sum())


def test_a_transform_with_another_source(store):
    activations = debugger.make_scalar_deriver(DST.MLP_POST_ACT)
    gradient = debugger.RawScalarSource(LOCATION.MLP_POST_ACT, BACKWARD)
    product = activations.apply_layerwise_transform_fn_to_output_and_other_tensor(
        lambda a, b, layer, pass_type: a * b * (layer + 1), FORWARD, DST.MLP_ACT_TIMES_GRAD, gradient
    )
    assert (product.n_input_tensors, product.n_total_required_tensors) == (2, 2)
    found = product.derive_from_raw(store, FORWARD).activations_by_layer_index
    plain = _act_times_grad().derive_from_raw(store, FORWARD).activations_by_layer_index
    assert all(torch.equal(found[layer], plain[layer] * (layer + 1)) for layer in range(LAYERS))


def test_a_derived_source_goes_through_a_layer_indexer(store):
    source = debugger.DerivedScalarSource(_act_times_grad(), FORWARD, debugger.OffsetLayerIndexer(1))
    assert not source.exists_by_default
    assert source.dst is DST.MLP_ACT_TIMES_GRAD
    found = source.derive_from_raw(store, None).activations_by_layer_index
    plain = _act_times_grad().derive_from_raw(store, FORWARD).activations_by_layer_index
    assert sorted(found) == [0, 1]
    assert torch.equal(found[0], plain[1])


def test_a_forward_transform_offers_no_backward_pass(store):
    config = debugger.DstConfig(derive_gradients=True)
    forward = debugger.make_scalar_deriver(DST.MLP_POST_ACT, config)
    size = forward.apply_transform_fn_to_output(torch.abs, FORWARD, DST.MLP_WRITE_NORM)
    assert size.derivable_pass_types == (FORWARD,)
    with pytest.raises(UsageError, match="mlp_write_norm is derived forward, not backward"):
        size.derive_from_raw(store, BACKWARD)
    gradient = forward.apply_transform_fn_to_output(torch.abs, BACKWARD, DST.MLP_POST_ACT)
    assert gradient.derivable_pass_types == (BACKWARD,)
    found = gradient.derive_from_raw(store, BACKWARD).activations_by_layer_index[0]
    assert torch.equal(found, _raw(store, LOCATION.MLP_POST_ACT, BACKWARD, 0).abs())


@pytest.mark.parametrize("dst", [DST.ATTN_WRITE_NORM, DST.ATTN_WRITE_TO_FINAL_RESIDUAL_GRAD, DST.RESID_POST_MLP_NORM])
def test_a_ready_deriver_says_what_it_comes_from(dst, store):
    deriver = debugger.make_scalar_deriver(dst)
    needed = {(one.activation_location_type.name, one.pass_type) for one in
              deriver.get_sub_activation_location_type_and_pass_types()}  # fmt: skip
    heads = {("ATTN_QK_PROBS", FORWARD), ("ATTN_VALUE", FORWARD)}
    assert (
        needed
        == {
            DST.ATTN_WRITE_NORM: heads,
            DST.ATTN_WRITE_TO_FINAL_RESIDUAL_GRAD: heads | {("RESID_POST_MLP", BACKWARD)},
            DST.RESID_POST_MLP_NORM: {("RESID_POST_MLP", FORWARD)},
        }[dst]
    )
    assert deriver.derive_from_raw(store, FORWARD).shape[0] in (6, 21)


def test_nothing_is_written_to_the_store(store):
    before = {key: x.clone() for key, x in store.raw.items()}
    debugger.RawScalarSource(LOCATION.RESID_POST_MLP, FORWARD, debugger.OffsetLayerIndexer(-1)).derive_from_raw(
        store, None
    )
    _act_times_grad().derive_from_raw(store, FORWARD)
    assert before.keys() == store.raw.keys()
    assert all(torch.equal(x, store.raw[key]) for key, x in before.items())


def test_what_was_not_captured_is_one_error(store):
    with pytest.raises(SiteError, match=r"mlp\.pre"):
        store.get_activations_and_metadata(LOCATION.MLP_PRE_ACT, FORWARD)
    with pytest.raises(UsageError, match="of the features of one featurizer"):
        debugger.make_scalar_deriver(DST.AUTOENCODER_LATENT)


def test_metadata_are_filtered_and_transformed(store):
    found = store.get_activations_and_metadata(LOCATION.RESID_POST_MLP, FORWARD)
    assert found.filter_layers(None) is found
    assert found.filter_layers([0]).layer_indices == (0,)
    sizes = found.apply_transform_fn_to_activations(torch.abs, DST.RESID_POST_MLP_NORM, FORWARD)
    assert sizes.dst is DST.RESID_POST_MLP_NORM
    assert torch.equal(sizes.activations_by_layer_index[0], found.activations_by_layer_index[0].abs())
