"""Checks of programs that one process runs through featurizers on a mesh, while the others follow."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import featurizers
import featurizers_sharded
import pytest
import torch
import torch.distributed as dist
from featurizers import Ablate, errors
from featurizers.errors import OtherRankError
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from tests.plugins.sharded.checks import activations, close, mesh_of, of_two, whole_of
from tests.plugins.sharded.map_checks import cross_layer, given


def dictionary_and_map(rank: int, folder: Path, mesh: DeviceMesh, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a dictionary and a map, whole and on the mesh."""
    top = whole_of("topk", 61, {"d_in": 16})
    top.site = "resid.post:1"
    paths = {"f": folder / f"{name}-f", "m": folder / f"{name}-m"}
    if rank == 0:
        top.save_pretrained(paths["f"])
        cross_layer().save_pretrained(paths["m"])
    dist.barrier()
    wholes, parts = ({n: featurizers.load(path, mesh=each) for n, path in paths.items()} for each in (None, mesh))
    return wholes, parts


def check_a_harvest_of_data_times_features_has_the_rows_of_the_whole(rank: int, size: int, folder: Path) -> None:
    if size == 2:  # it takes seconds to import what it needs
        return
    from tests.support.site_maps import model

    mesh = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("data", "features"))
    wholes, parts = dictionary_and_map(rank, folder, mesh, "harvested")
    gpt2, ids = model("gpt2"), torch.arange(60).reshape(6, 10) % 40
    options: dict[str, Any] = {"shard_tokens": 20, "values": "float32", "progress": False}
    with pytest.raises(errors.UsageError, match="divided over a mesh"):
        featurizers.harvest(gpt2, parts, ids, folder / f"harvest-of-{rank}", **options)
    assert not (folder / f"harvest-of-{rank}").exists()
    out = folder / "harvest-led"
    with featurizers_sharded.led(*parts.values()) as is_first:
        assert is_first == (rank % 2 == 0)
        if is_first:
            featurizers.harvest(gpt2, parts, ids, out, shard=(mesh.get_local_rank("data"), size // 2), **options)
    dist.barrier()
    with featurizers_sharded.led(parts["f"]) as is_first:
        if is_first and rank == 0:
            found = featurizers.harvest(gpt2, wholes, ids, out, **options)  # the plan is that of the whole
            compare_tables(found, featurizers.harvest(gpt2, wholes, ids, folder / "harvest-whole", **options))
            again, of_whole = (featurizers.evaluate(f["f"], harvest=out, progress=False) for f in (parts, wholes))
            assert again["l0"] == of_whole["l0"]
    dist.barrier()


def compare_tables(found: Any, expected: Any) -> None:
    """Compare the features of two harvests, which differ by rounding at most."""
    for name in ("f", "m.layer-0", "m.layer-1", "m.layer-2"):
        one, other = (each.table(name).to_pydict() for each in (found, expected))
        values, expected_values = one.pop("values"), other.pop("values")
        assert one == other, name
        assert any(values), name
        for value, row in zip(values, expected_values, strict=True):
            close(torch.tensor(value), torch.tensor(row), name)


@of_two
def check_an_evaluation_is_that_of_the_whole(rank: int, size: int, folder: Path) -> None:
    from tests.support.site_maps import model

    gpt2, ids = model("gpt2"), torch.arange(60).reshape(6, 10) % 40
    wholes, parts = dictionary_and_map(rank, folder, mesh_of(size), "evaluated")
    expected = {name: featurizers.evaluate(each, gpt2, ids, progress=False) for name, each in wholes.items()}

    def compare(found: dict[str, Any]) -> None:
        for name, each in found.items():
            for metric in ("l0", "fvu", "ce_with_sae"):
                if metric in expected[name].metrics:
                    assert abs(each[metric] - expected[name][metric]) <= 1e-5 * max(1.0, abs(expected[name][metric]))

    compare({name: featurizers.evaluate(each, gpt2, ids, progress=False) for name, each in parts.items()})
    with featurizers_sharded.led(*parts.values()) as is_first:
        if is_first:
            compare({name: featurizers.evaluate(each, gpt2, ids, progress=False) for name, each in parts.items()})
    assert not is_first or {"l0", "fvu"} <= expected["f"].metrics.keys()


def check_calls_of_the_first_process_are_followed(rank: int, size: int, folder: Path) -> None:
    wholes, parts = dictionary_and_map(rank, folder, mesh_of(size), "followed")
    whole, f, m = wholes["f"], parts["f"], parts["m"]
    x, y = activations(3, 16), activations(3, 16, seed=2)
    reads, _ = given(m, 3)
    with featurizers_sharded.led(f, m) as is_first:
        if is_first:
            close(f.interchange(x, y, [60, 0]), whole.interchange(x, y, [60, 0]))
            close(f.encode_sparse(x).values, whole.encode_sparse(x).values)
            close(f.decode(whole.encode(x)), whole.decode(whole.encode(x)))
            close(m.encode("layer-0", reads), wholes["m"].encode("layer-0", reads))
            with pytest.raises(errors.ShapeError):  # the others go on
                f.encode(x[:, :5])
            with pytest.raises(errors.FeatureIndexError):
                f.interchange(x, y, [61])
            with pytest.raises(errors.UsageError, match="no gradients in led"):
                f.encode(x.clone().requires_grad_())
            with pytest.raises(errors.UsageError, match="no copy"):
                copy.deepcopy(f).encode(x)
            with pytest.raises(errors.UsageError, match="led already"), featurizers_sharded.led(f):
                pass
            m.save_pretrained(folder / "saved-led")
            assert torch.equal(featurizers.load(folder / "saved-led").b_dec["out-1"], wholes["m"].b_dec["out-1"])
    close(f.encode(x), whole.encode(x))
    failure = ArithmeticError if rank == 0 else OtherRankError
    with pytest.raises(failure, match="nothing works"), featurizers_sharded.led(f):
        raise ArithmeticError("nothing works")
    close(f.encode(x), whole.encode(x))
    for wrong in ((), (whole,), (Ablate(whole),)):
        with pytest.raises(errors.UsageError, match="led takes"), featurizers_sharded.led(*wrong):
            pass
