"""Size of a featurizer on disk."""

from __future__ import annotations

import tempfile
from pathlib import Path

import featurizers
import torch
from featurizers_subspace import SubspaceFeaturizer
from peers import ParametrizedSubspace
from timing import Benchmark, Settings, Sizes, same


def subspace(settings: Settings) -> Sizes:
    """Compare the files of a subspace of the width of a 7B model."""
    d_in, n_features = settings.size(4096, 256), settings.size(16, 4)
    torch.manual_seed(0)
    theirs = ParametrizedSubspace(d_in, n_features)
    weight = theirs.rotate.weight.detach().clone()
    ours = SubspaceFeaturizer.from_basis(weight, orthonormalize=True)
    with tempfile.TemporaryDirectory() as name:
        folder, pickles = Path(name, "artefact"), Path(name, "pickles")
        pickles.mkdir()
        ours.save_pretrained(folder)
        for part in ("featurizer", "inverse_featurizer"):
            info = {
                "class": "ParametrizedSubspace",
                "n_features": n_features,
                "additional_config": {"rotation_matrix": weight, "requires_grad": True},
            }
            torch.save({"model_info": info, "state_dict": theirs.state_dict()}, pickles / part)
        loaded = featurizers.load(folder)
        checked = same(loaded.orthonormal_basis(), weight, 1e-5, "basis")
        return Sizes(
            f"artefact on disk, d={d_in}, k={n_features}",
            "two pickles of the parametrized rotation, for the featurizer and for its inverse",
            _bytes(folder),
            _bytes(pickles),
            checked,
        )


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


BENCHMARKS = (Benchmark("artefact", subspace, required=400),)
