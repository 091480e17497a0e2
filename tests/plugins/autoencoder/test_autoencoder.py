"""Autoencoder interventions in pyvene models, compared with hooks written by hand and with pyvene's own classes."""

from __future__ import annotations

import copy
import subprocess
import sys
from typing import Any

import featurizers
import pytest
import pyvene as pv
import torch
from featurizers.errors import FeatureIndexError, ShapeError, UsageError
from featurizers_autoencoder import (
    AutoencoderIntervention,
    AutoencoderLayer,
    AutoencoderLayerBase,
    JumpReLUAutoencoderLayer,
    get_intervenable_with_autoencoder,
)
from torch import Tensor

from tests.support.dictionaries import dictionary
from tests.support.intervenables import BASE, SOURCE, built, logits
from tests.support.models import WIDTH, hooked, read, tiny_model

LATENTS = 50
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


def by_hand(autoencoder: Any, dims: list[int], positions: list[int], model: Any = None) -> Tensor:
    """Return the logits of a model with a plain hook that swaps latents and keeps the error."""
    model = model or tiny_model("gpt2")
    block = model.transformer.h[1]
    source = read(model, block, "output", input_ids=SOURCE)

    def edit(hidden: Tensor) -> Tensor:
        hidden = hidden.clone()
        for position in positions:
            latents, source_latents = (autoencoder.encode(h[:, position]) for h in (hidden, source))
            error = hidden[:, position] - autoencoder.decode(latents)
            latents[:, dims] = source_latents[:, dims]
            hidden[:, position] = autoencoder.decode(latents) + error
        return hidden

    with hooked(block, "output", edit):
        return model(BASE).logits


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("positions", [[3], [1, 4]], ids=["one position", "two positions"])
@torch.no_grad()
def test_latents_are_swapped_as_by_hand(kind, positions):
    autoencoder = layer(kind)
    plain = tiny_model("gpt2")(BASE).logits
    for chosen, dims in (
        ([1, 5, 45], [1, 5, 45]),
        (7, list(range(7))),
        (None, list(range(LATENTS))),
        (torch.tensor([2]), [2]),
    ):
        patched = get_intervenable_with_autoencoder(
            tiny_model("gpt2"), autoencoder, chosen, 1, max_number_of_units=len(positions)
        )
        result = logits(patched, positions)
        torch.testing.assert_close(result, by_hand(autoencoder, dims, positions), rtol=1e-5, atol=1e-5)
        assert not torch.allclose(result, plain, atol=1e-4)


@torch.no_grad()
def test_subspaces_narrow_the_dimensions_for_each_example():
    autoencoder = layer()
    patched = get_intervenable_with_autoencoder(tiny_model("gpt2"), autoencoder, [1, 5, 45], 1)
    result = logits(patched, [3], [[[1], [5, 7], []]])
    for row, dims in enumerate(([1], [5], [])):
        torch.testing.assert_close(result[row], by_hand(autoencoder, dims, [3])[row], rtol=1e-5, atol=1e-5)
    assert torch.equal(result[2], tiny_model("gpt2")(BASE).logits[2])
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

    trained = pv.models.layers.AutoencoderLayer(WIDTH, LATENTS)  # pyvene's own class
    patched = get_intervenable(tiny_model("gpt2"), trained, [1, 5], 1)
    same = layer()
    same.load_state_dict(trained.state_dict())
    torch.testing.assert_close(logits(patched, [3]), by_hand(same, [1, 5], [3]), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_it_is_pyvenes_own_and_the_error():
    """The result is that of pyvene's intervention, where that works, plus the reconstruction error."""
    intervention = AutoencoderIntervention(autoencoder=layer())
    peer = pv.AutoencoderIntervention(embed_dim=WIDTH, latent_dim=LATENTS)
    peer.autoencoder.load_state_dict(intervention.autoencoder.state_dict())
    base, source = torch.randn(2, 3, 1, WIDTH)
    for either in (intervention, peer):
        either.set_interchange_dim([1, 5, 45])
    error = base - intervention.autoencoder(base)
    torch.testing.assert_close(intervention(base, source), peer(base, source) + error, rtol=1e-5, atol=1e-5)
    jump = layer("jumprelu")
    peer = pv.JumpReLUAutoencoderIntervention(embed_dim=WIDTH, low_rank_dimension=LATENTS)
    peer.load_state_dict({**peer.state_dict(), **jump.state_dict()})
    torch.testing.assert_close(jump.encode(base), peer.encode(base))
    torch.testing.assert_close(jump.decode(jump.encode(base)), peer.decode(peer.encode(base)))


@pytest.mark.parametrize("own", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", LAYERS)
def test_nothing_swapped_is_nothing_changed(kind, dtype, own):
    """This holds for any dtypes of the activations and of the autoencoder."""
    intervention = AutoencoderIntervention(autoencoder=layer(kind).to(own))
    base, source = (torch.randn(2, 3, 2, WIDTH, dtype=torch.float64) * 20).to(dtype)
    assert torch.equal(intervention(base, base.clone()), base)
    assert torch.equal(intervention(base, source, [[]] * 3), base)
    swapped = intervention(base, source)
    assert swapped.dtype == dtype
    intervention.set_interchange_dim([])
    assert torch.equal(intervention(base, source), base)
    if own == torch.float32:
        intervention.set_interchange_dim(None)
        exact = intervention(base.float(), source.float())
        if dtype == torch.float64:
            assert (swapped - exact).abs().max() <= 4 * torch.finfo(own).eps * exact.abs().max()
        else:
            assert torch.equal(swapped, exact.to(dtype)), "rounded once"


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

    result, expected = (
        torch.autograd.grad((out * cotangent).sum(), [base, source, *weights])
        for out in (intervention(base, source), plain())
    )
    for gradient, other in zip(result, expected, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-5)
    assert result[1].abs().max() > 0


def test_any_autoencoder_may_be_used_and_a_strange_one_is_not_saved(tmp_path):
    class Tanh(AutoencoderLayerBase):
        def encode(self, x: Tensor) -> Tensor:
            return x.tanh()

        def decode(self, latent: Tensor) -> Tensor:
            return latent.clamp(-0.99, 0.99).atanh()

    intervention = AutoencoderIntervention(autoencoder=Tanh())
    base, source = torch.randn(2, 3, 1, WIDTH) * 0.5
    torch.testing.assert_close(intervention(base, source), source, rtol=1e-4, atol=1e-4)
    with pytest.raises(UsageError, match=r"is a Tanh, which no file may name\. Register it"):
        featurizers.save_intervenable(built([{"layer": 1, "intervention": intervention}]), tmp_path / "it")
    assert not (tmp_path / "it").exists()


@torch.no_grad()
def test_a_bfloat16_model_takes_a_float32_autoencoder():
    model, autoencoder = copy.deepcopy(tiny_model("gpt2")).bfloat16(), layer()
    plain = model(BASE).logits
    patched = get_intervenable_with_autoencoder(model, autoencoder, 7, 1, max_number_of_units=2)
    result = logits(patched, [1, 4])
    assert result.dtype == torch.bfloat16
    assert not torch.equal(result, plain)
    expected = by_hand(autoencoder, list(range(7)), [1, 4], model)
    torch.testing.assert_close(result, expected, rtol=0.02, atol=0.02)
    assert (result - plain).abs().max() > 0.5
    assert next(iter(patched.interventions.values())).autoencoder is not autoencoder, "weights are copied"


@pytest.mark.parametrize("kind", LAYERS)
@torch.no_grad()
def test_a_dictionary_is_taken_as_it_is(kind):
    f = layer(kind).as_featurizer()
    patched = get_intervenable_with_autoencoder(tiny_model("gpt2"), f, [1, 5, 45], 1)
    model = tiny_model("gpt2")
    swap = featurizers.Interchange(f, source={"input_ids": SOURCE}, positions=[3], indices=[1, 5, 45])
    with featurizers.intervene(model, {"resid.post:1": swap}):
        expected = model(BASE).logits
    torch.testing.assert_close(logits(patched, [3]), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(UsageError, match="rule 'topk'"):
        get_intervenable_with_autoencoder(tiny_model("gpt2"), dictionary("topk"), None, 1)


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
        for units in ("decoder-norm", "folded"):
            scaled = f.in_units(units)
            assert not torch.allclose(scaled.encode(x), f.encode(x))
            torch.testing.assert_close(LAYERS[kind].of_featurizer(scaled).encode(x), f.encode(x), rtol=1e-4, atol=1e-4)
    refused = {
        "rule 'topk'": dictionary("topk"),
        "normalize='layer-norm'": dictionary(kind, normalize="layer-norm"),
        "slice_of=99": dictionary(kind, numbers=torch.arange(64), slice_of=99),
    }
    for words, other in refused.items():
        with pytest.raises(UsageError, match=words):
            LAYERS[kind].of_featurizer(other)


def test_wrong_arguments_are_named():
    for options in ({}, {"embed_dim": 4}, {"embed_dim": 4, "latent_dim": 0}, {"latent_dim": 4}):
        with pytest.raises(UsageError, match="needs autoencoder=, or embed_dim= and latent_dim="):
            AutoencoderIntervention(**options)
    with pytest.raises(UsageError, match="not a Linear"):
        AutoencoderIntervention(autoencoder=torch.nn.Linear(2, 2))
    intervention = AutoencoderIntervention(embed_dim=4, latent_dim=6)
    for wrong in ([6], 7, [-1], 0.5, [[1]], True, [True], "1", 10**30, [10**30], [[1], [2, 3]], object()):
        with pytest.raises(FeatureIndexError):
            intervention.set_interchange_dim(wrong)
    with pytest.raises(FeatureIndexError):
        intervention(torch.zeros(1, 1, 4), torch.zeros(1, 1, 4), [[6]])
    with pytest.raises(ShapeError, match="the activations have 5 dimensions, but the autoencoder takes 4"):
        intervention(torch.zeros(1, 1, 5), torch.zeros(1, 1, 5))
    with pytest.raises(UsageError, match="pass source_representations= to the intervenable"):
        intervention.set_source_representation(torch.zeros(1, 1, 4))
    with pytest.raises(UsageError, match="pass source_representations= to the intervenable"):
        AutoencoderIntervention(embed_dim=4, latent_dim=6, source_representation=torch.zeros(4))


def test_the_plugin_is_listed_and_costs_no_pyvene():
    assert "autoencoder" in [plugin.name for plugin in featurizers.plugins()]
    script = "import sys, featurizers_autoencoder; sys.exit('pyvene' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], timeout=900, check=False).returncode == 0
    assert copy.deepcopy(AutoencoderIntervention(embed_dim=4, latent_dim=6)).autoencoder.latent_dim == 6
