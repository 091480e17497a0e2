"""pyvene models with autoencoders: saved, loaded and tampered with; also by pyvene's own save and load."""

from __future__ import annotations

import json
from typing import Any

import featurizers
import pytest
import pyvene as pv
import torch
from featurizers.errors import FeaturizerError, ManifestError, UsageError
from featurizers.models import Anatomy
from featurizers_autoencoder import (
    AutoencoderIntervention,
    AutoencoderLayer,
    JumpReLUAutoencoderIntervention,
    get_intervenable_with_autoencoder,
)
from featurizers_pyvene import load_intervenable, save_intervenable
from torch import Tensor

from tests.plugins.autoencoder.test_autoencoder import LATENTS, LAYERS, layer
from tests.support.hub import edit
from tests.support.intervenables import BASE, built, logits
from tests.support.models import WIDTH, tiny_model
from tests.support.processes import run_python


def several() -> Any:
    """Build three places with different dimensions: two share an autoencoder, the third has a JumpReLU one."""
    shared = layer()
    first, second = AutoencoderIntervention(autoencoder=shared), AutoencoderIntervention(autoencoder=shared)
    third = JumpReLUAutoencoderIntervention(autoencoder=layer("jumprelu"), subspace_partition=[[0, 2], [4, 9]])
    for intervention, dims in ((first, [1, 5, 45]), (second, 7), (third, None)):
        intervention.set_interchange_dim(dims)
    patched = built(
        [
            {"layer": 0, "intervention": first},
            {"layer": 1, "component": "mlp_output", "intervention": second},
            {"layer": 1, "intervention": third},
        ]
    )
    patched.disable_model_gradients()
    return patched


def run_several(intervenable: Any) -> Tensor:
    return logits(intervenable, [3], [None, None, [[0]] * 3])


def test_a_whole_intervenable_is_the_same_after_loading(tmp_path):
    saved = several()
    expected = run_several(saved)
    folder = save_intervenable(saved, tmp_path / "it")
    assert list(featurizers.list_artefacts(folder)) == ["featurizer-0", "featurizer-1"], (
        "the shared autoencoder is stored once"
    )
    again = load_intervenable(folder, tiny_model("gpt2"))
    assert torch.equal(run_several(again), expected)
    first, second, third = again.interventions.values()
    assert first.autoencoder is second.autoencoder
    assert third.subspace_partition == [[0, 1], [4, 5, 6, 7, 8]]
    assert torch.equal(first.interchange_dim, torch.tensor([1, 5, 45]))
    with torch.no_grad():
        for parameter in first.autoencoder.parameters():
            parameter.add_(0.1)
    assert not torch.equal(run_several(again), expected), "the weights matter"


def test_another_process_gets_the_same_logits(tmp_path):
    expected = run_several(several())
    save_intervenable(several(), tmp_path / "it")
    torch.save(expected, tmp_path / "logits.pt")
    run_python(f"""
        import torch
        from featurizers import load_intervenable
        from tests.plugins.autoencoder.test_intervenable import run_several
        from tests.support.models import tiny_model
        torch.set_num_threads(1)
        result = run_several(load_intervenable({str(tmp_path / "it")!r}, tiny_model("gpt2")))
        assert torch.equal(result, torch.load({str(tmp_path / "logits.pt")!r})), "other logits"
    """)


def test_an_autoencoder_is_stored_as_a_dictionary_that_needs_no_plugin(tmp_path):
    folder = save_intervenable(several(), tmp_path / "it")
    x = torch.randn(5, WIDTH)
    for i, kind in enumerate(("relu", "jumprelu")):
        f = featurizers.load(folder, subfolder=f"featurizer-{i}", kind="dictionary")
        torch.testing.assert_close(f.encode(x), layer(kind).encode(x), rtol=1e-5, atol=1e-5)
        back = AutoencoderIntervention.of_featurizer(f)
        assert torch.equal(back.encode(x), layer(kind).encode(x)), "bit for bit, because the layer computes it"
        assert torch.equal(back(x), layer(kind)(x))
        assert all(p.is_contiguous() for p in back.parameters()), "matmul rounding depends on the layout"


def test_an_autoencoder_that_no_file_may_name_is_refused(tmp_path):
    class Mine(AutoencoderLayer):
        pass

    patched = built([{"layer": 1, "intervention": AutoencoderIntervention(Mine(WIDTH, 4))}])
    with pytest.raises(UsageError, match=r"is a Mine, which no file may name\. Register it as a kind"):
        save_intervenable(patched, tmp_path / "it")


def _first(record: Any) -> Any:
    return record["interventions"][0]


TAMPERED: dict[str, tuple[Any, str]] = {
    "a class path": (lambda r: _first(r).update(kind="os.system"), "intervention 'os.system'"),
    "an unknown kind": (lambda r: _first(r).update(kind="autoencoder.x"), "registers no intervention of that name"),
    "a dimension too far": (lambda r: _first(r)["config"].update(interchange_dim=[50]), "beyond the 50 latents"),
    "a dimension beyond 64 bits": (lambda r: _first(r)["config"].update(interchange_dim=10**30), "is a number of"),
    "a part too far": (
        lambda r: _first(r)["config"].update(subspace_partition=[[0, 50]]),
        "feature index 50 is out of range",
    ),
    "an unknown argument": (lambda r: _first(r)["config"].update(code="x"), "'code': Extra inputs"),
}


@pytest.mark.parametrize(("change", "words"), TAMPERED.values(), ids=TAMPERED)
def test_what_was_tampered_with_is_refused(change, words, tmp_path):
    folder = save_intervenable(several(), tmp_path / "it")
    record = json.loads((folder / "intervenable.json").read_text())
    change(record)
    (folder / "intervenable.json").write_text(json.dumps(record))
    with pytest.raises(FeaturizerError, match=words):
        load_intervenable(folder, tiny_model("gpt2"))


def test_a_featurizer_that_is_no_autoencoder_is_refused(tmp_path):
    f = featurizers.create("subspace", d_in=WIDTH, n_features=3)
    folder = save_intervenable(
        built([{"layer": 1, "intervention": f.get_interchange_intervention()()}]), tmp_path / "it"
    )
    edit(folder / "intervenable.json", '"kind": "interchange"', '"kind": "autoencoder"')
    with pytest.raises(
        ManifestError, match=r"'autoencoder': an autoencoder is made from a dictionary, not from .* 'subsp"
    ):
        load_intervenable(folder, tiny_model("gpt2"))


@pytest.mark.parametrize("layer_number", [0, None])
def test_places_named_by_path_in_models_that_pyvene_does_not_list(layer_number, tmp_path):
    path = Anatomy(tiny_model("gemma3")).pyvene_component("resid.post:1")
    intervention = JumpReLUAutoencoderIntervention(autoencoder=layer("jumprelu"))
    intervention.set_interchange_dim([1, 5, 45])
    place = {"layer": layer_number, "component": path, "max_number_of_units": 2, "intervention": intervention}
    saved = built([place], "gemma3")
    again = load_intervenable(save_intervenable(saved, tmp_path / "it"), tiny_model("gemma3"))
    assert torch.equal(logits(again, [1, 4]), logits(saved, [1, 4]))
    assert not torch.equal(logits(again, [1, 4]), tiny_model("gemma3")(BASE).logits)


def test_a_linked_intervention_stays_one(tmp_path):
    intervention = AutoencoderIntervention(autoencoder=layer().bfloat16())
    places = [{"layer": i, "intervention": intervention, "intervention_link_key": 0} for i in (0, 1)]
    saved = built(places, mode="serial")
    again = load_intervenable(save_intervenable(saved, tmp_path / "it"), tiny_model("gpt2"))
    first, second = again.interventions.values()
    assert first is second
    assert again.mode == "serial"
    assert all(p.dtype == torch.bfloat16 for p in first.parameters())


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("dims", [None, 7, [1, 5, 45]])
def test_pyvenes_own_save_and_load_give_the_same(kind, dims, tmp_path):
    saved = get_intervenable_with_autoencoder(tiny_model("gpt2"), layer(kind), dims, 1, max_number_of_units=2)
    (intervention,) = saved.interventions.values()
    intervention.subspace_partition = [[0, 1], [4, 5, 6]]
    saved.save(str(tmp_path / "it"))
    again = pv.IntervenableModel.load(str(tmp_path / "it"), tiny_model("gpt2"))
    for subspaces in (None, [[[0]] * 3]):
        assert torch.equal(logits(again, [1, 4], subspaces), logits(saved, [1, 4], subspaces))
    (loaded,) = again.interventions.values()
    assert type(loaded.autoencoder) is LAYERS[kind]


def test_pyvenes_load_takes_fewer_latents_than_dimensions(tmp_path):
    intervention = AutoencoderIntervention(autoencoder=AutoencoderLayer(WIDTH, 7))
    saved = built([{"layer": 1, "intervention": intervention, "latent_dim": 7}])
    saved.save(str(tmp_path / "it"))
    again = pv.IntervenableModel.load(str(tmp_path / "it"), tiny_model("gpt2"))
    assert torch.equal(logits(again, [3]), logits(saved, [3]))
    assert next(iter(again.interventions.values())).interchange_dim is None


def test_an_intervention_without_its_autoencoder_says_so():
    waiting = AutoencoderIntervention(component="block_output", latent_dim=LATENTS, embed_dim=None)
    with pytest.raises(UsageError, match="there is no autoencoder yet; give latent_dim"):
        waiting(torch.zeros(1, 1, 4), torch.zeros(1, 1, 4))
    with pytest.raises(UsageError, match=r"names the autoencoder 'os\.system', not one of autoencoder-layer, jumprelu"):
        waiting.set_extra_state(json.dumps({**STATE, "autoencoder": "os.system"}))
    with pytest.raises(UsageError, match="names the autoencoder None, not one of autoencoder-layer, jumprelu"):
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
