"""Vectors of the library steering-vectors, beside plain hooks and, where it is installed, beside the library itself."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import featurizers
import pytest
import torch
from featurizers import Ablate, Mask, Steer
from featurizers.errors import ArtefactError, LoweringError, UsageError, WeightsError
from featurizers_control_vectors import read_steering_vector, to_steering_vector

from tests.support.hub import subspace
from tests.support.models import WIDTH, fresh_model, hooked, module_of, prompts

IDS = prompts(2, 5)


def vectors(*layers: int) -> dict[int, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {layer: torch.randn(WIDTH, generator=generator) for layer in layers}


def by_hooks(model: Any, kind: str, activations: dict[int, torch.Tensor]) -> torch.Tensor:
    from contextlib import ExitStack

    with ExitStack() as stack:
        for layer, vector in activations.items():
            module, side = module_of(model, "llama", kind, layer)
            stack.enter_context(hooked(module, side, lambda x, vector=vector: x + vector))
        return model(input_ids=IDS).logits


@pytest.mark.parametrize(
    ("layer_type", "kind"), [("decoder_block", "resid.post"), ("self_attn", "attn.out"), ("mlp", "mlp.out")]
)
def test_a_vector_is_read_attached_and_written(tmp_path, layer_type, kind):
    model, activations = fresh_model("llama"), vectors(0, 2)
    torch.save({"layer_activations": activations, "layer_type": layer_type}, tmp_path / "v.pt")
    found = read_steering_vector(tmp_path / "v.pt")
    assert [str(site) for site in found] == [f"{kind}:0", f"{kind}:2"]
    expected = by_hooks(model, kind, activations)
    attached = featurizers.attach(model, found.values())
    assert torch.allclose(attached({"input_ids": IDS}).logits, expected, atol=1e-5)
    featurizers.save_collection({f"layer-{site.layer}": f for site, f in found.items()}, tmp_path / "c")
    loaded = [featurizers.load(tmp_path / "c", subfolder=f"layer-{n}") for n in (0, 2)]
    assert torch.allclose(featurizers.attach(model, loaded)({"input_ids": IDS}).logits, expected, atol=1e-5)
    to_steering_vector(loaded, tmp_path / "again.pt")
    again = torch.load(tmp_path / "again.pt", weights_only=True)
    assert again["layer_type"] == layer_type
    assert all(torch.allclose(again["layer_activations"][n], activations[n], atol=1e-6) for n in (0, 2))


def test_the_library_loads_what_is_written_and_does_the_same(tmp_path):
    library = pytest.importorskip("steering_vectors")
    model = fresh_model("llama")
    f = subspace(d_in=WIDTH, n_features=4)
    f.site = "resid.post:1"
    edit = Steer(f, delta=torch.tensor([3.0, -1.0]), indices=[2, 0])
    to_steering_vector(edit, tmp_path / "v.pt")
    vector = library.SteeringVector(**torch.load(tmp_path / "v.pt", weights_only=True))
    with vector.apply(model):
        expected = model(input_ids=IDS).logits
    with featurizers.intervene(model, [edit]):
        assert torch.allclose(model(input_ids=IDS).logits, expected, atol=1e-5)
    (read,) = read_steering_vector(vector).values()  # the object itself
    assert torch.allclose(read.attach(model)({"input_ids": IDS}).logits, expected, atol=1e-5)
    torch.save(vars(vector), tmp_path / "fields.pt")
    (read,) = read_steering_vector(tmp_path / "fields.pt").values()
    assert torch.allclose(read.attach(model)({"input_ids": IDS}).logits, expected, atol=1e-5)


def test_activations_alone_are_those_of_blocks(tmp_path):
    torch.save(vectors(3), tmp_path / "v.pt")
    assert [str(site) for site in read_steering_vector(tmp_path / "v.pt")] == ["resid.post:3"]


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return os._exit, (3,)


WRONG: dict[str, tuple[Any, str]] = {
    "an object": (Harmful(), "v.pt holds more than tensors"),
    "no activations": ({"layer_activations": {}}, "no activations by layer"),
    "another field": ({"layer_activations": vectors(1), "code": "x"}, "has not the fields"),
    "a named layer": ({"layer_activations": {"one": torch.ones(4)}}, "names a layer 'one'"),
    "a layer before all": ({"layer_activations": {-1: torch.ones(4)}}, "names a layer -1"),
    "a matrix": ({"layer_activations": {1: torch.ones(2, 4)}}, "not one vector of finite numbers"),
    "integers": ({"layer_activations": {1: torch.ones(4).int()}}, "no tensor of real numbers"),
    "infinity": ({"layer_activations": {1: torch.full((4,), float("inf"))}}, "finite numbers"),
    "two widths": ({"layer_activations": {1: torch.ones(4), 2: torch.ones(5)}}, "several widths"),
    "a list": ([1.0], "has not the fields"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_file_is_refused(tmp_path, name):
    content, words = WRONG[name]
    torch.save(content, tmp_path / "v.pt")
    with pytest.raises(WeightsError, match=words):
        read_steering_vector(tmp_path / "v.pt")


def test_a_layer_that_is_no_site_is_refused():
    vector = SimpleNamespace(layer_activations=vectors(1), layer_type="input_layernorm")
    with pytest.raises(UsageError, match="of the type 'input_layernorm'; these are sites: decoder_block"):
        read_steering_vector(vector)


def test_what_is_no_steering_vector_is_not_written(tmp_path: Path):
    f, g = subspace(d_in=WIDTH), subspace(d_in=WIDTH)
    f.site, g.site = "resid.post:1", "mlp.out:1"
    for edits, words in (
        ([Steer(f, delta=1.0), Steer(g, delta=1.0)], "sites of one kind, not at resid.post and mlp.out"),
        (Ablate(f), "adds the same to every activation"),
        (Steer(f, delta=1.0, positions=[-1]), "the edit has positions"),
        ({"resid.mid:1": Steer(f, delta=1.0)}, r"resid.mid:1: a steering vector is added at sites of resid\.post"),
        (f, "holds no edits; give operations"),
    ):
        with pytest.raises(LoweringError, match=words):
            to_steering_vector(edits, tmp_path / "v.pt")
    with pytest.raises(LoweringError):
        to_steering_vector(Mask(f, source=torch.ones(1, WIDTH), gate=torch.ones(3)), tmp_path / "v.pt")
    to_steering_vector(Steer(f, delta=1.0), tmp_path / "v.pt")
    with pytest.raises(ArtefactError, match="there is a file already"):
        to_steering_vector(Steer(f, delta=1.0), tmp_path / "v.pt")
