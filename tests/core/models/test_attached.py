"""`attach`: what an artefact of a search says is run, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import featurizers
import pytest
import torch
from featurizers.errors import FeatureIndexError, ShapeError, SiteError, UsageError
from torch import Tensor

from tests.support.dictionaries import dictionary
from tests.support.models import VOCABULARY, WIDTH, tiny_model

BASE = {"input_ids": torch.arange(8).reshape(2, 4)}
SOURCE = {"input_ids": torch.arange(20, 28).reshape(2, 4)}


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama")


def found(*, position: tuple[int, ...] | None = (-1,), **sets: Tensor) -> featurizers.Featurizer[Any]:
    f = featurizers.create("subspace", d_in=WIDTH, n_features=5, seed=1)
    f.site = featurizers.Site("resid.post", 1).at(position=position)
    f.feature_sets = dict(sets)
    return f


def by_hand(model: Any, change: Any, columns: Any = slice(-1, None), layer: int = 1) -> Tensor:
    """Logits where a plain hook puts ``change(BASE, SOURCE)`` in columns of a block's output."""
    kept: list[Tensor] = []
    block = model.model.layers[layer]
    handle = block.register_forward_hook(lambda _, __, out: kept.append(out))
    model(**SOURCE)
    handle.remove()

    def edit(_: Any, __: Any, out: Tensor) -> Tensor:
        out = out.clone()
        out[:, columns] = change(out[:, columns], kept[0][:, columns])
        return out

    handle = block.register_forward_hook(edit)
    try:
        return model(**BASE).logits
    finally:
        handle.remove()


@torch.no_grad()
def test_selected_features_are_swapped_and_no_others(model: Any) -> None:
    f = found(selected=torch.tensor([0, 3]))
    basis = f.basis.detach()[:, [0, 3]]
    wanted = by_hand(model, lambda base, source: base + (source - base) @ basis @ basis.T)
    torch.testing.assert_close(f.attach(model)(BASE, SOURCE).logits, wanted)


@torch.no_grad()
def test_a_gate_is_applied_as_it_is(model: Any) -> None:
    gate = torch.tensor([0.0, 1.0, 0.5, 0.25, 0.0])
    f = found(selected=gate)
    basis = f.basis.detach()
    wanted = by_hand(model, lambda base, source: base + ((source - base) @ basis * gate) @ basis.T)
    torch.testing.assert_close(f.attach(model)(BASE, SOURCE).logits, wanted)


@torch.no_grad()
def test_none_selected_is_all_and_an_empty_selection_is_nothing(model: Any) -> None:
    f = found()
    basis = f.basis.detach()
    wanted = by_hand(model, lambda base, source: base + (source - base) @ basis @ basis.T)
    torch.testing.assert_close(f.attach(model)(BASE, SOURCE).logits, wanted)
    nothing = found(selected=torch.empty(0, dtype=torch.long))
    assert torch.equal(nothing.attach(model)(BASE, SOURCE).logits, model(**BASE).logits)


@torch.no_grad()
def test_the_artefact_runs_after_a_reload(model: Any, tmp_path: Path) -> None:
    for sets in ({"selected": torch.tensor([4, 1])}, {"selected": torch.empty(0, dtype=torch.long)}, {}):
        f = found(**sets)
        f.save_pretrained(tmp_path / "f")
        again = featurizers.load(tmp_path / "f").attach(model)
        assert torch.equal(again(BASE, SOURCE).logits, f.attach(model)(BASE, SOURCE).logits)


@torch.no_grad()
def test_several_sites_each_with_its_own_source(model: Any) -> None:
    f, g = found(), found()
    g.site = featurizers.Site("mlp.out", 0).at(position=(0, 1))
    other = {"input_ids": torch.randint(0, VOCABULARY, (2, 4))}
    attached = featurizers.attach(model, [f, g])
    swaps = {
        f.site: featurizers.Interchange(f, source=SOURCE, positions=[-1]),
        g.site: featurizers.Interchange(g, source=other, positions=[0, 1]),
    }
    with featurizers.intervene(model, swaps):
        wanted = model(**BASE).logits
    assert torch.equal(attached(BASE, [SOURCE, other]).logits, wanted)
    with pytest.raises(UsageError, match="one for each of the 2 sites"):
        attached(BASE, [SOURCE])


@torch.no_grad()
def test_two_featurizers_at_one_site_both_act(model: Any) -> None:
    f, g = found(position=(0,)), found(position=(-1,))
    swaps = [featurizers.Interchange(h, source=SOURCE, positions=[p]) for h, p in ((f, 0), (g, -1))]
    with featurizers.intervene(model, {"resid.post:1": swaps}):
        wanted = model(**BASE).logits
    assert torch.equal(featurizers.attach(model, [f, g])(BASE, SOURCE).logits, wanted)


@torch.no_grad()
def test_positions_of_the_call_go_before_those_of_the_site(model: Any) -> None:
    f = found()
    swap = featurizers.Interchange(f, source=SOURCE, positions=[1], source_positions=[2])
    with featurizers.intervene(model, {f.site: swap}):
        wanted = model(**BASE).logits
    assert torch.equal(f.attach(model)(BASE, SOURCE, positions=[1], source_positions=[2]).logits, wanted)


@torch.no_grad()
def test_collect_gives_the_selected_features(model: Any) -> None:
    f = found(selected=torch.tensor([3, 0]))
    [features] = f.attach(model).collect(BASE)
    everything = featurizers.collect(model, BASE, {f.site: f}, positions=[-1])[f.site]
    assert torch.equal(features, everything[..., [3, 0]])


def test_what_cannot_be_attached_says_why(model: Any) -> None:
    f = found()
    f.site = None
    with pytest.raises(UsageError, match="set its site"):
        f.attach(model)
    f.site = featurizers.Site("resid.post", 99)
    with pytest.raises(SiteError, match="has 3 layers"):
        f.attach(model)
    with pytest.raises(FeatureIndexError):
        found(selected=torch.tensor([7])).attach(model)
    with pytest.raises(ShapeError, match="but there are 5 features"):
        found(selected=torch.rand(4)).attach(model)
    with pytest.raises(UsageError, match="no featurizer"):
        featurizers.attach(model, [])


def test_another_model_of_the_hub_is_refused(model: Any) -> None:
    f = found()
    f.site = f.site.at(model="owner/one")
    model.config._name_or_path = "owner/two"
    try:
        with pytest.raises(UsageError, match="any_model=True"):
            f.attach(model)
        assert f.attach(model, any_model=True).model is model
        model.config._name_or_path = "owner/one"
        assert f.attach(model).model is model
    finally:
        model.config._name_or_path = ""


@torch.no_grad()
def test_the_card_says_how_to_run_what_was_found(model: Any, tmp_path: Path) -> None:
    f = found(selected=torch.tensor([0, 3]))
    f.save_pretrained(tmp_path / "f")
    snippet = (tmp_path / "f" / "README.md").read_text().split("```python")[1].split("```")[0]
    names = {"model": model, "base_inputs": BASE, "source_inputs": SOURCE}
    exec(snippet.replace("./f", f"local:{tmp_path / 'f'}"), names)
    assert torch.equal(names["logits"], f.attach(model)(BASE, SOURCE).logits)


@torch.no_grad()
@pytest.mark.parametrize("chosen", [torch.tensor([3, 40]), torch.arange(64) % 37 == 3], ids=["numbers", "a mask"])
def test_the_selected_features_of_a_slice_are_those_of_the_whole(model: Any, tmp_path: Path, chosen: Tensor) -> None:
    whole = dictionary("relu", d_in=WIDTH, n_features=64)
    whole.site, whole.feature_sets["selected"] = featurizers.Site("resid.post:1"), chosen
    folder = whole.save_pretrained(tmp_path / "whole")
    wanted = featurizers.attach(model, whole)(BASE, SOURCE).logits
    for indices in ([40, 3], [0, 3, 1, 40], [3, 40, 5]):
        part = featurizers.load(folder, indices=indices)
        torch.testing.assert_close(featurizers.attach(model, part)(BASE, SOURCE).logits, wanted)
    with pytest.raises(FeatureIndexError, match="feature 40 is not among"):
        featurizers.attach(model, featurizers.load(folder, indices=[3, 5]))


@torch.no_grad()
def test_a_mask_that_is_set_on_a_slice_is_of_its_columns(model: Any, tmp_path: Path) -> None:
    folder = dictionary("relu", d_in=WIDTH, n_features=64).save_pretrained(tmp_path / "whole")
    part = featurizers.load(folder, indices=[1, 0])
    part.site, part.feature_sets["selected"] = featurizers.Site("resid.post:1"), torch.tensor([True, False])
    swap = featurizers.Interchange(part, source=SOURCE, indices=[1])
    with featurizers.intervene(model, {part.site: swap}):
        wanted = model(**BASE).logits
    torch.testing.assert_close(featurizers.attach(model, part)(BASE, SOURCE).logits, wanted)
