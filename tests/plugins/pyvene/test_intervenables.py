"""Whole pyvene models, saved and loaded: the logits are equal bit for bit, and shared objects are shared again."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import featurizers
import pytest
import pyvene as pv
import torch
from featurizers.errors import ArtefactError, MissingDependencyError, PluginError, ShapeError, UsageError
from featurizers.models import Anatomy
from featurizers.pyvene import FeatureIntervention, FeatureInterventionConfig
from featurizers.registry import host
from featurizers_pyvene import load_intervenable, loading, save_intervenable
from featurizers_pyvene.lookup import intervention_class
from torch import Tensor, nn

from tests.support.dictionaries import dictionary
from tests.support.intervenables import BASE, built, logits, logits_of_several, several, subspace
from tests.support.models import HEADS, WIDTH, hooked, module_of, prompts, read, tiny_model
from tests.support.processes import run_python

FILES = {"config.json", "README.md", "intervenable.json", "intervenable.safetensors"}
ARTEFACT = {"config.json", "README.md", "model.safetensors"}


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def again(intervenable: Any, folder: Path, architecture: str = "gpt2", **options: Any) -> Any:
    return load_intervenable(save_intervenable(intervenable, folder), tiny_model(architecture), **options)


# ---------------------------------------------------------------------- the same logits


def test_several_places_are_the_same_after_loading(tmp_path):
    saved = several()
    loaded = again(saved, tmp_path / "it")
    expected = logits_of_several(saved)
    assert torch.equal(logits_of_several(loaded), expected)
    assert files(tmp_path / "it") == FILES | {f"featurizer-{i}/{name}" for i in range(3) for name in ARTEFACT}
    assert list(loaded.representations) == list(saved.representations)
    assert loaded.sorted_keys == saved.sorted_keys
    first, second, third, mask = loaded.interventions.values()
    assert first.featurizer is second.featurizer
    assert first.featurizer is not third.featurizer, "equal, but two"
    assert first.subspace_partition == [[0, 1], [2, 3, 4, 5]]
    assert mask.gate.temperature == 0.3
    for name, change in (
        ("a weight", lambda: first.featurizer.load_state_dict(subspace(seed=9).state_dict())),
        ("the partition", lambda: setattr(first, "subspace_partition", [[0], [1]])),
        ("the gate", mask.mask.data.neg_),
        ("the temperature", lambda: mask.set_temperature(1)),
    ):
        before = logits_of_several(loaded)
        change()
        assert not torch.equal(logits_of_several(loaded), before), f"{name} matters"


def test_another_process_gets_the_same_logits(tmp_path):
    folder = save_intervenable(several(), tmp_path / "it")
    torch.save(logits_of_several(several()), tmp_path / "logits.pt")
    printed = run_python(f"""
        import torch
        import featurizers
        torch.set_num_threads(1)
        from tests.support.models import tiny_model
        loaded = featurizers.load_intervenable({str(folder)!r}, tiny_model("gpt2"))
        from tests.support.intervenables import logits_of_several
        assert torch.equal(logits_of_several(loaded), torch.load({str(tmp_path / "logits.pt")!r})), "other logits"
    """)
    assert printed == "", "what pyvene prints on import is suppressed"


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gemma3", "qwen3"])
@pytest.mark.parametrize("kind", ["interchange", "mask", "collect"])
@pytest.mark.parametrize("positions", [[3], [1, 4]], ids=["one position", "two positions"])
def test_each_kind_is_what_a_plain_hook_gives(architecture, kind, positions, tmp_path):
    """Places are given by name and class in models that pyvene lists, by path and instance in others."""
    model, f = tiny_model(architecture), subspace()
    cls = getattr(f, f"get_{kind}_intervention")()
    place: dict[str, Any] = {"layer": 1, "max_number_of_units": len(positions), "intervention_type": cls}
    if architecture in ("gemma3", "qwen3"):
        del place["intervention_type"]
        place |= {"component": Anatomy(model).pyvene_component("resid.post:1"), "intervention": cls()}
    saved = built([place], architecture)
    if kind == "mask":
        next(iter(saved.interventions.values())).mask.data = torch.linspace(-2, 2, 6)
    loaded = again(saved, tmp_path / "it", architecture)

    module, side = module_of(model, architecture, "resid.post", 1)
    source = read(model, module, side, input_ids=prompts(3, 6, seed=1))[:, positions]
    base = read(model, module, side, input_ids=BASE)[:, positions]
    if kind == "collect":
        before, after = (
            torch.cat(list(model({"input_ids": BASE}, [None], {"base": [[positions] * 3]})[0][1]))
            for model in (saved, loaded)
        )
        assert torch.equal(after, before)
        assert torch.equal(after.reshape(3, -1, 6), f.collect(base))
        return

    def edit(hidden: Tensor) -> Tensor:
        hidden = hidden.clone()
        gate = torch.sigmoid(torch.linspace(-2, 2, 6))
        x = hidden[:, positions]
        hidden[:, positions] = f.interchange(x, source) if kind == "interchange" else f.mask(x, source, gate)
        return hidden

    with hooked(module, side, edit):
        expected = model(BASE).logits
    assert torch.equal(logits(loaded, positions), expected)
    assert torch.equal(logits(saved, positions), expected)
    assert not torch.equal(expected, model(BASE).logits)


@pytest.mark.parametrize("hard", [True, False])
def test_a_gate_is_hard_or_soft_as_it_was(hard, tmp_path):
    mask = subspace().get_mask_intervention()()
    mask.mask.data = torch.linspace(-2, 2, 6)
    mask.hard = hard
    saved = built([{"layer": 1, "intervention": mask}])
    loaded = again(saved, tmp_path / "it")
    assert torch.equal(logits(loaded), logits(saved))
    (other,) = loaded.interventions.values()
    assert other.hard is hard
    other.hard = not hard
    assert not torch.equal(logits(loaded), logits(saved))
    assert other.mask.requires_grad


@pytest.mark.parametrize(
    ("partition", "subspaces"),
    [(None, None), (None, [[[0, 3]] * 3]), ([[0, 5], [5, 31]], [[[1]] * 3]), ([[0, 5], [5, 31]], [[[0, 1]] * 3])],
)
def test_the_identity_is_pyvenes_vanilla_intervention(partition, subspaces, tmp_path):
    place: dict[str, Any] = {"layer": 1, "subspace_partition": partition}
    f = featurizers.create("identity", d_in=WIDTH)
    saved = built([{**place, "intervention_type": f.get_interchange_intervention()}])
    loaded = again(saved, tmp_path / "it")
    vanilla = built([{**place, "intervention_type": pv.VanillaIntervention}])
    assert torch.equal(logits(loaded, subspaces=subspaces), logits(vanilla, subspaces=subspaces))
    (representation,) = loaded.representations.values()
    assert representation.subspace_partition == partition, "pyvene's own save needs it"


@pytest.mark.parametrize("unit", ["h.pos", "h"])
def test_heads(unit, tmp_path):
    f = featurizers.create("subspace", d_in=WIDTH // HEADS, n_features=3, seed=1)
    place = {"layer": 1, "component": "head_attention_value_output", "unit": unit, "max_number_of_units": 2}
    saved = built([{**place, "intervention": f.get_interchange_intervention()()}])
    loaded = again(saved, tmp_path / "it")
    heads, positions = [[1, 3]] * 3, [[2, 4]] * 3
    where = [[heads, positions]] if unit == "h.pos" else [heads]

    def run(intervenable: Any) -> Tensor:
        source = {"input_ids": prompts(3, 6, seed=1)}
        return intervenable({"input_ids": BASE}, [source], {"sources->base": (where, where)})[1].logits

    assert torch.equal(run(loaded), run(saved))
    assert not torch.equal(run(loaded), tiny_model("gpt2")(BASE).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_are_kept_and_the_device_is_the_models(dtype, tmp_path):
    mask = subspace().to(dtype).get_mask_intervention()().to(dtype)
    saved = built([{"layer": 1, "intervention": mask}])
    for device in (None, "cpu", torch.device("cpu")):
        loaded = again(saved, tmp_path / "it", device=device)
        (other,) = loaded.interventions.values()
        assert {p.dtype for p in other.parameters()} == {dtype}
        assert {p.device for p in other.parameters()} == {torch.device("cpu")}
        assert torch.equal(logits(loaded), logits(saved))
    with pytest.raises(UsageError, match="device must be a device such as"):
        load_intervenable(tmp_path / "it", tiny_model("gpt2"), device="nowhere")


@pytest.mark.parametrize("rule", ["topk", "jumprelu"])
def test_any_kind_of_featurizer(rule, tmp_path):
    f = dictionary(rule, d_in=WIDTH) >> featurizers.create("identity")
    saved = built([{"layer": 1, "intervention": f.get_interchange_intervention()()}])
    loaded = again(saved, tmp_path / "it")
    assert torch.equal(logits(loaded, subspaces=[[[1, 5]] * 3]), logits(saved, subspaces=[[[1, 5]] * 3]))


# ---------------------------------------------------------------------- links, groups, order


def test_links_are_one_object_and_groups_stay(tmp_path):
    f, g = subspace(), subspace(4, 5)
    linked = f.get_interchange_intervention()
    places = [
        {"layer": 0, "intervention": linked(), "intervention_link_key": 7, "group_key": 0},
        {"layer": 1, "intervention": g.get_interchange_intervention()(), "group_key": 0},
        {"layer": 2, "intervention": linked(), "intervention_link_key": 7, "group_key": 1},
    ]
    saved = built(places)
    first, _, third = saved.interventions.values()
    assert first is third, "pyvene made them one object"
    loaded = again(saved, tmp_path / "it")
    first, second, third = loaded.interventions.values()
    assert first is third
    assert first is not second
    assert loaded._intervention_group == saved._intervention_group
    assert loaded._intervention_reverse_link == saved._intervention_reverse_link
    record = json.loads((tmp_path / "it" / "intervenable.json").read_text())
    assert len(record["interventions"]) == 2

    def run(intervenable: Any) -> Tensor:
        where = [[[3]] * 3] * 3
        sources = [{"input_ids": prompts(3, 6, seed=i)} for i in (1, 2)]
        return intervenable({"input_ids": BASE}, sources, {"sources->base": (where, where)})[1].logits

    assert torch.equal(run(loaded), run(saved))
    alone = built([{**place, "intervention_link_key": None} for place in places])
    assert not torch.equal(run(alone), run(saved)), "without links the places have interventions of their own"


def test_one_intervention_at_two_places_without_a_link_is_one(tmp_path):
    intervention = subspace().get_interchange_intervention()()
    loaded = again(built([{"layer": i, "intervention": intervention} for i in (0, 2)]), tmp_path / "it")
    first, second = loaded.interventions.values()
    assert first is second
    assert loaded._intervention_reverse_link == {}


def test_serial_mode(tmp_path):
    f = subspace()
    saved = built([{"layer": i, "intervention": f.get_interchange_intervention()()} for i in (0, 1)], mode="serial")
    loaded = again(saved, tmp_path / "it")
    assert loaded.mode == "serial"

    def run(intervenable: Any) -> Tensor:
        where = [[[3]] * 3]
        sources = [{"input_ids": prompts(3, 6, seed=i)} for i in (1, 2)]
        locations = {"source_0->source_1": (where, where), "source_1->base": (where, where)}
        return intervenable({"input_ids": BASE}, sources, locations)[1].logits

    assert torch.equal(run(loaded), run(saved))


def test_the_order_that_a_caller_chose(tmp_path):
    f, g = subspace(), subspace(4, 5)
    places = [{"layer": i, "intervention": h.get_interchange_intervention()()} for i, h in ((2, f), (0, g))]
    saved = built(places, intervenables_sort_fn=lambda model, representations: list(representations)[::-1])
    assert list(saved.representations) != saved.sorted_keys
    loaded = again(saved, tmp_path / "it")
    assert loaded.sorted_keys == saved.sorted_keys
    assert torch.equal(logits(loaded), logits(saved))
    assert not torch.equal(logits(built(places)), logits(saved))


def test_fast_is_what_was_asked_for_and_not_what_a_call_left_behind(tmp_path):
    for fast in (False, True):
        saved = built([{"layer": 1, "intervention": subspace().get_interchange_intervention()()}], use_fast=fast)
        saved({"input_ids": BASE}, [{"input_ids": BASE}], {"sources->base": 3})
        assert saved.use_fast is True, "pyvene sets it in the call"
        assert again(saved, tmp_path / "it").use_fast is fast
    saved = built([{"layer": 1, "intervention": subspace().get_interchange_intervention()()}], as_adaptor=True)
    assert again(saved, tmp_path / "it").as_adaptor is True


def test_training_goes_on_through_the_shared_featurizer(tmp_path):
    loaded = again(several(), tmp_path / "it")
    first, second, _, mask = loaded.interventions.values()
    logits_of_several(loaded).square().mean().backward()
    assert first.featurizer.basis.grad is second.featurizer.basis.grad is not None
    assert mask.mask.grad.abs().max() > 0
    assert all(p.grad is None for p in loaded.model.parameters())


# ---------------------------------------------------------------------- the folder


def test_each_featurizer_is_loaded_by_itself(tmp_path):
    saved = several()
    folder = save_intervenable(saved, tmp_path / "it")
    entries = featurizers.list_artefacts(folder)
    assert list(entries) == ["featurizer-0", "featurizer-1", "featurizer-2"]
    f = featurizers.load(folder, subfolder="featurizer-2", verify=True)
    assert torch.equal(f.basis, list(saved.interventions.values())[3].featurizer.basis)
    assert "featurizers.load_intervenable" in (folder / "README.md").read_text()


def test_a_folder_is_replaced_as_a_whole_and_other_files_stay(tmp_path):
    folder = save_intervenable(several(), tmp_path / "it")
    (folder / "notes.txt").write_text("mine")
    record = folder / "intervenable.json"
    old_bytes, hard_link = record.read_bytes(), tmp_path / "link.json"
    os.link(record, hard_link)
    gate = subspace().get_mask_intervention()()
    gate.mask.data = torch.linspace(-1, 1, 6)
    one = built([{"layer": 1, "intervention": gate}])
    loaded = again(one, folder)
    assert torch.equal(logits(loaded), logits(one))
    assert files(folder) == FILES | {f"featurizer-0/{name}" for name in ARTEFACT} | {"notes.txt"}
    assert hard_link.read_bytes() == old_bytes != record.read_bytes(), "the old file is not written to"
    before = {name: (folder / name).read_bytes() for name in files(folder)}
    broken = several()
    list(broken.interventions.values())[3].mask.data[2] = float("nan")
    with pytest.raises(featurizers.errors.WeightsError, match="NaN"):
        save_intervenable(broken, folder)
    invalid = several()
    invalid.mode = "x"  # this is checked after the tensors are written
    list(invalid.interventions.values())[3].mask.data.zero_()
    with pytest.raises(UsageError, match="'mode'"):
        save_intervenable(invalid, folder)
    assert before == {name: (folder / name).read_bytes() for name in files(folder)}
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.txt").write_text("a")
    with pytest.raises(ArtefactError, match="not empty and not an artefact"):
        save_intervenable(one, tmp_path / "other")
    assert files(tmp_path / "other") == {"a.txt"}


def of_identity(d_in: int | None, part: list[int]) -> Any:
    """Build a model with an identity, whose (empty) weights do not depend on its width."""
    f = featurizers.create("identity", d_in=d_in)
    intervention = f.get_interchange_intervention()()
    intervention.subspace_partition = [part]
    return built([{"layer": 1, "intervention": intervention}])


@pytest.mark.parametrize("differ", ["weights", "configs alone"])
def test_a_load_that_meets_a_saver_reads_again(differ, tmp_path, monkeypatch):
    if differ == "weights":
        old, new = several(), several()
        for intervention in list(new.interventions.values())[:2]:
            intervention.featurizer.load_state_dict(subspace(seed=9).state_dict())
    else:
        old, new = of_identity(None, [0, 1]), of_identity(WIDTH, [2, 3])
    folder, met = save_intervenable(old, tmp_path / "it"), []
    read_record = loading.read_record

    def meeting(*arguments: Any) -> Any:
        record = read_record(*arguments)
        if not met:
            met.append(save_intervenable(new, folder))
        return record

    monkeypatch.setattr(loading, "read_record", meeting)
    loaded = load_intervenable(folder, tiny_model("gpt2"))
    assert met
    if differ == "weights":
        assert torch.equal(logits_of_several(loaded), logits_of_several(new))
    else:
        (intervention,) = loaded.interventions.values()
        assert (intervention.featurizer.d_in, intervention.subspace_partition) == (WIDTH, [[2, 3]])


def test_a_model_of_another_width_is_refused(tmp_path):
    model = tiny_model("gpt2", n_embd=16, n_inner=None)
    narrow = featurizers.create("subspace", d_in=16, n_features=2)
    for component in ("block_output", "transformer.h[1].output", "transformer.h.1.mlp.output"):
        place = {"layer": 1, "component": component, "intervention": narrow.get_interchange_intervention()()}
        folder = save_intervenable(built([place]), tmp_path / component)
        with pytest.raises(
            ShapeError, match="takes activations of width 16, but those of this GPT2LMHeadModel have 32"
        ):
            load_intervenable(folder, tiny_model("gpt2"))
        load_intervenable(folder, model)
    place = {"layer": 1, "component": "mlp_activation", "intervention": narrow.get_interchange_intervention()()}
    loaded = again(built([place]), tmp_path / "late")
    with pytest.raises(ShapeError, match="takes activations of width 16, got shape"):
        logits(loaded)


def test_a_model_without_the_place_is_refused(tmp_path):
    folder = save_intervenable(several(), tmp_path / "it")
    with pytest.raises(UsageError, match="pyvene cannot place it in a Linear"):
        load_intervenable(folder, nn.Linear(2, 2))
    with pytest.raises(UsageError, match="pyvene cannot place it in a GPT2LMHeadModel"):
        load_intervenable(folder, tiny_model("gpt2", n_layer=1))
    with pytest.raises(UsageError, match="not in 'sae-lens:x'"):
        load_intervenable("sae-lens:x", nn.Linear(2, 2))


# ---------------------------------------------------------------------- what can be saved


def test_what_no_file_may_name_is_refused(tmp_path):
    class Mine(type(subspace().get_interchange_intervention()()).__bases__[0]):
        pass

    mine = Mine()
    mine.featurizer = subspace()
    for intervention, words in (
        ({"intervention_type": pv.VanillaIntervention}, "is a VanillaIntervention, which no file may name"),
        ({"intervention": mine}, "is a Mine, which no file may name"),
        ({"intervention": intervention_class("interchange")()}, "has no featurizer yet"),
    ):
        with pytest.raises(UsageError, match=words):
            save_intervenable(built([{"layer": 1, **intervention}]), tmp_path / "it")
    with_source = subspace().get_interchange_intervention()(source_representation=torch.zeros(WIDTH))
    with pytest.raises(UsageError, match="such as a source_representation, are not saved"):
        save_intervenable(built([{"layer": 1, "intervention": with_source}]), tmp_path / "it")
    strange = several()
    key = next(iter(strange.representations))
    strange.representations[key] = strange.representations[key]._replace(unit="t")
    with pytest.raises(UsageError, match=r"'unit': Input should be 'pos', 'h' or 'h\.pos'"):
        save_intervenable(strange, tmp_path / "it")
    with pytest.raises(
        UsageError, match="the pyvene model cannot be saved: 'mode': Input should be 'parallel' or 'ser"
    ):
        save_intervenable(
            built([{"layer": 1, "intervention": subspace().get_interchange_intervention()()}], mode="x"),
            tmp_path / "it",
        )
    with pytest.raises(UsageError, match=r"takes a pyvene\.IntervenableModel, not a Linear"):
        save_intervenable(nn.Linear(2, 2), tmp_path / "it")
    assert not (tmp_path / "it").exists()


class ScaledConfig(FeatureInterventionConfig):
    strength: float


class Scaled(FeatureIntervention, pv.DistributedRepresentationIntervention):
    """Intervention of a plugin, with an argument and a tensor of its own."""

    kind = "identity.scaled"
    Config = ScaledConfig

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.strength = 1.0

    def attach(self, featurizer):
        super().attach(featurizer)
        self.direction = nn.Parameter(torch.zeros(featurizer.n_features))

    def get_config(self):
        return ScaledConfig(**super().get_config().model_dump(), strength=self.strength)

    def set_config(self, config):
        super().set_config(config)
        self.strength = config.strength

    def forward(self, base, source, subspaces=None, **_):
        return self.featurizer.steer(base, self.strength * self.direction)


@pytest.fixture
def plugin(monkeypatch):
    """List of the interventions that the plugin ``identity`` registers in this test."""
    import featurizers_identity

    registered: list[Any] = [Scaled]

    @featurizers.hookimpl
    def featurizers_interventions(register):
        for cls in registered:
            register(cls)

    monkeypatch.setattr(featurizers_identity, "featurizers_interventions", featurizers_interventions, raising=False)
    host.cache_clear()
    yield registered
    host.cache_clear()


def test_a_plugins_intervention_keeps_its_arguments_and_tensors(tmp_path, plugin):
    scaled = Scaled()
    scaled.attach(subspace())
    scaled.direction.data = torch.linspace(-1, 1, 6)
    scaled.strength = 3.0
    saved = built([{"layer": 1, "intervention": scaled}])
    loaded = again(saved, tmp_path / "it")
    (other,) = loaded.interventions.values()
    assert type(other) is Scaled
    assert other.strength == 3.0
    assert torch.equal(logits(loaded), logits(saved))
    other.strength = 1.0
    assert not torch.equal(logits(loaded), logits(saved))
    plugin.clear()
    with pytest.raises(featurizers.errors.UnknownKindError, match=r"intervention 'identity.scaled'. The plugin 'iden"):
        load_intervenable(tmp_path / "it", tiny_model("gpt2"))
    with pytest.raises(featurizers.errors.UnknownKindError):
        save_intervenable(saved, tmp_path / "more")


def test_a_plugin_at_fault_is_named(tmp_path, plugin, monkeypatch):
    scaled = Scaled()
    scaled.attach(subspace())
    folder = save_intervenable(built([{"layer": 1, "intervention": scaled}]), tmp_path / "it")
    for wrong, words in (
        ([Scaled, type("Other", (Scaled,), {})], "'identity.scaled' is registered already"),
        ([nn.Linear], "not a subclass of featurizers.SavedIntervention"),
        ([type("Other", (Scaled,), {"kind": "mask"})], "must be 'identity' or start with 'identity.'"),
        ([type("Other", (Scaled,), {"Config": dict})], "must be a pydantic model"),
    ):
        plugin[:] = wrong
        with pytest.raises(PluginError, match=rf"the plugin 'identity' cannot be used: .*{words}"):
            load_intervenable(folder, tiny_model("gpt2"))
    plugin[:] = [Scaled]
    for name in ("from_config", "check", "load_state_dict"):
        with monkeypatch.context() as patch:
            patch.setattr(Scaled, name, lambda *_, **__: 1 / 0)
            with pytest.raises(PluginError, match=r"it: the intervention 'identity.scaled' failed on it: ZeroDivision"):
                load_intervenable(folder, tiny_model("gpt2"))

    class Forgetful(Scaled):
        def attach(self, featurizer):
            super().attach(featurizer)
            self.register_buffer("lost", torch.zeros(2), persistent=False)

    plugin[:] = [Forgetful]
    with pytest.raises(PluginError, match="has tensors that no file holds"):
        load_intervenable(folder, tiny_model("gpt2"))


def test_without_pyvene_there_is_one_clear_error(tmp_path):
    folder = save_intervenable(several(), tmp_path / "it")
    run_python(f"""
        import sys
        sys.modules["pyvene"] = None
        import featurizers, torch
        try:
            featurizers.load_intervenable({str(folder)!r}, torch.nn.Linear(2, 2))
        except featurizers.errors.MissingDependencyError as error:
            assert "pip install 'featurizers[pyvene]'" in str(error)
        else:
            raise SystemExit("no error")
    """)
    assert issubclass(MissingDependencyError, ImportError)
