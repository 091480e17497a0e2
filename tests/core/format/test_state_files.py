"""State files: tensors with JSON, JSON alone, and fingerprints."""

import hashlib
import json
import os
import stat

import pytest
import torch
from featurizers.errors import ArtefactError
from featurizers.format import fingerprint, read_json, read_state, write_json, write_state
from pydantic import BaseModel, ConfigDict
from safetensors import safe_open
from safetensors.torch import save_file


class About(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    names: tuple[str, ...]
    metric: float | None


NAMED = {"format": "some-format", "version": 1}
TENSORS = {
    "a": torch.tensor([1.0, float("nan"), float("inf")]),
    "b": torch.arange(6).reshape(2, 3).T,
    "c": torch.tensor(3),
}
ABOUT = {"names": ["x", "ü"], "metric": None}


def same(first, second):
    assert list(first) == sorted(second)
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype
        assert torch.equal(tensor.nan_to_num(), second[name].nan_to_num())


def test_what_was_written_is_read_again(tmp_path):
    path = tmp_path / "state.safetensors"
    write_state(path, TENSORS, ABOUT, **NAMED)
    tensors, about = read_state(path, **NAMED)
    same(tensors, TENSORS)
    assert about == ABOUT
    record = read_state(str(path), schema=About, **NAMED)[1]
    assert record == About(names=("x", "ü"), metric=None)
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["featurizers"]) == {**NAMED, **ABOUT}
    assert os.listdir(tmp_path) == ["state.safetensors"]


def test_views_that_share_storage_and_parameters_are_written(tmp_path):
    whole = torch.nn.Parameter(torch.arange(4.0))
    write_state(tmp_path / "s", {"whole": whole, "half": whole[::2]}, {}, **NAMED)
    same(read_state(tmp_path / "s", **NAMED)[0], {"whole": whole.detach(), "half": whole.detach()[::2]})


def test_files_of_another_key_and_without_a_format_are_read(tmp_path):
    path = tmp_path / "layer-003.safetensors"
    save_file({"a": torch.ones(2)}, path, metadata={"about": '{"finished": true}'})
    assert read_state(path, format=None, key="about")[1] == {"finished": True}
    write_state(path, {"a": torch.zeros(2)}, {"finished": False}, format=None, key="about")
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"about": '{"finished": false}'}


def test_the_mode_is_that_of_the_umask(tmp_path):
    (tmp_path / "plain").touch()
    write_state(tmp_path / "state", {}, {}, **NAMED)
    write_json(tmp_path / "json", {})
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "state", "json")}
    assert len(modes) == 1


def damaged(path, header):
    raw = json.dumps(header).encode() if not isinstance(header, bytes) else header
    path.write_bytes(len(raw).to_bytes(8, "little") + raw)


@pytest.mark.parametrize(
    ("metadata", "problem"),
    [
        ({}, "its header has no metadata 'featurizers'"),
        ({"featurizers": "null"}, "is not a JSON object"),
        ({"featurizers": "[]"}, "is not a JSON object"),
        ({"featurizers": "{"}, "is not valid JSON"),
        ({"featurizers": '{"format": "some-format", "format": "some-format"}'}, "is repeated"),
        ({"featurizers": '{"format": NaN}'}, "NaN is not a JSON number"),
        ({"featurizers": "[" * 100 + "]" * 100}, "nested more than"),
        ({"featurizers": '"' + "x" * 1_000_000 + '"'}, "larger than 1000000 bytes"),
        ({"featurizers": '{"format": "other", "version": 1}'}, "has the format 'other', not 'some-format'"),
        ({"featurizers": '{"version": 1}'}, "has the format None, not 'some-format'"),
        ({"featurizers": '{"format": "some-format", "version": 2}'}, "has version 2; this release reads version 1"),
        ({"featurizers": '{"format": "some-format", "version": true}'}, "has version True"),
        ({"featurizers": '{"format": "some-format", "version": 1, "names": 5}'}, "'names': .*'metric': Field required"),
        ({"featurizers": '{"format": "some-format", "version": 1, "names": [], "metric": 1, "x": 1}'}, "'x': Extra"),
    ],
)
def test_a_header_that_is_not_as_expected_is_refused(metadata, problem, tmp_path):
    path = tmp_path / "state.safetensors"
    save_file({"a": torch.ones(2)}, path, metadata=metadata)
    with pytest.raises(ArtefactError, match=rf"state.safetensors: expected captured activations: .*{problem}"):
        read_state(path, schema=About, expected="captured activations", **NAMED)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "not a whole safetensors file: it is empty"),
        (b"\x80\x04text", "it is a pickle"),
        (b"\x02" + b"\x00" * 7 + b"{", "not a whole safetensors file"),
        (b"\xff" * 8 + b"{}", "not a whole safetensors file"),
    ],
)
def test_a_file_that_is_no_safetensors_is_refused(content, problem, tmp_path):
    path = tmp_path / "state"
    path.write_bytes(content)
    with pytest.raises(ArtefactError, match=rf"expected a file of the format some-format: .*{problem}"):
        read_state(path, **NAMED)


def test_gaps_and_lies_of_a_header_are_refused(tmp_path):
    about = {"__metadata__": {"featurizers": json.dumps(NAMED)}}
    path = tmp_path / "state"
    damaged(path, {**about, "a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}})
    with pytest.raises(ArtefactError, match="its header promises"):
        read_state(path, **NAMED)
    damaged(path, {**about, "a": {"dtype": "F32", "shape": [0], "data_offsets": [5, 5]}})
    with pytest.raises(ArtefactError, match="a gap"):
        read_state(path, **NAMED)


def test_what_is_no_regular_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name, problem in (("pipe", "a named pipe"), (".", "a folder"), ("nothing", "No such file")):
        with pytest.raises(ArtefactError, match=problem):
            read_state(tmp_path / name, **NAMED)
        with pytest.raises(ArtefactError, match=problem):
            read_json(tmp_path / name)


@pytest.mark.parametrize(
    ("about", "problem"),
    [
        ({"x": float("nan")}, "cannot be written as JSON"),
        ({"x": object()}, "cannot be written as JSON"),
        ({"format": "other"}, "the keys format are written by this function"),
        ({"x": "y" * 1_000_001}, "larger than 1000000 bytes"),
        ({1: 2, "1": 3}, "the key '1' is repeated"),
    ],
)
def test_what_could_not_be_read_again_is_not_written(about, problem, tmp_path):
    for write in (lambda path: write_state(path, {}, about, **NAMED), lambda path: write_json(path, about, **NAMED)):
        with pytest.raises(ArtefactError, match=problem):
            write(tmp_path / "state")
        assert os.listdir(tmp_path) == []


def test_a_dtype_that_cannot_be_read_again_is_not_written(tmp_path):
    with pytest.raises(ArtefactError, match="tensor 'a' is complex64"):
        write_state(tmp_path / "state", {"a": torch.zeros(1, dtype=torch.complex64)}, {}, **NAMED)
    assert os.listdir(tmp_path) == []


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "state"
    write_state(path, {"a": torch.ones(1)}, {}, **NAMED)
    write_json(tmp_path / "json", {"x": 1})

    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(ArtefactError, match="it cannot be written: No space left on device"):
        write_state(path, {"a": torch.zeros(1)}, {}, **NAMED)
    with pytest.raises(ArtefactError, match="No space left"):
        write_json(tmp_path / "json", {"x": 2})
    assert read_state(path, **NAMED)[0]["a"].item() == 1
    assert read_json(tmp_path / "json") == {"x": 1}
    assert sorted(os.listdir(tmp_path)) == ["json", "state"]


def test_a_path_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "no" / "state", tmp_path / "folder", tmp_path / ("x" * 300)):
        with pytest.raises(ArtefactError, match="it cannot be written"):
            write_state(path, {}, {}, **NAMED)
        with pytest.raises(ArtefactError, match="it cannot be written"):
            write_json(path, {})
    assert os.listdir(tmp_path) == ["folder"]


def test_json_alone(tmp_path):
    path = tmp_path / "run.json"
    write_json(path, ABOUT)
    assert read_json(path) == ABOUT
    assert read_json(path, schema=About).names == ("x", "ü")
    with pytest.raises(ArtefactError, match=r"run\.json: expected a file of the format some-format: .*format None"):
        read_json(path, **NAMED)
    write_json(path, ABOUT, **NAMED)
    assert read_json(path, **NAMED) == ABOUT
    for text, problem in (("{", "not valid JSON"), ("[]", "not a JSON object"), ("{" + " " * 2**20, "larger than")):
        path.write_text(text)
        with pytest.raises(ArtefactError, match=f"expected a run: .*{problem}"):
            read_json(path, expected="a run")


def test_fingerprints_are_those_stored_before():
    """The two layouts that plugins have stored in files, written out here."""
    tensors = {"a": torch.arange(3.0), "b": torch.tensor([[True]]), "c": torch.ones(2, 3, dtype=torch.bfloat16).T}
    raw = [tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes() for tensor in tensors.values()]
    labels = ["torch.float32 (3,);", "torch.bool (1, 1);", "torch.bfloat16 (3, 2);"]
    plain = b"".join(label.encode() + data for label, data in zip(labels, raw, strict=True))
    assert fingerprint(tensors.values()) == hashlib.sha256(plain).hexdigest()
    named = b"".join(f"{name} {label}".encode() + data for name, label, data in zip("abc", labels, raw, strict=True))
    assert fingerprint(tensors, 'kind {"d":1}') == hashlib.sha256(b'kind {"d":1};' + named).hexdigest()


def test_fingerprints_tell_what_differs():
    one = torch.arange(4.0)
    others = [one.reshape(2, 2), one.double(), one + 1, one.int()]
    known = {fingerprint([one]), fingerprint({"a": one}), fingerprint({"b": one}), fingerprint([one], "x")}
    assert len(known | {fingerprint([other]) for other in others}) == 4 + len(others)
    assert fingerprint([torch.stack([one, one])[0]]) == fingerprint([one])
    assert fingerprint([torch.tensor(1.0), torch.zeros(0)]) != fingerprint([torch.tensor(1.0)])
