"""Edits in artefacts on the Hub."""

from __future__ import annotations

import featurizers
import pytest
import torch
from featurizers import Interchange, Mask, Steer

from tests.support.command import run
from tests.support.hub import subspace
from tests.support.models import WIDTH, fresh_model, prompts


@pytest.mark.parametrize("name", ["steer", "interchange", "mask"])
def test_an_edit_is_pushed_and_attached(hub, name):
    f, model, ids = subspace(d_in=WIDTH, n_features=4), fresh_model("llama"), prompts(2, 5)
    f.site = "resid.post:1"
    source = torch.randn(1, 1, WIDTH, generator=torch.Generator().manual_seed(1))
    f.edits = {
        "steer": [Steer(f, delta=3.0, indices=[1])],
        "interchange": [Interchange(f, source=source, positions=[-1])],
        "mask": [Mask(f, source=source, gate=torch.tensor([0.0, 0.1, 0.9, 1.0]))],
    }[name]
    with featurizers.intervene(model, f.edits):
        expected = model(input_ids=ids).logits
    f.push_to_hub("alice/x")
    attached = featurizers.load("alice/x").attach(model)
    assert torch.equal(attached({"input_ids": ids}).logits, expected)
    code, out, _ = run("info", "alice/x")
    assert code == 0
    assert f"{name} " in out
