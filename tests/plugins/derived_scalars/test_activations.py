"""What was captured, as a value and as a file."""

from __future__ import annotations

import json
import os

import pytest
import torch
from featurizers.errors import ArtefactError, SiteError
from featurizers_derived_scalars.capturing import RawActivations, capture, logit_difference
from featurizers_derived_scalars.circuit import KINDS, Circuit, Need, Place
from safetensors import safe_open
from safetensors.torch import save_file

from tests.support.decoders import shared_decoder, tokens


@pytest.fixture(params=["gpt2", "gemma2", "phi"])
def raw(request):
    circuit = Circuit(shared_decoder(request.param))
    needs = [Need(kind, pass_) for kind in KINDS for pass_ in ("forward", "backward") if circuit.places(kind)]
    return capture(circuit, tokens(), needs, metric=logit_difference(3), freeze_norms=("final", "mlp"))[0]


def test_a_file_holds_everything(raw, tmp_path):
    path = tmp_path / "raw.safetensors"
    raw.save(path)
    again = RawActivations.load(path, raw.circuit)
    assert list(again) == list(raw)
    assert all(torch.equal(again[key], raw[key]) and again[key].dtype == raw[key].dtype for key in raw)
    assert torch.equal(again.tokens, raw.tokens)
    assert (again.metric, again.frozen) == (raw.metric, raw.frozen)
    assert again.frozen == {"final", "mlp"}
    # and what it takes to compute more
    for kind in ("attn.z", "mlp.neurons"):
        place = Place(kind, 1)
        resid = again[raw.circuit.residual_before(place), "forward"]
        for freeze in (True, False):
            found = again.recompute(place, resid, freeze_norm=freeze)
            assert torch.equal(found, raw.recompute(place, resid, freeze_norm=freeze))


def test_it_cannot_be_changed(raw):
    key = (Place("attn.z", 0), "forward")
    with pytest.raises(TypeError):
        raw[key] = raw[key]
    for name in ("tokens", "metric", "frozen", "circuit", "arguments"):
        with pytest.raises(AttributeError):
            setattr(raw, name, None)
    values = {key: raw[key]}
    made = RawActivations(raw.circuit, raw.tokens, values)
    values.clear()
    assert len(made) == 1
    assert key in made
    assert (Place("attn.z", 1), "forward") not in made
    assert "7 tokens" in repr(made)
    with pytest.raises(SiteError, match=r"attn.z:1 \(forward\) was not captured"):
        made[Place("attn.z", 1), "forward"]
    with pytest.raises(SiteError, match=r"axes are token, head, d_head"):
        RawActivations(raw.circuit, raw.tokens, {key: raw[key][0]})


def test_it_is_in_the_order_of_the_model(raw):
    places = [place for place, _ in raw]
    assert places == sorted(places)
    assert places[0] == Place("resid.embed")
    assert places[-1] == Place("logits")


def rewritten(path, change):
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        about = json.loads(file.metadata()["featurizers"])
    change(tensors, about)
    save_file(tensors, path, metadata={"featurizers": json.dumps(about)})


def as_dtype(tensors, name, dtype):
    tensors[name] = tensors[name].to(dtype)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda tensors, about: about.update(version=2), "has version 2; this release reads version 1"),
        (lambda tensors, about: about.update(format="x"), "has the format 'x', not 'featurizers-raw-activations'"),
        (lambda tensors, about: about.update(metric="high"), "'metric': Input should be a valid number"),
        (lambda tensors, about: about.update(frozen=["all"]), "'frozen.0': Input should be"),
        (lambda tensors, about: about.update(frozen=[[]]), "'frozen.0': Input should be"),
        (lambda tensors, about: about["model"].update(heads=5), "'heads': 5"),
        (lambda tensors, about: tensors.pop("tokens"), "no row of token ids"),
        (lambda tensors, about: tensors.update(tokens=torch.zeros(7)), "no row of token ids"),
        (lambda tensors, about: tensors.update({"attn.z:0": torch.zeros(7, 4, 8)}), "names no place and pass"),
        (lambda tensors, about: tensors.update({"attn.zz:0/forward": torch.zeros(7)}), "there is no place"),
        (lambda tensors, about: tensors.update({"attn.z:9/forward": torch.zeros(7, 4, 8)}), "3 layers"),
        (lambda tensors, about: tensors.update({"attn.z:0/forward": torch.zeros(6, 4, 8)}), "7 tokens"),
        (lambda tensors, about: tensors.update({"attn.z:0/forward": torch.zeros(7, 32)}), "axes are"),
        (lambda tensors, about: tensors.update({"attn.z:0/forward": torch.zeros(7, 5, 8)}), "attn.z:0"),
        (lambda tensors, about: tensors.update(tokens=torch.full((7,), 999)), "vocabulary"),
        (lambda tensors, about: tensors["attn.z:0/forward"][2, 1].fill_(torch.nan), "attn.z:0 (forward) holds NaN"),
        (lambda tensors, about: tensors["attn.z:0/forward"][2, 1].fill_(-torch.inf), "attn.z:0 (forward) holds NaN"),
        (lambda tensors, about: tensors["attn.logits:0/forward"].fill_(torch.nan), "attn.logits:0 (forward) holds NaN"),
        (lambda tensors, about: tensors["norm.attn.scale:0/forward"].neg_(), "holds a scale of 0 or less"),
        (lambda tensors, about: as_dtype(tensors, "attn.z:0/forward", torch.int64), "int64, not floating point"),
        (lambda tensors, about: as_dtype(tensors, "tokens", torch.bool), "no row of token ids"),
        (lambda tensors, about: as_dtype(tensors, "tokens", torch.uint8), "no row of token ids"),
        (lambda tensors, about: tensors.update(tokens=torch.zeros(0, dtype=torch.int64)), "no row of token ids"),
        (lambda tensors, about: tensors.update({"attn.z:01/forward": torch.ones(7, 4, 8)}), "names no place and pass"),
        (lambda tensors, about: about.update(metric=10**400), "'metric': Input should be a "),
    ],
)
def test_a_file_that_is_not_what_it_should_be_is_refused(change, problem, tmp_path):
    circuit, path = Circuit(shared_decoder("gpt2")), tmp_path / "raw.safetensors"
    capture(circuit, tokens(), [Need("attn.z"), Need("attn.logits")])[0].save(path)
    RawActivations.load(path, circuit)  # with the logits of tokens to come, which are minus infinity
    rewritten(path, change)
    with pytest.raises(ArtefactError) as caught:
        RawActivations.load(path, circuit)
    assert problem in str(caught.value)


def test_what_is_no_such_file_is_refused(tmp_path):
    circuit, path = Circuit(shared_decoder("gpt2")), tmp_path / "raw.safetensors"
    for content in (b"", b"\x80\x04text", b"{}"):
        path.write_bytes(content)
        with pytest.raises(ArtefactError, match="expected captured activations"):
            RawActivations.load(path, circuit)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ArtefactError, match="its header has no metadata 'featurizers'"):
        RawActivations.load(path, circuit)
    with pytest.raises(ArtefactError, match="expected captured activations"):
        RawActivations.load(tmp_path / "nothing", circuit)
    capture(circuit, tokens(), [Need("attn.z")])[0].save(path)
    with pytest.raises(ArtefactError, match="LlamaForCausalLM"):
        RawActivations.load(path, Circuit(shared_decoder("llama")))


def test_a_path_of_no_regular_file_is_refused(tmp_path):
    circuit = Circuit(shared_decoder("gpt2"))
    raw = capture(circuit, tokens(), [Need("attn.z")])[0]
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name, problem in (("pipe", "a named pipe"), ("folder", "a folder"), ("null\0", "a null character")):
        with pytest.raises(ArtefactError, match=problem):
            RawActivations.load(tmp_path / name, circuit)
    for path in (tmp_path / "folder", tmp_path / "null\0", "", tmp_path / "nowhere" / "a"):
        with pytest.raises(ArtefactError):
            raw.save(path)


def test_what_could_not_be_read_again_is_not_written(raw, tmp_path):
    path = tmp_path / "raw.safetensors"
    raw.save(path)
    before = path.read_bytes()
    values = {key: raw[key].clone() for key in raw}
    values[Place("attn.z", 1), "forward"][0, 0, 0] = torch.nan
    with pytest.raises(ArtefactError, match=r"attn.z:1 \(forward\) holds NaN or infinity; capture it again"):
        RawActivations(raw.circuit, raw.tokens, values).save(path)
    assert path.read_bytes() == before
