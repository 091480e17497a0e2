"""The autoencoder plugin: pyvene models against hooks written by hand, pyvene's own, and themselves after loading."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import featurizers
import pytest
import pyvene as pv
import torch
from featurizers.errors import (
    ArtefactError,
    FeatureIndexError,
    HubNotFoundError,
    ManifestError,
    UsageError,
    WeightsError,
)
from featurizers_autoencoder import (
    AutoencoderIntervention,
    AutoencoderLayer,
    AutoencoderLayerBase,
    JumpReLUAutoencoderIntervention,
    JumpReLUAutoencoderLayer,
    get_intervenable_with_autoencoder,
    load_intervenable,
    push_intervenable,
    save_intervenable,
)
from torch import Tensor

from tests.support.dictionaries import dictionary
from tests.support.hub import LoopbackHub, connect
from tests.support.models import WIDTH, prompts, tiny_model

LATENTS = 50
BASE, SOURCE = prompts(3, 6), prompts(3, 6, seed=1)
LAYERS = {"relu": AutoencoderLayer, "jumprelu": JumpReLUAutoencoderLayer}


def layer(kind: str = "relu", seed: int = 0, width: int = WIDTH) -> Any:
    torch.manual_seed(seed)
    made = LAYERS[kind](width, LATENTS)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            scale = 0.2 if parameter.dim() < 2 else 0.5
            parameter.copy_(
                torch.rand_like(parameter) * 0.2 if name == "threshold" else torch.randn_like(parameter) * scale
            )
    return made


def run(intervenable: Any, positions: list[int], subspaces: Any = None) -> Tensor:
    where = [[positions] * len(BASE)]
    _, output = intervenable(
        {"input_ids": BASE}, [{"input_ids": SOURCE}], {"sources->base": (where, where)}, subspaces=subspaces
    )
    return output.logits


def by_hand(autoencoder: Any, dims: list[int], positions: list[int], at: int = 1) -> Tensor:
    """Logits of a plain hook that swaps latents, and keeps the error."""
    model = tiny_model("gpt2")
    block = model.transformer.h[at]
    kept: list[Tensor] = []
    handle = block.register_forward_hook(lambda *a: kept.append(a[2]))
    model(SOURCE)
    handle.remove()

    def edit(_: Any, __: Any, hidden: Tensor) -> Tensor:
        hidden = hidden.clone()
        for position in positions:
            latents, others = (autoencoder.encode(h[:, position]) for h in (hidden, kept[0]))
            error = hidden[:, position] - autoencoder.decode(latents)
            latents[:, dims] = others[:, dims]
            hidden[:, position] = autoencoder.decode(latents) + error
        return hidden

    handle = block.register_forward_hook(edit)
    logits = model(BASE).logits
    handle.remove()
    return logits


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("positions", [[3], [1, 4]], ids=["one position", "two positions"])
@torch.no_grad()
def test_latents_are_swapped_as_by_hand(kind, positions):
    autoencoder = layer(kind)
    plain = tiny_model("gpt2")(BASE).logits
    for given, dims in (
        ([1, 5, 45], [1, 5, 45]),
        (7, list(range(7))),
        (None, list(range(LATENTS))),
        (torch.tensor([2]), [2]),
    ):
        built = get_intervenable_with_autoencoder(
            tiny_model("gpt2"), autoencoder, given, 1, max_number_of_units=len(positions)
        )
        found = run(built, positions)
        torch.testing.assert_close(found, by_hand(autoencoder, dims, positions), rtol=1e-5, atol=1e-5)
        assert not torch.allclose(found, plain, atol=1e-4)


@torch.no_grad()
def test_subspaces_narrow_the_dimensions_for_each_example():
    autoencoder = layer()
    built = get_intervenable_with_autoencoder(tiny_model("gpt2"), autoencoder, [1, 5, 45], 1)
    found = run(built, [3], [[[1], [5, 7], []]])
    for row, dims in enumerate(([1], [5], [])):
        torch.testing.assert_close(found[row], by_hand(autoencoder, dims, [3])[row], rtol=1e-5, atol=1e-5)
    assert torch.equal(found[2], tiny_model("gpt2")(BASE).logits[2])
    parts = AutoencoderIntervention(autoencoder=autoencoder, subspace_partition=[[0, 4], [5, 6]])
    base, source = torch.randn(2, 2, 1, WIDTH)
    explicit = AutoencoderIntervention(autoencoder=autoencoder)
    assert torch.equal(parts(base, source, [[0]] * 2), explicit(base, source, [[0, 1, 2, 3]] * 2))


def test_the_recipe_of_pyvene_runs_as_written():
    def get_intervenable(model: Any, autoencoder: Any, interchange_dimensions: Any, layer: int) -> Any:
        intervention = AutoencoderIntervention(embed_dim=autoencoder.input_dim, latent_dim=autoencoder.latent_dim)
        intervention.autoencoder.load_state_dict(autoencoder.state_dict())
        intervention.set_interchange_dim(interchange_dimensions)
        config = pv.IntervenableConfig(
            model_type=type(model),
            representations=[
                pv.RepresentationConfig(
                    layer, "block_output", "pos", 1, intervention=intervention, latent_dim=autoencoder.latent_dim
                )
            ],
            intervention_types=AutoencoderIntervention,
        )
        intervenable = pv.IntervenableModel(config, model)
        intervenable.set_device("cpu")
        intervenable.disable_model_gradients()
        return intervenable

    theirs = pv.models.layers.AutoencoderLayer(WIDTH, LATENTS)  # trained by pyvene's own class
    built = get_intervenable(tiny_model("gpt2"), theirs, [1, 5], 1)
    ours = layer()
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(run(built, [3]), by_hand(ours, [1, 5], [3]), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_it_is_pyvenes_own_and_the_error():
    """pyvene's intervention gives the same, less what the autoencoder does not reconstruct, where it is right."""
    ours = AutoencoderIntervention(autoencoder=layer())
    theirs = pv.AutoencoderIntervention(embed_dim=WIDTH, latent_dim=LATENTS)
    theirs.autoencoder.load_state_dict(ours.autoencoder.state_dict())
    base, source = torch.randn(2, 3, 1, WIDTH)
    for intervention in (ours, theirs):
        intervention.set_interchange_dim([1, 5, 45])
    error = base - ours.autoencoder(base)
    torch.testing.assert_close(ours(base, source), theirs(base, source) + error, rtol=1e-5, atol=1e-5)
    ours, jump = JumpReLUAutoencoderIntervention(autoencoder=layer("jumprelu")), layer("jumprelu")
    theirs = pv.JumpReLUAutoencoderIntervention(embed_dim=WIDTH, low_rank_dimension=LATENTS)
    theirs.load_state_dict({**theirs.state_dict(), **jump.state_dict()})
    torch.testing.assert_close(ours.autoencoder.encode(base), theirs.encode(base))
    torch.testing.assert_close(
        ours.autoencoder.decode(ours.autoencoder.encode(base)), theirs.decode(theirs.encode(base))
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", LAYERS)
def test_nothing_swapped_is_nothing_changed(kind, dtype):
    intervention = AutoencoderIntervention(autoencoder=layer(kind))
    base, source = (torch.randn(2, 3, 2, WIDTH) * 20).to(dtype)
    assert torch.equal(intervention(base, base.clone()), base)
    assert torch.equal(intervention(base, source, [[]] * 3), base)
    swapped = intervention(base, source)
    assert swapped.dtype == dtype
    exact = intervention(base.float(), source.float())
    assert (swapped.float() - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize("kind", LAYERS)
def test_it_trains(kind):
    intervention = AutoencoderIntervention(autoencoder=layer(kind))
    intervention.set_interchange_dim([1, 5, 45])
    base, source = torch.randn(2, 3, 1, WIDTH).requires_grad_()
    cotangent = torch.randn(3, 1, WIDTH)
    weights = [p for n, p in intervention.named_parameters() if n != "autoencoder.threshold"]

    def plain() -> Tensor:
        a = intervention.autoencoder
        latents, others = a.encode(base), a.encode(source)
        dims = torch.zeros(LATENTS).index_fill(0, torch.tensor([1, 5, 45]), 1.0)
        return base + a.decode(latents + dims * (others - latents)) - a.decode(latents)

    found, expected = (
        torch.autograd.grad((out * cotangent).sum(), [base, source, *weights])
        for out in (intervention(base, source), plain())
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert found[1].abs().max() > 0


def test_any_autoencoder_may_be_used_and_a_strange_one_is_not_saved(tmp_path):
    class Tanh(AutoencoderLayerBase):
        def encode(self, x: Tensor) -> Tensor:
            return x.tanh()

        def decode(self, latent: Tensor) -> Tensor:
            return latent.clamp(-0.99, 0.99).atanh()

    intervention = AutoencoderIntervention(autoencoder=Tanh())
    base, source = torch.randn(2, 3, 1, WIDTH) * 0.5
    torch.testing.assert_close(intervention(base, source), source, rtol=1e-4, atol=1e-4)
    config = pv.IntervenableConfig([{"layer": 1, "component": "block_output", "intervention": intervention}])
    built = pv.IntervenableModel(config, tiny_model("gpt2"))
    with pytest.raises(UsageError, match=r"is a Tanh, which no file may name\. Register it"):
        save_intervenable(built, tmp_path / "it")
    assert not (tmp_path / "it").exists()
    vanilla = pv.IntervenableModel({"layer": 1, "component": "block_output"}, model=tiny_model("gpt2"))
    with pytest.raises(UsageError, match="is a VanillaIntervention; only those of this package are saved"):
        save_intervenable(vanilla, tmp_path / "it")


@pytest.mark.parametrize("kind", LAYERS)
def test_a_dictionary_goes_in_and_comes_out(kind):
    x = torch.randn(5, 8)
    for pre_bias in (True, False):
        f = dictionary(kind, pre_bias=pre_bias)
        made = LAYERS[kind].of_featurizer(f)
        torch.testing.assert_close(made.encode(x), f.encode(x), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(made(x), x - f.featurize(x)[1], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(made.as_featurizer().encode(x), made.encode(x), rtol=1e-5, atol=1e-5)
        assert set(made(x, return_latent=True)) == {"latent", "output"}
    with pytest.raises(UsageError, match="rule 'topk'"):
        LAYERS[kind].of_featurizer(dictionary("topk"))


def test_wrong_arguments_are_named():
    for options in ({}, {"embed_dim": 4}, {"embed_dim": 4, "latent_dim": 0}, {"latent_dim": 4}):
        with pytest.raises(UsageError, match="needs autoencoder=, or embed_dim= and latent_dim="):
            AutoencoderIntervention(**options)
    with pytest.raises(UsageError, match="not a Linear"):
        AutoencoderIntervention(autoencoder=torch.nn.Linear(2, 2))
    intervention = AutoencoderIntervention(embed_dim=4, latent_dim=6)
    for wrong in ([6], 7, [-1], 0.5, [[1]]):
        with pytest.raises(FeatureIndexError):
            intervention.set_interchange_dim(wrong)
    with pytest.raises(FeatureIndexError):
        intervention(torch.zeros(1, 1, 4), torch.zeros(1, 1, 4), [[6]])


# ---------------------------------------------------------------------- saved and loaded


def several() -> Any:
    """Three places: two share an autoencoder, one is a jump-relu; other dimensions at each."""
    shared = layer()
    first, second = AutoencoderIntervention(autoencoder=shared), AutoencoderIntervention(autoencoder=shared)
    third = JumpReLUAutoencoderIntervention(autoencoder=layer("jumprelu"), subspace_partition=[[0, 4], [4, 9]])
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
    assert third.subspace_partition == [[0, 1, 2, 3], [4, 5, 6, 7, 8]]
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
        from tests.plugins.test_autoencoder import run_several
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


def test_the_plugin_is_listed_and_costs_no_pyvene():
    assert "autoencoder" in featurizers.kinds()
    script = "import sys, featurizers_autoencoder; sys.exit('pyvene' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], timeout=60, check=False).returncode == 0
    assert copy.deepcopy(AutoencoderIntervention(embed_dim=4, latent_dim=6)).autoencoder.latent_dim == 6
