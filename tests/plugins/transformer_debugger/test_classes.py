"""transformer-debugger's scalar sources and derivers by their own names, composed as its code composes them."""

import dataclasses
from pathlib import Path

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


def _facts():
    file = Path(__file__).parents[2] / "fixtures" / "transformer-debugger" / "derived-scalar-types.txt"
    return [line.split() for line in file.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]


def test_every_name_says_of_itself_what_transformer_debugger_says():
    facts = _facts()
    assert {fact[0] for fact in facts} == {dst.value for dst in DST}
    for name, node_type, axes, location, letters in facts:
        dst = DST(name)
        assert (dst.node_type.value, dst.ndim_per_token_sequence) == (node_type, int(axes)), name
        said = {
            "r": dst.is_raw_activation_type,
            "l": dst.is_autoencoder_latent,
            "g": dst.requires_grad_for_forward_pass,
        }
        assert {letter for letter, true in said.items() if true} == set(letters) & set("rlg"), name
        if not name.endswith("_layer_norm_scale"):  # which transformer-debugger places nowhere
            found = dst.location_within_layer
            assert ("-" if found is None else found.name.lower()) == location, name
        assert dst.requires_grad_for_pass_type(BACKWARD)
        assert dst.requires_grad_for_pass_type(FORWARD) is ("g" in letters)
    pairs = {DST(fact[0]) for fact in facts if "p" in fact[4]}
    flattened = {dst for dst in DST if dst.sequence_dim_is_sequence_token_pairs}
    assert {dst.value for dst in flattened - pairs} == {  # which transformer-debugger leaves out
        "attn_write_to_final_residual_grad",
        "flattened_attn_write_to_latent_summed_over_heads",
        "flattened_attn_write_to_latent_summed_over_heads_batched",
    }
    assert pairs <= flattened


def test_names_and_locations_lead_to_each_other():
    for location in LOCATION:
        assert DST.from_activation_location_type(location).to_activation_location_type() is location
        assert location.node_type is location.dst.node_type
        assert location.dst.has_no_layers is location.has_no_layers
    with pytest.raises(UsageError, match="mlp_write_norm is not the value of a raw location"):
        _ = DST.MLP_WRITE_NORM.has_no_layers
    mlp = debugger.NodeType.MLP_AUTOENCODER_LATENT
    assert DST.ONLINE_AUTOENCODER_WRITE.update_from_autoencoder_node_type(mlp) is DST.ONLINE_MLP_AUTOENCODER_WRITE
    assert DST.AUTOENCODER_LATENT.update_from_autoencoder_node_type(None) is DST.AUTOENCODER_LATENT
    with pytest.raises(UsageError, match="mlp_post_act is not there for mlp_autoencoder_latent"):
        DST.MLP_POST_ACT.update_from_autoencoder_node_type(mlp)


def test_raw_locations_are_kinds_of_places_and_values_of_their_own_names():
    assert LOCATION.MLP_POST_ACT.kind == "mlp.neurons"
    assert {location.name for location in LOCATION} <= {dst.name for dst in DST}
    assert all(location.dst.name == location.name for location in LOCATION)
    assert LOCATION("attn.v_out") is LOCATION.ATTN_WEIGHTED_SUM_OF_VALUES
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
    assert source.activation_location_type_and_pass_type == debugger.ActivationLocationTypeAndPassType(
        LOCATION.MLP_POST_ACT, BACKWARD
    )
    assert isinstance(source, debugger.ActivationLocationTypeAndPassType)
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
    with pytest.raises(UsageError, match=r"gives no single layer; ConstantLayerIndexer\(layer\) and"):
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


def test_a_deriver_computes_from_its_sources_tensors(store):
    deriver = _act_times_grad(debugger.DstConfig(layer_indices=[0, 2]))
    tensors = tuple(store.get_activations_and_metadata(LOCATION.MLP_POST_ACT, one) for one in debugger.PassType)
    found = deriver.activations_and_metadata_calculate_derived_scalar_fn(tensors, FORWARD)
    assert (found.dst, found.pass_type, found.layer_indices) == (DST.MLP_ACT_TIMES_GRAD, FORWARD, (0, 2))
    for layer in (0, 2):
        product = tensors[0].activations_by_layer_index[layer] * tensors[1].activations_by_layer_index[layer]
        assert torch.equal(found.activations_by_layer_index[layer], product)
    message = (
        r"computed from mlp_post_act \(forward\) and mlp_post_act \(backward\), not from mlp_post_act \(backward\)"
    )
    with pytest.raises(UsageError, match=message):
        deriver.activations_and_metadata_calculate_derived_scalar_fn(tensors[::-1], FORWARD)
    with pytest.raises(UsageError, match="not from mlp_post_act"):
        deriver.activations_and_metadata_calculate_derived_scalar_fn(tensors[:1], FORWARD)
    with pytest.raises(UsageError, match="mlp_act_times_grad is derived forward, not backward"):
        deriver.activations_and_metadata_calculate_derived_scalar_fn(tensors, BACKWARD)
    uneven = (tensors[0], tensors[1].filter_layers([0]))
    with pytest.raises(UsageError, match=r"has the layers \[0, 2\] and mlp_post_act has \[0\]"):
        deriver.activations_and_metadata_calculate_derived_scalar_fn(uneven, FORWARD)


def test_a_location_is_specified():
    deriver = debugger.make_scalar_deriver(DST.RESID_POST_MLP_NORM)
    assert deriver.location_within_layer is debugger.LocationWithinLayer.RESID_POST_MLP
    for location in debugger.LocationWithinLayer:
        moved = dataclasses.replace(deriver, _specified_location_within_layer=location)
        assert moved.location_within_layer is location
    wrong = dataclasses.replace(_act_times_grad(), _specified_location_within_layer=debugger.LocationWithinLayer.ATTN)
    with pytest.raises(UsageError, match="mlp_act_times_grad is at MLP, and ATTN was specified"):
        _ = wrong.location_within_layer


def test_a_configuration_knows_model_and_device(store):
    circuit = store.raw.circuit
    config = debugger.DstConfig(model_name="gpt2-small", model_context=circuit, autoencoder_config=None)
    assert (config.get_n_layers(), config.get_or_create_model()) == (LAYERS, circuit.model)
    assert _act_times_grad(config).device_for_raw_activations == torch.device("cpu")
    assert _act_times_grad(config).derive_from_raw(store, FORWARD).device == torch.device("cpu")
    assert debugger.DstConfig(device_for_raw_activations=torch.device("meta")).get_device() == torch.device("meta")
    assert config.requires_grad_for_type(DST.MLP_ACT_TIMES_GRAD)
    assert not config.requires_grad_for_type(DST.MLP_POST_ACT)
    assert debugger.DstConfig(derive_gradients=True).requires_grad_for_type(DST.MLP_POST_ACT)


def test_a_configuration_that_does_not_fit_is_one_error(store):
    with pytest.raises(UsageError, match="this configuration has no model; give model_context"):
        debugger.DstConfig(model_name="gpt2-small").get_n_layers()
    with pytest.raises(UsageError, match=r"model_context is a .* of the model, not a GPT2"):
        debugger.DstConfig(model_context=store.raw.circuit.model)
    for option in ("autoencoder_context", "trace_config", "node_index_for_attribution", "inference_engine_type"):
        with pytest.raises(UsageError, match=f"DstConfig does not take {option}; "):
            debugger.DstConfig(**{option: object()})
    with pytest.raises(UsageError, match="edges hold norms at their scales"):
        debugger.DstConfig(detach_layer_norm_scale_for_attribution=False)
    other = debugger.DstConfig(model_context=Circuit(tiny_model("llama")))
    with pytest.raises(UsageError, match="the store is of another model than model_context"):
        _act_times_grad(other).derive_from_raw(store, FORWARD)
    elsewhere = debugger.DstConfig(device_for_raw_activations=torch.device("meta"))
    with pytest.raises(UsageError, match="the store is on cpu, and device_for_raw_activations is meta"):
        _act_times_grad(elsewhere).derive_from_raw(store, FORWARD)


def test_layers_do_not_choose_what_the_model_has_once(store):
    config = debugger.DstConfig(layer_indices=[1])
    for dst in (DST.RESID_POST_EMBEDDING, DST.RESID_POST_EMBEDDING_NORM):
        assert debugger.make_scalar_deriver(dst, config).derive_from_raw(store, FORWARD).layer_indices == (None,)


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


def test_stores_list_what_was_captured(store):
    captured = store.activations_by_sub_activation_location_type_and_pass_type
    pair = debugger.ActivationLocationTypeAndPassType(LOCATION.ATTN_VALUE, BACKWARD)
    assert captured[pair] == store.get_activations_and_metadata(LOCATION.ATTN_VALUE, BACKWARD)
    assert debugger.ActivationLocationTypeAndPassType(LOCATION.MLP_PRE_ACT, FORWARD) not in captured
    assert {(one.activation_location_type.kind, one.pass_type.value) for one in captured} == {
        (place.kind, pass_) for place, pass_ in store.raw if place.kind not in {"resid.pre", "resid.final"}
    }
    (deriver,) = [debugger.make_scalar_deriver_for_activation_location_type(LOCATION.ATTN_VALUE)]
    assert deriver.derive_from_raw(store, FORWARD) == store.get_activations_and_metadata(LOCATION.ATTN_VALUE, FORWARD)


def test_tensors_are_reckoned_with():
    generator = torch.Generator().manual_seed(0)
    a, b = (
        debugger.ActivationsAndMetadata(
            dst=DST.MLP_POST_ACT,
            pass_type=FORWARD,
            activations_by_layer_index={layer: torch.randn(4, 5, generator=generator) for layer in (0, 3)},
        )
        for _ in range(2)
    )
    x, y = (torch.stack([one.activations_by_layer_index[layer] for layer in (0, 3)]) for one in (a, b))
    assert (a.numel(), a.device, a.cpu() == a.clone() == a, a == b) == (40, torch.device("cpu"), True, False)
    assert torch.equal((a + b).activations_by_layer_index[3], x[1] + y[1])
    assert torch.equal((a - b).activations_by_layer_index[0], x[0] - y[0])
    torch.testing.assert_close(a.sum_abs(), x.abs().sum())
    for largest in (True, False):
        values, indices = a.topk(7, largest=largest)
        assert torch.equal(values, x.flatten().topk(7, largest=largest).values)
        assert [float(x[(0, 3).index(at.layer_index)][at.tensor_indices]) for at in indices] == values.tolist()
        assert len(set(indices)) == 7
    assert len(a.topk(100, largest=True)[1]) == 40
    value, at = a.max()
    assert (value, at.dst, at.pass_type) == (x.max(), DST.MLP_POST_ACT, FORWARD)
    scaled = a.apply_layerwise_transform_fn_to_activations(lambda z, layer: z * layer, DST.MLP_WRITE_NORM, BACKWARD)
    assert torch.equal(scaled.activations_by_layer_index[3], 3 * x[1])
    assert (scaled.dst, scaled.pass_type) == (DST.MLP_WRITE_NORM, BACKWARD)
    with pytest.raises(UsageError, match=r"has the layers \[0, 3\] and mlp_post_act has \[3\]"):
        _ = a + b.filter_layers([3])


def test_indexers_have_the_names_of_their_arguments():
    assert debugger.ConstantLayerIndexer(constant_layer_index=2).layer_index == 2
    assert debugger.NoLayersLayerIndexer().layer_index is None
    assert isinstance(debugger.ConstantLayerIndexer(2), debugger.StaticLayerIndexer)
    assert debugger.OffsetLayerIndexer(layer_index_offset=-1).source(2) == 1
    with pytest.raises(UsageError, match="takes a layer from 0, not -1"):
        debugger.ConstantLayerIndexer(-1)
