"""Repositories of sparsify, laid out by hookpoint."""

from __future__ import annotations

import json
from pathlib import Path

import featurizers
import pytest
import torch
from featurizers.errors import HubNotFoundError, ManifestError, SourceError
from safetensors.torch import load_file, save

GOLDEN = Path(__file__).parents[1] / "fixtures/sparsify/golden.safetensors"


@pytest.fixture
def repo(hub):
    """``alice/sae`` with two hookpoints."""
    tensors = {n.removeprefix("topk/"): t for n, t in load_file(GOLDEN).items() if n.startswith("topk/")}
    weights = save({n: tensors[n] for n in ("encoder.weight", "encoder.bias", "W_dec", "b_dec")})
    cfg = json.dumps({"d_in": 16, "k": 8, "expansion_factor": 4, "activation": "topk"}).encode()
    record = hub.create("model", "alice/sae")
    files = dict(record["commits"][hub.head("alice/sae")]["files"])
    for hookpoint in ("layers.1", "layers.2.mlp"):
        for name, data in (("cfg.json", cfg), ("sae.safetensors", weights)):
            files[f"{hookpoint}/{name}"] = hub.entry(hub.put_bytes(data), len(data), name != "cfg.json", data)
    root = json.dumps({"sae": {"k": 8}}).encode()
    files["config.json"] = hub.entry(hub.put_bytes(root), len(root), False, root)  # sparsify's own, of the training
    hub.commit(record, "refs/heads/main", files, "files", "", "alice", hub.head("alice/sae"))
    return tensors


def test_by_subfolder_and_by_one_string(hub, repo):
    for f, site in (
        (featurizers.load("alice/sae", subfolder="layers.1"), "resid.post:1"),
        (featurizers.load("sparsify:alice/sae/layers.2.mlp"), "mlp.out:2"),
    ):
        torch.testing.assert_close(f.encode(repo["x"]), repo["features"], rtol=1e-6, atol=1e-6)
        assert str(f.site) == site
        assert f.revision == hub.head("alice/sae")
    assert not any("layers.2" in request and "cfg" in request for request in hub.requests()[:2])


def test_what_is_not_there(hub, repo):
    with pytest.raises(SourceError, match=r"it has 'layers\.1', 'layers\.2\.mlp'"):
        featurizers.load("sparsify:alice/sae/layers.9")
    with pytest.raises(SourceError, match="write 'sparsify:owner/name/hookpoint'"):
        featurizers.load("sparsify:alice")
    with pytest.raises(HubNotFoundError, match="no such repository"):
        featurizers.load("sparsify:alice/none/layers.1")
    with pytest.raises(ManifestError, match="no installed plugin knows the format"):
        featurizers.load("alice/sae")
    with pytest.raises(HubNotFoundError):
        featurizers.load("alice/sae", subfolder="layers.9")
