"""Maps of several layers of Gemma Scope 2 in a repository: a slice downloads only the files that it needs."""

from __future__ import annotations

from pathlib import Path

import featurizers
import torch
from safetensors.torch import load_file

FIXTURES = Path(__file__).parents[1] / "fixtures/gemma-scope-2"
NAME = "width_60_l0_big_affine"


def test_by_id_and_subfolder(hub, tmp_path):
    repo = "google/gemma-scope-2-270m-pt"
    record = hub.create("model", repo)
    files = dict(record["commits"][hub.head(repo)]["files"])
    for path in (FIXTURES / "clt" / NAME).iterdir():
        data = path.read_bytes()
        files[f"clt/{NAME}/{path.name}"] = hub.entry(hub.put_bytes(data), len(data), path.suffix != ".json", data)
    hub.commit(record, "refs/heads/main", files, "files", "", "google", hub.head(repo))
    golden = load_file(FIXTURES / "golden.safetensors")
    x, z = golden[f"{NAME}/x"], golden[f"{NAME}/features"]
    one = featurizers.load(repo, subfolder=f"clt/{NAME}", cache_dir=tmp_path, indices={"layer-2": [4, 1]})
    assert {path.name for path in tmp_path.rglob("params_layer_*")} == {"params_layer_2.safetensors"}
    torch.testing.assert_close(one.encode("layer-2", {"in-2": x[2]}), z[2][:, [4, 1]])
    whole = featurizers.load(repo, subfolder=f"clt/{NAME}", cache_dir=tmp_path)
    torch.testing.assert_close(whole.encode("layer-0", {"in-0": x[0]}), z[0])
    assert {site.model for site in whole.sites.values()} == {"google/gemma-3-270m"}
