"""Repositories of circuit-tracer, from which only the files of the layers that are asked for are downloaded."""

from __future__ import annotations

from pathlib import Path

import featurizers
import pytest
import torch
from featurizers.errors import SourceError
from safetensors.torch import load_file

FIXTURES = Path(__file__).parents[1] / "fixtures/circuit-tracer"


@pytest.fixture
def repo(hub):
    """Create ``alice/transcoders`` with a set at the top and a cross-layer transcoder in a folder."""
    record = hub.create("model", "alice/transcoders")
    files = dict(record["commits"][hub.head("alice/transcoders")]["files"])
    for folder, prefix in (("set-relu", ""), ("clt-relu", "clt/")):
        for path in (FIXTURES / folder).iterdir():
            data = path.read_bytes()
            files[prefix + path.name] = hub.entry(hub.put_bytes(data), len(data), path.suffix != ".yaml", data)
    hub.commit(record, "refs/heads/main", files, "files", "", "alice", hub.head("alice/transcoders"))


def test_by_name_by_folder_and_by_layer(hub, repo, tmp_path):
    x = load_file(FIXTURES / "golden.safetensors")
    one = featurizers.load("circuit-tracer:alice/transcoders/layer-2", cache_dir=tmp_path, indices=[4])
    assert {path.name for path in tmp_path.rglob("layer_*")} == {"layer_2.safetensors"}
    expected = x["set-relu/features"][2][:, [4]]
    torch.testing.assert_close(one.encode("features", {"in": x["set-relu/x"][2]}), expected)
    whole = featurizers.load("alice/transcoders", cache_dir=tmp_path)
    torch.testing.assert_close(whole.encode("layer-0", {"in-0": x["set-relu/x"][0]}), x["set-relu/features"][0])
    for clt in (
        featurizers.load("alice/transcoders", subfolder="clt", cache_dir=tmp_path),
        featurizers.load("circuit-tracer:alice/transcoders/clt", cache_dir=tmp_path),
    ):
        torch.testing.assert_close(clt.encode("layer-1", {"in-1": x["clt-relu/x"][1]}), x["clt-relu/features"][1])
    last = featurizers.load("circuit-tracer:alice/transcoders/clt/layer-2", cache_dir=tmp_path)
    assert list(last.writes) == ["out-2"]
    assert {one.revision, whole.revision, last.revision} == {hub.head("alice/transcoders")}
    with pytest.raises(SourceError, match="the layers 0 to 2"):
        featurizers.load("circuit-tracer:alice/transcoders/layer-9", cache_dir=tmp_path)
