"""Every kind of site in every architecture against plain torch hooks on modules that are named by hand."""

from __future__ import annotations

from collections.abc import Callable

import featurizers
import pytest
import torch
from featurizers import Ablate, Anatomy, Interchange, Steer, collect, intervene
from torch import Tensor

from tests.support.models import (
    ARCHITECTURES,
    HEAD_WIDTH,
    HEADS,
    LAYERS,
    MLP_WIDTH,
    MODULES,
    WIDTH,
    fresh_model,
    head_columns,
    hooked,
    hooks_of,
    module_of,
    prompts,
    read,
    tiny_model,
)

torch.set_num_threads(1)

WHOLE = ("embed", "resid.pre", "resid.post", "attn.out", "attn.z", "mlp.out", "mlp.act", "norm.out")
PROJECTED = ("attn.q", "attn.k", "attn.v")
KINDS = (*WHOLE, "attn.z head", "attn.q", "attn.q head", "attn.k head", "attn.v")
HEAD = 2

BASE = {"input_ids": prompts(2, 6, seed=1)}
SOURCE = {"input_ids": prompts(2, 6, seed=2)}

every_site = pytest.mark.parametrize(
    ("architecture", "kind"), [(architecture, kind) for architecture in ARCHITECTURES for kind in KINDS]
)
some_positions = pytest.mark.parametrize("positions", [None, [-1]], ids=["all", "last"])


class Spot:
    """A site of a model, and its oracle."""

    def __init__(self, architecture: str, kind: str, layer: int) -> None:
        self.model = tiny_model(architecture)
        self.whole = kind.partition(" ")[0]
        self.part: slice | list[int] = slice(None)
        if self.whole in PROJECTED:
            path, heads = head_columns(architecture, self.whole)
            self.module, self.side = self.model.get_submodule(path.format(layer)), "output"
            self.part = heads[1] if kind.endswith("head") else [column for head in heads for column in head]
            self.width, self.name = len(self.part), f"{self.whole}:{layer}{':1' * kind.endswith('head')}"
            return
        self.module, self.side = module_of(self.model, architecture, self.whole, layer)
        self.width = {"attn.z": HEADS * HEAD_WIDTH[architecture], "mlp.act": MLP_WIDTH}.get(self.whole, WIDTH)
        self.name = self.whole if self.whole in ("embed", "norm.out") else f"{self.whole}:{layer}"
        if kind == "attn.z head":
            self.width = HEAD_WIDTH[architecture]
            self.part = slice(HEAD * self.width, (HEAD + 1) * self.width)
            self.name += f":{HEAD}"

    def activations(self, inputs: dict[str, Tensor]) -> Tensor:
        return read(self.model, self.module, self.side, **inputs)[..., self.part].contiguous()

    def logits_with_hook(self, change: Callable[[Tensor], Tensor], columns: slice) -> Tensor:
        """Logits of the base, where a plain hook writes ``change`` of the site into some columns."""

        def edit(hidden: Tensor) -> Tensor:
            edited = hidden.clone()
            edited[:, columns, self.part] = change(hidden[:, columns, self.part].contiguous())
            return edited

        with torch.no_grad(), hooked(self.module, self.side, edit):
            return self.model(**BASE).logits

    def logits_with_intervene(self, operation: featurizers.models.operations.Operation) -> Tensor:
        with torch.no_grad(), intervene(self.model, {self.name: operation}):
            return self.model(**BASE).logits


def _columns(positions: list[int] | None) -> slice:
    return slice(None) if positions is None else slice(-1, None)


def _assert_changed(spot: Spot, logits: Tensor) -> None:
    with torch.no_grad():
        assert (spot.model(**BASE).logits - logits).abs().max() > 1e-4


@every_site
@some_positions
def test_collect_reads_what_a_plain_hook_reads(architecture, kind, positions):
    for layer in range(LAYERS):
        spot = Spot(architecture, kind, layer)
        found = collect(spot.model, BASE, [spot.name], positions=positions)[spot.name]
        wanted = spot.activations(BASE)
        assert wanted.shape == (2, 6, spot.width)
        assert torch.equal(found, wanted[:, _columns(positions)])


@every_site
@some_positions
def test_identity_interchange_is_a_plain_patch(architecture, kind, positions):
    for layer in (0, LAYERS - 1):
        spot = Spot(architecture, kind, layer)
        source = spot.activations(SOURCE)[:, _columns(positions)]
        f = featurizers.create("identity", d_in=spot.width)
        found = spot.logits_with_intervene(Interchange(f, source=SOURCE, positions=positions))
        _assert_changed(spot, found)
        assert torch.equal(found, spot.logits_with_hook(lambda _, source=source: source, _columns(positions)))


@every_site
@some_positions
def test_subspace_interchange_adds_the_projected_difference(architecture, kind, positions):
    spot = Spot(architecture, kind, 1)
    source = spot.activations(SOURCE)[:, _columns(positions)].contiguous()
    f = featurizers.create("subspace", d_in=spot.width, n_features=5, seed=3)
    basis = f.orthonormal_basis().detach()
    found = spot.logits_with_intervene(Interchange(f, source=SOURCE, positions=positions))
    _assert_changed(spot, found)
    wanted = spot.logits_with_hook(lambda base: base + (source @ basis - base @ basis) @ basis.T, _columns(positions))
    assert torch.equal(found, wanted)
    rounded_otherwise = spot.logits_with_hook(
        lambda base: base + ((source - base) @ basis) @ basis.T, _columns(positions)
    )
    torch.testing.assert_close(found, rounded_otherwise, rtol=0, atol=2e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_patching_everything_that_enters_the_blocks_gives_the_logits_of_the_source(architecture):
    model = tiny_model(architecture)
    f = featurizers.create("identity", d_in=WIDTH)
    with torch.no_grad():
        wanted = model(**SOURCE).logits
        with intervene(model, {"resid.pre:0": Interchange(f, source=SOURCE)}):
            assert torch.equal(model(**BASE).logits, wanted)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_decoder_without_its_language_model_head_has_the_same_sites(architecture):
    model = tiny_model(architecture)
    decoder = model.get_submodule(MODULES[architecture]["embed"][0].partition(".")[0])
    sites = ["embed", "resid.pre:1", "resid.post:1", "attn.out:1", "attn.z:1", "attn.z:1:3", "mlp.out:1", "norm.out"]
    of_decoder, of_model = collect(decoder, BASE, sites), collect(model, BASE, sites)
    assert all(torch.equal(of_decoder[site], of_model[site]) for site in sites)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_residual_stream_leaves_one_block_and_enters_the_next(architecture):
    found = collect(tiny_model(architecture), BASE, ["resid.post:0", "resid.pre:1"])
    assert torch.equal(found["resid.post:0"], found["resid.pre:1"])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_heads_side_by_side_are_the_whole_of_attn_z(architecture):
    heads = [f"attn.z:1:{head}" for head in range(HEADS)]
    found = collect(tiny_model(architecture), BASE, ["attn.z:1", *heads])
    assert torch.equal(torch.cat([found[head] for head in heads], dim=-1), found["attn.z:1"])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_site_is_found_in_the_module_written_by_hand(architecture):
    anatomy = Anatomy(tiny_model(architecture))
    assert anatomy.n_layers == LAYERS
    for kind, (path, side) in MODULES[architecture].items():
        for layer in range(LAYERS):
            site = kind if kind in ("embed", "norm.out") else f"{kind}:{layer}"
            place = anatomy.place(site)
            assert (place.path, place.side) == (path.format(layer), side)
            assert place.module is anatomy.model.get_submodule(path.format(layer))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_module_site_is_that_module(architecture):
    spot = Spot(architecture, "mlp.out", 1)
    path = MODULES[architecture]["mlp.out"][0].format(1)
    for side in ("input", "output"):
        site = f"module:{path}:{side}"
        assert torch.equal(collect(spot.model, BASE, [site])[site], read(spot.model, spot.module, side, **BASE))
    f = featurizers.create("identity", d_in=WIDTH)
    with torch.no_grad(), intervene(spot.model, {f"module:{path}:output": Ablate(f)}):
        found = spot.model(**BASE).logits
    assert torch.equal(found, spot.logits_with_hook(torch.zeros_like, slice(None)))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_rest_of_what_attention_returns_is_left_alone(architecture):
    model = tiny_model(architecture, attn_implementation="eager")
    f = featurizers.create("identity", d_in=WIDTH)
    with torch.no_grad():
        wanted = model(**BASE, output_attentions=True).attentions
        with intervene(model, {f"attn.out:{LAYERS - 1}": Steer(f, delta=3.0)}):
            found = model(**BASE, output_attentions=True).attentions
    assert len(found) == len(wanted) == LAYERS
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nothing_stays_in_the_model(architecture):
    model = fresh_model(architecture)
    hooks, weights = hooks_of(model), {name: value.clone() for name, value in model.state_dict().items()}
    f = featurizers.create("identity", d_in=WIDTH)
    with torch.no_grad():
        wanted = model(**BASE).logits
        with intervene(model, {"resid.post:1": Interchange(f, source=SOURCE), "mlp.out:0": Steer(f, delta=1.0)}):
            model(**BASE)
        assert torch.equal(model(**BASE).logits, wanted)
    assert hooks_of(model) == hooks
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gemma3"])
def test_hidden_states_that_the_model_returns_are_right_again_after_an_early_stop(architecture):
    model = fresh_model(architecture)
    with torch.no_grad():
        collect(model, BASE, ["resid.post:0"])
        before = model(**BASE, output_hidden_states=True).hidden_states
        collect(model, BASE, ["resid.post:0"])
        after = model(**BASE, output_hidden_states=True).hidden_states
    assert len(before) == len(after) == LAYERS + 1
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize(
    "asked_before",
    [
        False,
        pytest.param(
            True,
            marks=pytest.mark.xfail(
                strict=True,
                reason="transformers' own recording hooks stay in the model and run before those of intervene",
            ),
        ),
    ],
)
@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gemma3"])
def test_hidden_states_that_the_model_returns_show_the_edit(architecture, asked_before):
    model = fresh_model(architecture)
    f = featurizers.create("identity", d_in=WIDTH)
    with torch.no_grad():
        model(**BASE, output_hidden_states=asked_before)
        with intervene(model, {"resid.post:0": Ablate(f)}):
            edited = model(**BASE, output_hidden_states=True).hidden_states
    assert torch.equal(edited[1], torch.zeros_like(edited[1]))
