"""Repositories of sparsify, with a folder for each hookpoint."""

from __future__ import annotations

import json
import re
from pathlib import Path

import featurizers
import pytest
import torch
from featurizers.errors import FeaturizerError, HubNotFoundError, ManifestError, SourceError, WeightsError
from huggingface_hub import constants
from safetensors.torch import load_file, save

GOLDEN = Path(__file__).parents[1] / "fixtures/sparsify/golden.safetensors"


@pytest.fixture
def repo(hub):
    """Create ``alice/sae`` with two hookpoints, and return its golden tensors."""
    tensors = {n.removeprefix("topk/"): t for n, t in load_file(GOLDEN).items() if n.startswith("topk/")}
    weights = save({n: tensors[n] for n in ("encoder.weight", "encoder.bias", "W_dec", "b_dec")})
    cfg = json.dumps({"d_in": 16, "k": 8, "expansion_factor": 4, "activation": "topk"}).encode()
    record = hub.create("model", "alice/sae")
    files = dict(record["commits"][hub.head("alice/sae")]["files"])
    for hookpoint in ("layers.1", "layers.2.mlp"):
        for name, data in (("cfg.json", cfg), ("sae.safetensors", weights)):
            files[f"{hookpoint}/{name}"] = hub.entry(hub.put_bytes(data), len(data), name != "cfg.json", data)
    root = json.dumps({"sae": {"k": 8}}).encode()
    files["config.json"] = hub.entry(hub.put_bytes(root), len(root), False, root)  # sparsify writes one
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


@pytest.mark.parametrize("source", [("alice/sae", "layers.1"), ("sparsify:alice/sae/layers.1", None)], ids=str)
@pytest.mark.parametrize("name", ["sae.safetensors", "cfg.json"])
def test_a_flipped_bit_is_found_by_the_hubs_checksums(hub, repo, source, name):
    options = {"subfolder": source[1], "verify": True}
    hub.fail(f"GET .*layers.1/{name}|GET /cdn/.*{name}", "flip", times=1, offset=-4, bit=1)
    with pytest.raises(FeaturizerError) as caught:
        featurizers.load(source[0], **options)
    assert re.search(rf"{name} has checksum \w+, the Hub says \w+; load it with force_download=True", str(caught.value))
    if name == "sae.safetensors":  # without verify the client's cache is trusted
        featurizers.load(source[0], subfolder=source[1])
    assert featurizers.load(source[0], **options, force_download=True).kind == "dictionary"
    assert featurizers.load(source[0], **options).kind == "dictionary"


def test_a_cache_without_links_keeps_no_checksum(hub, repo, monkeypatch):
    if not hasattr(constants, "HF_HUB_DISABLE_SYMLINKS"):
        pytest.skip("this huggingface_hub has no option for a cache without links")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_SYMLINKS", True)
    assert featurizers.load("alice/sae", subfolder="layers.1").kind == "dictionary"
    with pytest.raises(WeightsError, match=r"the cache keeps no checksum of cfg\.json; leave out verify"):
        featurizers.load("alice/sae", subfolder="layers.1", verify=True)


def test_configs_are_asked_for_their_size_first(hub, repo):
    record = hub.repo("alice/sae")
    files = dict(record["commits"][hub.head("alice/sae")]["files"])
    data = b" " * 1_000_001
    files["layers.1/cfg.json"] = hub.entry(hub.put_bytes(data), len(data), False, data)
    hub.commit(record, "refs/heads/main", files, "files", "", "alice", hub.head("alice/sae"))
    with pytest.raises(ManifestError, match=r"cfg\.json has 1000001 bytes, more than the 1000000 that it may have"):
        featurizers.load("alice/sae", subfolder="layers.1")
    assert not [request for request in hub.requests() if request.startswith("GET") and "cfg.json" in request]
