"""Loading any file gives a featurizer or a `FeaturizerError`; `benchmarks/fuzz.py` runs the same for hours."""

from __future__ import annotations

import json
import struct
import tempfile
from pathlib import Path
from typing import Any

import featurizers
import pytest
import torch
from featurizers.errors import FeaturizerError, WeightsError
from featurizers.format.weights import read_header
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from tests.support.dictionaries import dictionary
from tests.support.hub import subspace

slow = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
numbers = st.integers() | st.integers(-3, 20) | st.sampled_from([2**31, 2**63, -(2**63), 10**400]) | st.floats()
leaves = st.none() | st.booleans() | numbers | st.text() | st.sampled_from(["os.system", "../a", "\x1b[2J", "identity"])
values = st.recursive(leaves, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=10)


def places(document: Any) -> list[tuple[Any, Any]]:
    """List each container of a JSON document with each of its keys."""
    found, pending = [], [document]
    for container in pending:
        keys = list(container) if isinstance(container, dict) else range(len(container))
        found += [(container, key) for key in keys]
        pending += [container[key] for key in keys if isinstance(container[key], dict | list)]
    return found


def changed(document: Any, data: st.DataObject) -> bytes:
    """Return a JSON document with one to three values replaced, removed or added."""
    document = json.loads(json.dumps(document))
    for _ in range(data.draw(st.integers(1, 3))):
        container, key = data.draw(st.sampled_from(places(document)))
        how = data.draw(st.sampled_from(["replace", "delete", "add"]))
        if how == "replace":
            container[key] = data.draw(values)
        elif how == "delete":
            del container[key]
        elif isinstance(container, dict):
            container[data.draw(st.text())] = data.draw(values)
        else:
            container.append(data.draw(values))
        if not places(document):
            break
    return json.dumps(document, ensure_ascii=data.draw(st.booleans())).encode("utf-8", "surrogatepass")


def spoiled(raw: bytes, data: st.DataObject) -> bytes:
    """Return the bytes with a few replaced, inserted or removed."""
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(raw)))
        length = data.draw(st.integers(0, 3))
        raw = raw[:start] + data.draw(st.binary(max_size=4)) + raw[start + length :]
    return raw


def load(folder: Path) -> None:
    """Check that loading gives a featurizer, or an error that is printable."""
    try:
        found: Any = featurizers.load(folder)
    except FeaturizerError as error:
        found = str(error)
    assert isinstance(found, featurizers.Featurizer) or (found.isprintable() and len(found) < 2000)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    f = subspace()
    f.feature_sets = {"best": torch.tensor([0])}
    f.site = featurizers.Site("resid.post", 3).at(position=(-1,), model="owner/model")
    f.metadata = {"accuracy": [0.5]}
    return f.save_pretrained(tmp_path_factory.mktemp("fuzzing") / "a")


@pytest.fixture(scope="module")
def kept(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@slow
@given(st.data())
def test_any_config(folder, kept, data):
    raw = kept["config.json"]
    how = data.draw(st.sampled_from(["values", "bytes", "other kinds"]))
    document = json.loads(raw)
    if how == "other kinds":
        document["kind"] = data.draw(st.sampled_from([*featurizers.kinds(), "dictionary", "composition"]))
        document["config"] = data.draw(st.dictionaries(st.text() | st.sampled_from(["d_in", "stages", "rule"]), values))
    (folder / "config.json").write_bytes(spoiled(raw, data) if how == "bytes" else changed(document, data))
    (folder / "model.safetensors").write_bytes(kept["model.safetensors"])
    load(folder)


@slow
@given(st.data())
def test_any_weights(folder, kept, data):
    (folder / "config.json").write_bytes(kept["config.json"])
    (folder / "model.safetensors").write_bytes(spoiled(kept["model.safetensors"], data))
    load(folder)


dtypes = st.sampled_from(["F16", "BF16", "F32", "F64", "BOOL", "U8", "I64", "F8_E4M3", "F4", "C64", "f32", 1])
sizes = st.integers(0, 4) | st.sampled_from([-1, 2**31, 2**62, 2**64, 1.0, True, None, "1"])
offsets = st.lists(st.integers(0, 40) | sizes, max_size=3)
entries = st.fixed_dictionaries({"dtype": dtypes, "shape": st.lists(sizes, max_size=3), "data_offsets": offsets})
headers = st.dictionaries(st.text(max_size=3) | st.just("__metadata__"), entries | values, max_size=4)


@st.composite
def nearly_sound(draw: st.DrawFn) -> tuple[dict[str, Any], int]:
    """Draw a header whose tensors fill the file, except for a few bytes."""
    end, header = 0, {}
    for name in draw(st.lists(st.text(max_size=3), unique=True, max_size=4)):
        dtype, size = draw(st.sampled_from([("F32", 4), ("BOOL", 1), ("BF16", 2), ("I64", 8)]))
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        start = end + draw(st.sampled_from([0, 0, 0, 0, 0, 1, -1]))
        end = start + size * torch.Size(shape).numel() + draw(st.sampled_from([0, 0, 0, 0, 0, 1, -1]))
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    return header, max(0, end + draw(st.sampled_from([0, 0, 0, 1])))


@slow
@given(headers.map(lambda header: (header, 40)) | nearly_sound(), st.binary(max_size=3))
@example(({"a": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}, 0), b"")
@example(({"__metadata__": {"a": "b"}}, 0), b" ")
def test_a_header_that_is_taken_is_the_one_that_safetensors_sees(header, behind):
    raw = json.dumps(header[0]).encode() + behind
    with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
        file.write(struct.pack("<Q", len(raw)) + raw + bytes(header[1]))
        file.flush()
        try:
            specs = read_header(Path(file.name), "here")
        except WeightsError:
            return
        with safe_open(file.name, framework="pt") as opened:
            found = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    assert {name: (str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in found.items()} == {
        name: (spec.dtype, spec.shape) for name, spec in specs.items()
    }


@slow
@given(
    st.dictionaries(
        st.text(max_size=8).filter(lambda name: name != "__metadata__"), st.lists(st.integers(0, 3), max_size=4)
    ),
    st.sampled_from([torch.float32, torch.bfloat16, torch.bool, torch.int64, torch.float64]),
)
def test_a_header_that_safetensors_writes_is_taken(shapes, dtype):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.safetensors")
        try:
            save_file({name: torch.zeros(shape, dtype=dtype) for name, shape in shapes.items()}, path, {"format": "pt"})
        except (SafetensorError, UnicodeEncodeError):  # half of a surrogate pair in a name
            return
        specs = read_header(path, "here")
    assert {name: spec.shape for name, spec in specs.items()} == {name: tuple(s) for name, s in shapes.items()}


@pytest.fixture(scope="module", params=[("sae-lens", "relu"), ("sparsify", "topk"), ("dictionary-learning", "relu")])
def foreign(request, tmp_path_factory):
    """Write a folder in the format of another library; return it, the path of its config, and the config."""
    to, rule = request.param
    folder = tmp_path_factory.mktemp("fuzzing") / to
    f = dictionary(rule)
    f.site = featurizers.Site("resid.post", 3)
    featurizers.convert(f, folder, to=to)
    config = next(folder.glob("*.json"))
    return folder, config, json.loads(config.read_text())


@slow
@given(st.data())
def test_any_config_of_another_library(foreign, data):
    folder, config, document = foreign
    config.write_bytes(changed(document, data))
    load(folder)


def test_records_of_pyvene_models(tmp_path_factory):
    """Loading any ``intervenable.json`` gives a model, or an error that is printable."""
    from tests.support.intervenables import several
    from tests.support.models import tiny_model

    folder, model = tmp_path_factory.mktemp("pyvene") / "it", tiny_model("gpt2")
    featurizers.save_intervenable(several(), folder)
    record = folder / "intervenable.json"
    sound = record.read_bytes()

    @slow
    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        record.write_bytes(changed(json.loads(sound), data) if data.draw(st.booleans()) else spoiled(sound, data))
        said = ""
        try:
            featurizers.load_intervenable(folder, model)
        except FeaturizerError as error:
            said = str(error)
        assert said.isprintable()
        assert len(said) < 3500

    check()
