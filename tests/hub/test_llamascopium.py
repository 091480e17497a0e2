"""Models of llamascopium in a repository, each in a folder, as its ``upload_to_hf`` writes them."""

from __future__ import annotations

from pathlib import Path

import featurizers
import torch
from safetensors.torch import load_file

FIXTURES = Path(__file__).parents[1] / "fixtures/llamascopium"


def test_by_id_and_subfolder(hub, tmp_path):
    record = hub.create("model", "alice/maps")
    files = dict(record["commits"][hub.head("alice/maps")]["files"])
    for path in (FIXTURES / "clt-jumprelu").iterdir():
        data = path.read_bytes()
        files[f"clt/{path.name}"] = hub.entry(hub.put_bytes(data), len(data), path.suffix != ".json", data)
    hub.commit(record, "refs/heads/main", files, "files", "", "alice", hub.head("alice/maps"))
    golden = load_file(FIXTURES / "golden.safetensors")
    x, z = golden["clt-jumprelu/x.blocks.2.hook_resid_mid"], golden["clt-jumprelu/features"][:, 2]
    part = featurizers.load("alice/maps", subfolder="clt", cache_dir=tmp_path, indices={"layer-2": [4, 1]})
    torch.testing.assert_close(part.encode("layer-2", {"in-2": x}), z[:, [4, 1]])
    assert str(part.writes["out-2"]) == "mlp.out:2"
