"""`resid.mid` beside edits of its summands: whatever the order, the middle is what the block has there."""

from __future__ import annotations

import itertools

import featurizers
import pytest
import torch
from featurizers import Collect, Interchange, Steer, intervene
from featurizers.errors import SiteError

from tests.support.models import WIDTH, hooked, module_of, prompts, read, tiny_model

IDS = prompts(2, 5)
READER = {"gpt2": "transformer.h.1.ln_2", "llama": "model.layers.1.post_attention_layernorm"}
READER["gemma2"] = "model.layers.1.pre_feedforward_layernorm"
ORDERS = list(itertools.permutations(["resid.mid:1", "attn.out:1", "resid.pre:1"]))


def identity() -> featurizers.Featurizer:
    return featurizers.create("identity", d_in=WIDTH)


@pytest.mark.parametrize("order", ORDERS, ids=" ".join)
@pytest.mark.parametrize("architecture", READER)
def test_the_middle_is_after_edits_of_its_summands(architecture: str, order: tuple[str, ...]) -> None:
    model = tiny_model(architecture)
    steer = Steer(identity(), delta=1.0)
    with (
        hooked(*module_of(model, architecture, "resid.pre", 1), lambda x: x + 1.0),
        hooked(*module_of(model, architecture, "attn.out", 1), lambda x: x + 1.0),
    ):
        expected = read(model, model.get_submodule(READER[architecture]), "input", input_ids=IDS)
    operations = {site: Collect(identity()) if site == "resid.mid:1" else steer for site in order}
    with torch.no_grad(), intervene(model, operations) as collected:
        model(IDS)
    torch.testing.assert_close(collected["resid.mid:1"], expected, rtol=0, atol=0)


@pytest.mark.parametrize("order", ORDERS, ids=" ".join)
@pytest.mark.parametrize("architecture", READER)
def test_an_interchange_of_the_middle_overwrites_edits_before_it(architecture: str, order: tuple[str, ...]) -> None:
    model, new = tiny_model(architecture), torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(1))
    steer, swap = Steer(identity(), delta=1.0), Interchange(identity(), source=new)
    with torch.no_grad(), intervene(model, {site: swap if site == "resid.mid:1" else steer for site in order}):
        found = read(model, model.get_submodule(READER[architecture]), "input", input_ids=IDS)
    torch.testing.assert_close(found, new, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("order", ORDERS, ids=" ".join)
def test_parallel_blocks_are_refused_beside_other_edits(order: tuple[str, ...]) -> None:
    steer = Steer(identity(), delta=1.0)
    model, refused = tiny_model("gpt_neox"), pytest.raises(SiteError, match="no stream between attention and MLP")
    with refused, torch.no_grad(), intervene(model, dict.fromkeys(order, steer)):
        model(IDS)


def test_an_inner_context_that_edits_what_attention_adds_is_refused() -> None:
    model, steer = tiny_model("llama"), Steer(identity(), delta=1.0)
    refused = pytest.raises(SiteError, match="give both edits to one intervene")
    with refused, torch.no_grad(), intervene(model, {"resid.mid:1": steer}), intervene(model, {"attn.out:1": steer}):
        model(IDS)


def test_nested_edits_of_the_middle_add_up() -> None:
    model, steer = tiny_model("llama"), Steer(identity(), delta=1.0)
    with torch.no_grad(), intervene(model, {"resid.mid:1": [steer, steer]}):
        expected = model(IDS).logits
    with torch.no_grad(), intervene(model, {"resid.mid:1": steer}), intervene(model, {"resid.mid:1": steer}):
        found = model(IDS).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
