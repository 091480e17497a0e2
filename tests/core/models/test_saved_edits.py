"""Edits in artefacts: a new process makes the same logits of them as the operations that were saved."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from typing import Any

import featurizers
import pytest
import torch
from featurizers import Ablate, Collect, Interchange, Mask, SigmoidGate, Steer
from featurizers.errors import FeatureIndexError, ManifestError, ShapeError, UsageError

from tests.support.command import run
from tests.support.dictionaries import dictionary
from tests.support.hub import subspace
from tests.support.models import WIDTH, fresh_model, hooked, module_of, prompts, save_language_model
from tests.support.site_maps import linear_map

SITE = "resid.post:1"


def at_site(kind: str = "subspace") -> Any:
    f = subspace(d_in=WIDTH, n_features=4) if kind == "subspace" else dictionary("relu", d_in=WIDTH)
    f.site = SITE
    return f


def source(rows: int = 1) -> torch.Tensor:
    return torch.randn(1, rows, WIDTH, generator=torch.Generator().manual_seed(1))


EDITS = {
    "a number": lambda f: [Steer(f, delta=2.5, indices=[2])],
    "a number for each": lambda f: [Steer(f, delta=torch.tensor([0.1, -3.0]), indices=[3, 0], positions=[-1])],
    "all features": lambda f: [Ablate(f, positions=[0, -1])],
    "to values": lambda f: [Ablate(f, value=torch.tensor([1 / 3, 2.0], dtype=torch.float64), indices=[0, 1])],
    "a mask of booleans": lambda f: [Steer(f, delta=1.0, indices=torch.arange(f.n_features) % 2 == 0)],
    "interchange": lambda f: [Interchange(f, source=source(), indices=[1])],
    "at two tokens": lambda f: [Interchange(f, source=source(2), positions=[0, -1])],
    "mask": lambda f: [Mask(f, source=source(), gate=torch.linspace(0, 1, f.n_features), positions=[-1])],
    "two, in their order": lambda f: [Ablate(f, indices=[0]), Steer(f, delta=1.0, indices=[0, 1])],
}


@pytest.mark.parametrize("kind", ["subspace", "dictionary"])
@pytest.mark.parametrize("name", EDITS)
def test_what_is_saved_is_what_is_done(tmp_path, name, kind):
    f, model, ids = at_site(kind), fresh_model("llama"), prompts(2, 5)
    f.edits = EDITS[name](f)
    with featurizers.intervene(model, {SITE: f.edits}):
        expected = model(input_ids=ids).logits
    assert not torch.equal(expected, model(input_ids=ids).logits)
    for loaded in (
        featurizers.load(f.save_pretrained(tmp_path / "a")),
        copy.deepcopy(f),
        pickle.loads(pickle.dumps(f)),
    ):
        attached = loaded.attach(model)
        assert torch.equal(attached({"input_ids": ids}).logits, expected)
        with attached.edited():
            assert torch.equal(model(input_ids=ids).logits, expected)
    again = featurizers.load(tmp_path / "a")
    assert (again.save_pretrained(tmp_path / "b") / "config.json").read_text() == (
        tmp_path / "a" / "config.json"
    ).read_text()


def test_a_steering_vector_is_a_plain_hook(tmp_path):
    """The smallest case: one direction of a subspace, added to the stream at each token."""
    f, model, ids = subspace(d_in=WIDTH, n_features=1), fresh_model("gpt2"), prompts(2, 5)
    f.site, f.edits = SITE, [Steer(f, delta=4.0)]
    loaded = featurizers.load(f.save_pretrained(tmp_path / "a"))
    module, side = module_of(model, "gpt2", "resid.post", 1)
    direction = f.inverse_featurize(torch.ones(1, 1), None)[0].detach()
    with hooked(module, side, lambda x: x + 4.0 * direction):
        expected = model(input_ids=ids).logits
    assert torch.allclose(loaded.attach(model)({"input_ids": ids}).logits, expected, atol=1e-5)
    with hooked(module, side, lambda x: x + 4.0 * direction):
        tokens = model.generate(input_ids=ids, max_new_tokens=3, do_sample=False)
    with loaded.attach(model).edited():
        assert torch.equal(model.generate(input_ids=ids, max_new_tokens=3, do_sample=False), tokens)


SCRIPT = """
import sys, torch, featurizers
torch.set_num_threads(1)
model = featurizers.load_model(sys.argv[1]).model
for name in sys.argv[3:]:
    attached = featurizers.load(name).attach(model)
    torch.save(attached({"input_ids": torch.tensor([[1, 2, 3], [4, 5, 6]])}).logits, f"{sys.argv[2]}/{name[-1]}.pt")
"""


def test_a_new_process_makes_the_same_logits(tmp_path):
    model, ids = fresh_model("llama"), torch.tensor([[1, 2, 3], [4, 5, 6]])
    save_language_model(model, tmp_path / "model")
    model = featurizers.load_model(tmp_path / "model").model
    names = {"s": "a number for each", "i": "interchange", "m": "mask"}
    expected = {}
    for short, name in names.items():
        f = at_site("dictionary")
        f.edits = EDITS[name](f)
        f.save_pretrained(tmp_path / short)
        with featurizers.intervene(model, {SITE: f.edits}):
            expected[short] = model(input_ids=ids).logits
    folders = [str(tmp_path / short) for short in names]
    subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path / "model"), str(tmp_path), *folders], check=True)
    for short, logits in expected.items():
        assert torch.equal(torch.load(tmp_path / f"{short}.pt", weights_only=True), logits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_source_keeps_its_dtype(tmp_path, dtype):
    f = at_site()
    f.edits = [Interchange(f, source=source().to(dtype))]
    (edit,) = featurizers.load(f.save_pretrained(tmp_path / "a")).edits
    assert edit.source.dtype == dtype
    assert torch.equal(edit.source, source().to(dtype))


def test_info_and_the_card_say_what_is_edited(tmp_path):
    f = at_site()
    f.edits = [Steer(f, delta=2.5, indices=[2]), Interchange(f, source=source(), positions=[-1])]
    folder = f.save_pretrained(tmp_path / "a")
    card = (folder / "README.md").read_text()
    assert "| edit | steer feature 2 by 2.5 at resid.post:1, every token |" in card
    assert "| edit | interchange all features from a stored source at resid.post:1, the token -1 |" in card
    assert "logits = attached(inputs).logits" in card
    code, out, _ = run("info", folder)
    assert code == 0
    assert "steer feature 2 by 2.5 at resid.post:1" in " ".join(out.replace("│", " ").split())
    assert featurizers.load(folder).metadata == {}


class Doubled(Steer):
    """A stranger's operation."""


REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "a source of inputs": (
        lambda f: Interchange(f, source={"input_ids": prompts(1, 3)}),
        UsageError,
        "reads its source from the model; to be saved, give the activations",
    ),
    "a source for each example": (
        lambda f: Interchange(f, source=torch.zeros(2, 1, WIDTH)),
        UsageError,
        r"source of shape \(2, 1, 32\); to be saved, give \(1, n_positions, d\)",
    ),
    "a module": (
        lambda f: Mask(f, source=source(), gate=SigmoidGate(4)),
        UsageError,
        r"the gate of a saved Mask is a tensor; give that of a module: gate\(\).detach\(\)",
    ),
    "a gate beyond 1": (lambda f: Mask(f, source=source(), gate=torch.full((4,), 1.5)), UsageError, "this Mask cannot"),
    "a short gate": (lambda f: Mask(f, source=source(), gate=torch.ones(3)), ShapeError, "has 3 numbers for 4"),
    "a gate of no axis": (lambda f: Mask(f, source=source(), gate=torch.tensor(1.0)), ShapeError, r"shape \(\), for 4"),
    "the batch's mean": (lambda f: Ablate(f, value="mean"), UsageError, "give the mean of a data set as numbers"),
    "nothing to do": (Collect, UsageError, "holds Steer, Ablate, Interchange and Mask as edits, not Collect"),
    "a class of others": (lambda f: Doubled(f, delta=1.0), UsageError, "not Doubled"),
    "features by example": (lambda f: Steer(f, delta=1.0, indices=[[0], [1]]), UsageError, "other features for each"),
    "tokens by example": (lambda f: Steer(f, delta=1.0, positions=[[0], [1]]), UsageError, "one list of integers"),
    "values by example": (lambda f: Steer(f, delta=torch.ones(2, 1, 4)), UsageError, r"has shape \(2, 1, 4\)"),
    "too many values": (lambda f: Steer(f, delta=torch.ones(3), indices=[0]), ShapeError, "3 numbers for 1 features"),
    "infinity": (lambda f: Steer(f, delta=float("inf")), UsageError, "this Steer cannot be saved: 'delta"),
    "no such feature": (lambda f: Steer(f, delta=1.0, indices=[4]), FeatureIndexError, "4"),
    "another featurizer": (
        lambda f: Steer(at_site(), delta=1.0),
        UsageError,
        "go through its own featurizer 'subspace', and this Steer goes through 'subspace', which is another object",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_saved_is_refused(tmp_path, name):
    make, error, words = REFUSED[name]
    f = at_site()
    f.edits = [make(f)]
    with pytest.raises(error, match=words):
        f.save_pretrained(tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_an_edit_needs_a_site_and_one_site(tmp_path):
    f = subspace()
    f.edits = [Steer(f, delta=1.0)]
    with pytest.raises(UsageError, match="has edits and no site"):
        f.save_pretrained(tmp_path / "a")
    from featurizers_transcoder import CrossLayerTranscoder

    several = linear_map(CrossLayerTranscoder, {0: (["in"], ["out"])})
    several.edits = [Steer(several, delta=1.0)]
    with pytest.raises(UsageError, match="maps between sites, whose edits are not saved"):
        several.save_pretrained(tmp_path / "a")


FORGED: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown field": ({"code": "os.system"}, "Extra inputs are not permitted"),
    "an unknown operation": ({"do": "exec"}, "does not describe edits"),
    "another site": ({"site": "resid.post:2"}, "it is at 'resid.post:2' through 'subspace', and the artefact is"),
    "another featurizer": ({"featurizer": "other"}, "through 'other'"),
    "a feature that is not there": ({"indices": [9]}, "an edit: .*9"),
    "too many numbers": ({"delta": [1.0, 2.0, 3.0]}, "3 numbers for 1 features"),
    "no number": ({"delta": "1"}, "does not describe edits"),
    "a token far away": ({"positions": [2**40]}, "does not describe edits"),
    "features of a source": (
        {"do": "interchange", "delta": None, "features": [1.0]},
        "has the activations of its source, not their features",
    ),
    "no source": ({"do": "interchange", "delta": None}, "give the source as features or as source"),
    "rows of two widths": ({"do": "interchange", "delta": None, "source": [[1.0], [1.0, 2.0]]}, "different widths"),
    "a narrow source": ({"do": "interchange", "delta": None, "source": [[1.0]]}, "takes activations of width 32"),
    "an indexed mask": ({"do": "mask", "delta": None, "gate": 0.5, "source": [[0.0] * 32]}, "and no indices"),
}


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_edit_is_refused(tmp_path, name):
    f = at_site()
    f.edits = [Steer(f, delta=1.0, indices=[0])]
    folder = f.save_pretrained(tmp_path / "a")
    changes, words = FORGED[name]
    config = json.loads((folder / "config.json").read_text())
    (edit,) = config["metadata"]["feature_edits"]["edits"]
    edit |= changes
    config["metadata"]["feature_edits"]["edits"] = [{key: value for key, value in edit.items() if value is not None}]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ManifestError, match=words):
        featurizers.load(folder)


def test_edits_are_bounded(tmp_path):
    f = at_site()
    f.edits = [Steer(f, delta=1.0)] * 64
    folder = f.save_pretrained(tmp_path / "a")
    assert len(featurizers.load(folder).edits) == 64
    f.edits.append(f.edits[0])
    with pytest.raises(UsageError, match="there are 65 edits; an artefact holds 64 at most"):
        f.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["metadata"]["feature_edits"]["edits"] *= 2
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ManifestError, match="has 128 edits; an artefact holds 64"):
        featurizers.load(folder)


def test_a_slice_has_the_edits_of_its_own_features(tmp_path):
    f = at_site("dictionary")
    f.edits = [Steer(f, delta=2.0, indices=[7, 3])]
    folder = f.save_pretrained(tmp_path / "a")
    model, ids = fresh_model("llama"), {"input_ids": prompts(2, 5)}
    part = featurizers.load(folder, indices=[3, 5, 7])
    expected = featurizers.load(folder).attach(model)(ids).logits
    assert torch.allclose(part.attach(model)(ids).logits, expected, atol=1e-5)
    with pytest.raises(FeatureIndexError, match="feature 7 is not among the 2"):
        featurizers.load(folder, indices=[3, 5])
    f.edits = [Ablate(f)]
    f.save_pretrained(folder)
    with pytest.raises(FeatureIndexError, match="changes all features; load the artefact whole"):
        featurizers.load(folder, indices=[3, 5])
    assert f.take([3]).edits == []


def test_an_attached_artefact_runs_one_thing(tmp_path):
    f, model, ids = at_site(), fresh_model("llama"), {"input_ids": prompts(2, 5)}
    attached = f.attach(model)
    with pytest.raises(UsageError, match="there are no edits in the artefact; give a source"):
        attached(ids)
    f.edits = [Steer(f, delta=1.0)]
    with pytest.raises(UsageError, match="call it without a source"):
        attached(ids, ids)
    with pytest.raises(UsageError, match="positions go with a source"):
        attached(ids, positions=[-1])
    with attached.interchange(ids):  # as before
        assert torch.equal(model(**ids).logits, fresh_model("llama")(**ids).logits)


def test_another_format_that_lacks_edits_says_so(tmp_path):
    f = at_site("dictionary")
    f.edits = [Steer(f, delta=1.0)]
    assert "The edits that it holds (1) are not kept." in featurizers.convert(f, tmp_path / "a", "sae-lens")
