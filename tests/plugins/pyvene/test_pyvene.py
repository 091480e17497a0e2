"""Interventions in pyvene models: both backends give the same result, and nothing else changes."""

import copy
import importlib
import json

import featurizers
import pytest
import pyvene
import torch
from featurizers.errors import FeatureIndexError, ManifestError, UsageError
from featurizers.models import Anatomy
from featurizers.pyvene import indices_of_subspaces

from tests.support.intervenables import BASE, SOURCE, built, logits
from tests.support.models import WIDTH, tiny_model
from tests.support.processes import run_python

BY_NAME = ["gpt2", "llama", "gemma2"]  # pyvene lists these models
BY_PATH = ["gemma3", "qwen3", "phi3", "olmo2"]  # pyvene does not; their places are given by path


@pytest.fixture
def subspace():
    return featurizers.create("subspace", d_in=WIDTH, n_features=6, seed=2)


def intervenable(architecture, cls, units=1, **options):
    if architecture in BY_NAME:
        place = {"layer": 1, "intervention_type": cls, **options}
    else:
        path = Anatomy(tiny_model(architecture)).pyvene_component("resid.post:1")
        place = {"component": path, "intervention": cls(**options)}
    return built([{"max_number_of_units": units, **place}], architecture)


def native(architecture, operation):
    model = tiny_model(architecture)
    with featurizers.intervene(model, {"resid.post:1": operation}) as collected:
        output = model(BASE)
    return collected.get("resid.post:1", output.logits)


@pytest.mark.parametrize("architecture", BY_NAME + BY_PATH)
@pytest.mark.parametrize("positions", [[3], [1, 4]], ids=["one position", "two positions"])
@pytest.mark.parametrize("kind", ["subspace", "identity"])
def test_interchange_equals_the_native_backend(architecture, positions, kind, subspace):
    f = subspace if kind == "subspace" else featurizers.create("identity", d_in=WIDTH)
    patched = intervenable(architecture, f.get_interchange_intervention(), len(positions))
    options = {"source": {"input_ids": SOURCE}, "positions": positions}
    for subspaces, indices in ((None, None), ([[[0, 2]] * 3], [0, 2]), ([[[0], [1, 5], []]], [[0], [1, 5], []])):
        result = logits(patched, positions, subspaces)
        assert torch.equal(result, native(architecture, featurizers.Interchange(f, **options, indices=indices)))
    assert not torch.equal(result, tiny_model(architecture)(BASE).logits)


@pytest.mark.parametrize("architecture", BY_NAME + BY_PATH)
@pytest.mark.parametrize("positions", [[3], [1, 4]], ids=["one position", "two positions"])
def test_mask_equals_the_native_backend(architecture, positions, subspace):
    patched = intervenable(architecture, subspace.get_mask_intervention(), len(positions))
    (mask,) = patched.interventions.values()
    mask.mask.data = torch.linspace(-2, 2, 6)
    mask.set_temperature(torch.tensor(0.5))
    options = {"source": {"input_ids": SOURCE}, "positions": positions}
    for hard, gate in ((False, torch.sigmoid(mask.mask.data / 0.5)), (True, (mask.mask.data > 0).float())):
        mask.hard = hard
        for training in (True, False):
            mask.train(training)  # the gate depends on its own setting, not on the mode of the module
            result = logits(patched, positions)
            assert torch.equal(result, native(architecture, featurizers.Mask(subspace, **options, gate=gate)))
    torch.testing.assert_close(mask.get_sparsity_loss(), torch.sigmoid(mask.mask / 0.5).sum())
    assert float(mask.get_temperature()) == 0.5


@pytest.mark.parametrize("architecture", BY_NAME + BY_PATH)
@pytest.mark.parametrize("positions", [[3], [1, 4]], ids=["one position", "two positions"])
def test_collect_equals_the_native_backend(architecture, positions, subspace):
    patched = intervenable(architecture, subspace.get_collect_intervention(), len(positions))
    (_, collected), _ = patched({"input_ids": BASE}, [None], {"base": [[positions] * 3]})
    expected = native(architecture, featurizers.Collect(subspace, positions=positions))
    assert torch.equal(torch.stack(list(collected)).reshape(expected.shape), expected)


def test_more_features_than_dimensions_are_collected_whole():
    class Doubled(featurizers.Featurizer):
        kind = "doubled"
        Config = type(featurizers.create("identity").config)

        def __init__(self, config):
            super().__init__(config)
            self.d_in, self.n_features = config.d_in, 2 * config.d_in

        def featurize(self, x):
            return torch.cat([x, -x], dim=-1), None

        def inverse_featurize(self, features, error):
            return features[..., : self.d_in]

    f = Doubled(Doubled.Config(d_in=WIDTH))
    patched = intervenable("gpt2", f.get_collect_intervention())
    (_, (collected, *_)), _ = patched({"input_ids": BASE}, [None], {"base": 3})
    assert collected.shape[-1] == 2 * WIDTH


def test_partitions_name_groups_of_features(subspace):
    patched = intervenable("gpt2", subspace.get_interchange_intervention(), subspace_partition=[[0, 2], [2, 6]])
    options = {"source": {"input_ids": SOURCE}, "positions": [3], "indices": [2, 3, 4, 5]}
    result = logits(patched, [3], [[[1]] * 3])
    assert torch.equal(result, native("gpt2", featurizers.Interchange(subspace, **options)))


def test_subspaces_for_some_examples_only_are_refused(subspace):
    intervention = subspace.get_interchange_intervention()()
    x = torch.randn(2, 1, WIDTH)
    with pytest.raises(UsageError, match="some examples"):
        intervention(x, x, [[0], None])
    with pytest.raises(UsageError, match="every feature"):
        subspace.get_mask_intervention()()(x, x, [[0], [1]])


def test_base_and_source_are_left_alone(subspace):
    base, source = torch.randn(2, 3, WIDTH), torch.randn(2, 3, WIDTH)
    kept = base.clone(), source.clone()
    for get in ("interchange", "mask"):
        getattr(subspace, f"get_{get}_intervention")()(embed_dim=WIDTH)(base, source)
    subspace.get_collect_intervention()(embed_dim=WIDTH)(base)
    assert torch.equal(base, kept[0])
    assert torch.equal(source, kept[1])


def test_training_through_pyvene_reaches_the_featurizer_itself(subspace):
    patched = intervenable("gpt2", subspace.get_interchange_intervention())
    (intervention,) = patched.interventions.values()
    assert intervention.featurizer is subspace
    assert [p is subspace.basis for p in intervention.parameters()] == [True]
    optimizer = torch.optim.SGD(intervention.parameters(), lr=0.1)
    before = subspace.basis.detach().clone()
    last = logits(patched, [3])[:, -1]
    torch.nn.functional.cross_entropy(last, torch.tensor([1, 2, 3])).backward()
    optimizer.step()
    assert not torch.equal(subspace.orthonormal_basis(), before)

    options = {"source": {"input_ids": SOURCE}, "positions": [3]}
    assert torch.equal(logits(patched, [3]), native("gpt2", featurizers.Interchange(subspace, **options)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_activations_come_back_in_their_dtype(dtype, subspace):
    x, y = torch.randn(2, 1, WIDTH).to(dtype), torch.randn(2, 1, WIDTH).to(dtype)
    assert subspace.get_interchange_intervention()()(x, y).dtype == dtype
    assert torch.equal(subspace.get_interchange_intervention()()(x, x.clone()), x)


def test_a_mask_needs_to_know_how_many_features_there_are():
    with pytest.raises(UsageError, match="d_in"):
        featurizers.create("identity").get_mask_intervention()()


class TestClasses:
    def test_they_are_classes_of_the_module_and_the_same_each_time(self, subspace):
        cls = subspace.get_interchange_intervention()
        assert isinstance(cls, type)
        assert cls is subspace.get_interchange_intervention()
        assert getattr(importlib.import_module(cls.__module__), cls.__qualname__) is cls

    def test_each_featurizer_has_its_own_also_after_a_copy(self, subspace):
        cls = subspace.get_interchange_intervention()
        other = copy.deepcopy(subspace)
        assert other.get_interchange_intervention() is not cls
        assert other.get_interchange_intervention().bound is other

    def test_no_other_name_is_made_up(self):
        module = importlib.import_module("featurizers.pyvene")
        for name in ("Nothing", "os_system", "FeatureNothing_1f"):
            with pytest.raises(AttributeError):
                getattr(module, name)


@pytest.mark.parametrize("by", ["component name", "instance and path"])
def test_pyvene_saves_and_loads_in_another_process_to_the_same_logits(by, subspace, tmp_path):
    cls = subspace.get_interchange_intervention()
    if by == "component name":
        patched = intervenable("gpt2", cls)
    else:
        path = Anatomy(tiny_model("gpt2")).pyvene_component("resid.post:1")
        patched = built([{"component": path, "intervention": cls()}])
    patched.save(str(tmp_path / "saved"))
    torch.save(logits(patched, [3]), tmp_path / "logits.pt")
    run_python(f"""
        import pyvene, torch
        from tests.support.models import prompts, tiny_model
        loaded = pyvene.IntervenableModel.load({str(tmp_path / "saved")!r}, tiny_model("gpt2"))
        where = [[[3]] * 3]
        inputs = [{{"input_ids": prompts(3, 6, seed=seed)}} for seed in (0, 1)]
        _, output = loaded(inputs[0], [inputs[1]], {{"sources->base": (where, where)}})
        assert torch.equal(output.logits, torch.load({str(tmp_path / "logits.pt")!r})), "other logits"
    """)


@pytest.mark.parametrize("hard", [True, False])
def test_pyvenes_files_keep_the_partition_and_how_the_gate_is_made(hard, subspace, tmp_path):
    """They also keep what was set on the intervention after it was made."""
    patched = intervenable("gpt2", subspace.get_mask_intervention())
    (mask,) = patched.interventions.values()
    mask.mask.data = torch.linspace(-2, 2, 6)
    mask.set_temperature(0.3)
    mask.hard = hard
    patched.save(str(tmp_path / "mask"))
    again = pyvene.IntervenableModel.load(str(tmp_path / "mask"), tiny_model("gpt2"))
    assert torch.equal(logits(again, [3]), logits(patched, [3]))
    (loaded,) = again.interventions.values()
    assert (loaded.hard, loaded.gate.temperature) == (hard, 0.3)

    patched = intervenable("gpt2", subspace.get_interchange_intervention())
    (swap,) = patched.interventions.values()
    swap.subspace_partition = [[0, 4], [5]]  # pyvene reads a pair of numbers as a range; this is a pair of features
    patched.save(str(tmp_path / "swap"))
    again = pyvene.IntervenableModel.load(str(tmp_path / "swap"), tiny_model("gpt2"))
    assert torch.equal(logits(again, [3], [[[0]] * 3]), logits(patched, [3], [[[0]] * 3]))
    state = {**json.loads(swap.get_extra_state()), "intervention": {"code": "x"}}
    with pytest.raises(ManifestError, match="'code': Extra inputs"):
        swap.set_extra_state(json.dumps(state))


def test_without_pyvene_there_is_one_clear_error_with_the_command():
    run_python("""
        import sys
        sys.modules["pyvene"] = None
        import featurizers
        try:
            featurizers.create("identity", d_in=4).get_interchange_intervention()
        except featurizers.errors.MissingDependencyError as error:
            assert error.package == "pyvene" and "pip install 'featurizers[pyvene]'" in str(error)
        else:
            raise SystemExit("no error")
    """)


def test_importing_the_adapter_prints_nothing():
    assert run_python("import featurizers; featurizers.pyvene.FeatureIntervention") == ""


class TestAgainstPyvenesOwn:
    """The same feature spaces as pyvene's classes, with the same weights."""

    def test_a_subspace_is_pyvenes_low_rank_rotation(self, subspace):
        peer = pyvene.LowRankRotatedSpaceIntervention(embed_dim=WIDTH, low_rank_dimension=6)
        peer.rotate_layer.weight = subspace.basis.detach().clone()
        base, source = torch.randn(5, WIDTH), torch.randn(5, WIDTH)
        torch.testing.assert_close(subspace.interchange(base, source), peer(base, source), rtol=1e-5, atol=1e-5)
        some = peer(base, source, [[1, 4]] * 5)
        torch.testing.assert_close(subspace.interchange(base, source, [1, 4]), some, rtol=1e-5, atol=1e-5)

    def test_the_whole_rotation_is_pyvenes_rotation(self):
        f = featurizers.create("subspace", d_in=WIDTH, n_features=WIDTH)
        peer = pyvene.RotatedSpaceIntervention(embed_dim=WIDTH)
        peer.rotate_layer.weight = f.basis.detach().clone()
        base, source = torch.randn(5, WIDTH), torch.randn(5, WIDTH)
        peer.set_interchange_dim(7)  # the first 7 dimensions of the rotated space
        swapped = f.interchange(base, source, list(range(7)))
        torch.testing.assert_close(swapped, peer(base.clone(), source), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("architecture", BY_NAME)
    def test_the_identity_is_pyvenes_vanilla_intervention(self, architecture):
        expected = logits(intervenable(architecture, pyvene.VanillaIntervention), [3])
        options = {"source": {"input_ids": SOURCE}, "positions": [3]}
        swap = featurizers.Interchange(featurizers.create("identity", d_in=WIDTH), **options)
        assert torch.equal(native(architecture, swap), expected)

    @pytest.mark.parametrize("architecture", BY_NAME)
    def test_a_mask_is_pyvenes_sigmoid_mask(self, architecture):
        patched = intervenable(architecture, pyvene.SigmoidMaskIntervention)
        (mask,) = patched.interventions.values()
        mask.mask.data = torch.linspace(-3, 3, WIDTH)
        mask.set_temperature(torch.tensor(0.7))
        expected = logits(patched, [3])
        gate = featurizers.SigmoidGate(WIDTH, temperature=0.7)
        gate.logits.data = torch.linspace(-3, 3, WIDTH)
        identity = featurizers.create("identity", d_in=WIDTH)
        operation = featurizers.Mask(identity, source={"input_ids": SOURCE}, positions=[3], gate=gate)
        torch.testing.assert_close(native(architecture, operation), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("part", [2, -1])
def test_a_part_that_there_is_not_is_an_error(part):
    assert indices_of_subspaces([[1], [1]], [[0, 1], [2]]) == [2]
    with pytest.raises(FeatureIndexError, match=f"part {part} is not in the subspace_partition, which has 2 parts"):
        indices_of_subspaces([[part]], [[0, 1], [2]])


def test_no_subspaces_at_all_are_every_feature_and_an_empty_list_is_none():
    assert indices_of_subspaces(None, None) is None
    assert indices_of_subspaces([None, None], None) is None
    assert indices_of_subspaces([], None) == []
    assert indices_of_subspaces([[], []], None) == []
