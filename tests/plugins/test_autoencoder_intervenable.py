"""Whole intervenables of the autoencoder plugin: saved, loaded, tampered with; and by pyvene's own save and load."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import pyvene as pv
import torch
from featurizers.anatomy import Anatomy
from featurizers.errors import ArtefactError, HubNotFoundError, ManifestError, UsageError, WeightsError
from featurizers_autoencoder import (
    AutoencoderIntervention,
    AutoencoderLayer,
    JumpReLUAutoencoderIntervention,
    get_intervenable_with_autoencoder,
    load_intervenable,
    push_intervenable,
    save_intervenable,
)
from torch import Tensor

from tests.plugins.test_autoencoder import LATENTS, LAYERS, layer, run
from tests.support.hub import LoopbackHub, connect
from tests.support.models import WIDTH, prompts, tiny_model

BASE, SOURCE = prompts(3, 6), prompts(3, 6, seed=1)


def several() -> Any:
    """Three places: two share an autoencoder, one is a jump-relu; other dimensions at each."""
    shared = layer()
    first, second = AutoencoderIntervention(autoencoder=shared), AutoencoderIntervention(autoencoder=shared)
    third = JumpReLUAutoencoderIntervention(autoencoder=layer("jumprelu"), subspace_partition=[[0, 2], [4, 9]])
    for intervention, dims in ((first, [1, 5, 45]), (second, 7), (third, None)):
        intervention.set_interchange_dim(dims)
    places = [(0, "block_output", first), (1, "mlp_output", second), (1, "block_output", third)]
    config = pv.IntervenableConfig(
        [
            {"layer": at, "component": component, "unit": "pos", "max_number_of_units": 1, "intervention": intervention}
            for at, component, intervention in places
        ]
    )
    built = pv.IntervenableModel(config, tiny_model("gpt2"))
    built.disable_model_gradients()
    return built


def run_several(intervenable: Any) -> Tensor:
    where = [[[3]] * len(BASE)] * 3
    _, output = intervenable(
        {"input_ids": BASE},
        [{"input_ids": SOURCE}] * 3,
        {"sources->base": (where, where)},
        subspaces=[None, None, [[0]] * 3],
    )
    return output.logits


def test_a_whole_intervenable_is_the_same_after_loading(tmp_path):
    built = several()
    expected = run_several(built)
    folder = save_intervenable(built, tmp_path / "it")
    assert sorted(p.name for p in folder.iterdir()) == ["intervenable.json", "intervenable.safetensors"]
    record = json.loads((folder / "intervenable.json").read_text())
    assert len(record["autoencoders"]) == 2, "a shared autoencoder is stored once"
    again = load_intervenable(folder, tiny_model("gpt2"))
    assert torch.equal(run_several(again), expected)
    first, second, third = again.interventions.values()
    assert first.autoencoder is second.autoencoder
    assert third.subspace_partition == [[0, 1], [4, 5, 6, 7, 8]]
    assert torch.equal(first.interchange_dim, torch.tensor([1, 5, 45]))
    with pytest.raises(ArtefactError, match="choose a new or an empty folder"):
        save_intervenable(built, folder)
    with torch.no_grad():
        for parameter in first.autoencoder.parameters():
            parameter.add_(0.1)
    assert not torch.equal(run_several(again), expected), "the weights matter"


def test_another_process_gets_the_same_logits(tmp_path):
    expected = run_several(several())
    save_intervenable(several(), tmp_path / "it")
    torch.save(expected, tmp_path / "logits.pt")
    script = f"""
        import torch
        from featurizers_autoencoder import load_intervenable
        from tests.plugins.test_autoencoder_intervenable import run_several
        from tests.support.models import tiny_model
        torch.set_num_threads(1)
        found = run_several(load_intervenable({str(tmp_path / "it")!r}, tiny_model("gpt2")))
        assert torch.equal(found, torch.load({str(tmp_path / "logits.pt")!r})), "other logits"
    """
    here = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=here,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_over_the_hub_in_one_commit(tmp_path, monkeypatch):
    hub = LoopbackHub(tmp_path / "server")
    connect(monkeypatch, hub.url, tmp_path / "home")
    try:
        built = several()
        commit = push_intervenable(built, "alice/it")
        assert len(hub.titles("alice/it")) == 1
        assert commit.oid == hub.head("alice/it")
        again = load_intervenable("alice/it", tiny_model("gpt2"))
        assert torch.equal(run_several(again), run_several(built))
        with pytest.raises(HubNotFoundError):
            load_intervenable("alice/none", tiny_model("gpt2"))
    finally:
        hub.stop()


TAMPERED: dict[str, tuple[Any, str]] = {
    "a class path": (lambda r: r["representations"][0].update(intervention="os.system"), "'os.system' is not known"),
    "an autoencoder's class path": (lambda r: r["autoencoders"][0].update(kind="a.B"), "'a.B' is not known"),
    "an unknown key": (lambda r: r.update(code="x"), "'code': Extra inputs"),
    "a newer version": (lambda r: r.update(format_version=2), "'format_version'"),
    "an autoencoder too far": (lambda r: r["representations"][0].update(autoencoder=9), "there is no autoencoder 9"),
    "a dimension too far": (lambda r: r["representations"][0].update(interchange_dim=[50]), "beyond the 50 latents"),
    "a dimension beyond 64 bits": (lambda r: r["representations"][0].update(interchange_dim=10**30), "is a number of"),
    "a part too far": (
        lambda r: r["representations"][0].update(subspace_partition=[[0, 50]]),
        "none of the 50",
    ),
    "a negative layer": (lambda r: r["representations"][0].update(layer=-1), "greater than or equal to 0"),
    "no units": (lambda r: r["representations"][0].update(max_number_of_units=0), "max_number_of_units"),
    "an unknown unit": (lambda r: r["representations"][0].update(unit="t"), "'pos', 'h' or 'h.pos'"),
    "a group alone": (lambda r: r["representations"][0].update(group_key=1), "and others none"),
    "other sizes": (lambda r: r["autoencoders"][0].update(latent_dim=49), "its config implies"),
    "enormous sizes": (lambda r: r["autoencoders"][0].update(latent_dim=2**30), "its config implies"),
    "another checksum": (lambda r: r.update(sha256="0" * 64), "has sha256"),
    "no representations": (lambda r: r.update(representations=[]), "'representations'"),
}


@pytest.mark.parametrize(("change", "words"), TAMPERED.values(), ids=TAMPERED)
def test_what_was_tampered_with_is_refused(change, words, tmp_path):
    folder = save_intervenable(several(), tmp_path / "it")
    record = json.loads((folder / "intervenable.json").read_text())
    change(record)
    (folder / "intervenable.json").write_text(json.dumps(record))
    with pytest.raises((ManifestError, WeightsError), match=words) as caught:
        load_intervenable(folder, tiny_model("gpt2"))
    assert str(folder) in str(caught.value)


def test_what_is_missing_or_damaged_is_refused(tmp_path):
    folder = save_intervenable(several(), tmp_path / "it")
    weights = folder / "intervenable.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(WeightsError, match="has sha256"):
        load_intervenable(folder, tiny_model("gpt2"))
    weights.rename(tmp_path / "elsewhere")
    weights.symlink_to("../elsewhere")
    with pytest.raises(ManifestError, match="is a link out of this folder"):
        load_intervenable(folder, tiny_model("gpt2"))
    weights.unlink()
    with pytest.raises(WeightsError, match="is missing"):
        load_intervenable(folder, tiny_model("gpt2"))
    (folder / "intervenable.json").write_text("{")
    with pytest.raises(ManifestError, match="not valid JSON"):
        load_intervenable(folder, tiny_model("gpt2"))
    with pytest.raises(ManifestError, match="cannot be read"):
        load_intervenable(tmp_path / "none", tiny_model("gpt2"))
    with pytest.raises(UsageError, match="not in 'sparsify:x'"):
        load_intervenable("sparsify:x", tiny_model("gpt2"))
    with pytest.raises(UsageError, match="pyvene cannot place it in a Linear"):
        load_intervenable(save_intervenable(several(), tmp_path / "more"), torch.nn.Linear(2, 2))


@pytest.mark.parametrize("layer_number", [0, None])
def test_places_named_by_path_in_models_that_pyvene_does_not_list(layer_number, tmp_path):
    def placed() -> Any:
        model = tiny_model("gemma3")
        path = Anatomy(model).pyvene_component("resid.post:1")
        intervention = JumpReLUAutoencoderIntervention(autoencoder=layer("jumprelu"))
        intervention.set_interchange_dim([1, 5, 45])
        place = {"layer": layer_number, "component": path, "max_number_of_units": 2, "intervention": intervention}
        return pv.IntervenableModel(pv.IntervenableConfig([place]), model)

    built = placed()
    again = load_intervenable(save_intervenable(built, tmp_path / "it"), tiny_model("gemma3"))
    assert torch.equal(run(again, [1, 4]), run(built, [1, 4]))
    assert not torch.equal(run(again, [1, 4]), tiny_model("gemma3")(BASE).logits)


def test_a_linked_intervention_stays_one_and_a_strange_unit_is_refused(tmp_path):
    intervention = AutoencoderIntervention(autoencoder=layer().bfloat16())
    config = [
        {"layer": i, "component": "block_output", "intervention": intervention, "intervention_link_key": 0}
        for i in (0, 1)
    ]
    built = pv.IntervenableModel(pv.IntervenableConfig(config, mode="serial"), tiny_model("gpt2"))
    again = load_intervenable(save_intervenable(built, tmp_path / "it"), tiny_model("gpt2"))
    first, second = again.interventions.values()
    assert first is second
    assert again.mode == "serial"
    assert all(p.dtype == torch.bfloat16 for p in first.parameters())
    (key, representation), *_ = built.representations.items()
    built.representations[key] = representation._replace(unit="t")
    with pytest.raises(UsageError, match=r"is 't'; only pos, h and h\.pos are saved"):
        save_intervenable(built, tmp_path / "more")


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("dims", [None, 7, [1, 5, 45]])
def test_pyvenes_own_save_and_load_give_the_same(kind, dims, tmp_path):
    built = get_intervenable_with_autoencoder(tiny_model("gpt2"), layer(kind), dims, 1, max_number_of_units=2)
    (intervention,) = built.interventions.values()
    intervention.subspace_partition = [[0, 1], [4, 5, 6]]
    built.save(str(tmp_path / "it"))
    again = pv.IntervenableModel.load(str(tmp_path / "it"), tiny_model("gpt2"))
    for subspaces in (None, [[[0]] * 3]):
        assert torch.equal(run(again, [1, 4], subspaces), run(built, [1, 4], subspaces))
    (loaded,) = again.interventions.values()
    assert type(loaded.autoencoder) is LAYERS[kind]


def test_pyvenes_load_takes_fewer_latents_than_dimensions(tmp_path):
    intervention = AutoencoderIntervention(autoencoder=AutoencoderLayer(WIDTH, 7))
    place = {"layer": 1, "component": "block_output", "intervention": intervention, "latent_dim": 7}
    built = pv.IntervenableModel(pv.IntervenableConfig([place]), tiny_model("gpt2"))
    built.save(str(tmp_path / "it"))
    again = pv.IntervenableModel.load(str(tmp_path / "it"), tiny_model("gpt2"))
    assert torch.equal(run(again, [3]), run(built, [3]))
    assert next(iter(again.interventions.values())).interchange_dim is None


def test_an_intervention_without_its_autoencoder_says_so():
    waiting = AutoencoderIntervention(component="block_output", latent_dim=LATENTS, embed_dim=None)
    with pytest.raises(UsageError, match="there is no autoencoder yet; give latent_dim"):
        waiting(torch.zeros(1, 1, 4), torch.zeros(1, 1, 4))
    with pytest.raises(UsageError, match=r"no autoencoder of ours but 'os\.system'"):
        waiting.set_extra_state(json.dumps({**STATE, "autoencoder": "os.system"}))
    with pytest.raises(UsageError, match="no autoencoder of ours but None"):
        waiting.set_extra_state(json.dumps({**STATE, "autoencoder": None}))


STATE: dict[str, Any] = {
    "autoencoder": "autoencoder-layer",
    "sizes": [4, 6],
    "interchange_dim": [1],
    "subspace_partition": None,
}
DAMAGED = {
    "not JSON": ("{", "Invalid JSON"),
    "no object": ("[]", "object"),
    "no string": (3, "JSON"),
    "nothing": ("{}", "'autoencoder': Field required"),
    "an unknown key": (json.dumps({**STATE, "code": "x"}), "'code': Extra inputs"),
    "a list for a name": (json.dumps({**STATE, "autoencoder": ["a"]}), "'autoencoder'"),
    "a word for a size": (json.dumps({**STATE, "sizes": ["x", 1]}), "sizes"),
    "one size": (json.dumps({**STATE, "sizes": [4]}), "sizes"),
    "a negative size": (json.dumps({**STATE, "sizes": [-1, 6]}), "sizes"),
    "enormous sizes": (json.dumps({**STATE, "sizes": [2**30, 2**30]}), "cannot be made"),
    "a word for latents": (json.dumps({**STATE, "interchange_dim": "q"}), "interchange_dim"),
    "a number for parts": (json.dumps({**STATE, "subspace_partition": 5}), "subspace_partition"),
}


@pytest.mark.parametrize(("state", "words"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_state_is_refused(state, words):
    waiting = AutoencoderIntervention(component="block_output", latent_dim=LATENTS, embed_dim=None)
    with pytest.raises(ManifestError, match=words) as caught:
        waiting.set_extra_state(state)
    assert "AutoencoderIntervention" in str(caught.value)
    waiting.set_extra_state(json.dumps(STATE))
    assert waiting.interchange_dim.tolist() == [1]
