"""Checks of an evaluation by several processes, beside the same one by a single process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import featurizers
import pytest
import torch
import torch.distributed as dist
from featurizers.errors import OtherRankError, UsageError
from featurizers_evaluate import compare, sweep
from featurizers_transcoder import CrossLayerTranscoder

from tests.plugins.evaluate.test_evaluate import IDS, decoder, evaluated, of_maps, sparse


def same(found: Any, expected: Any) -> None:
    """Compare all that two evaluations hold; sums of other order round otherwise."""
    assert found.about == expected.about
    assert found.metrics.keys() == expected.metrics.keys()
    for name, metric in expected.metrics.items():
        other = found.metrics[name]
        assert (other.value is None) == (metric.value is None), name
        if metric.value is not None:
            assert other.value == pytest.approx(metric.value, rel=1e-9, abs=1e-12), name
        assert (other.interval is None) == (metric.interval is None), name
        if metric.interval is not None:
            assert other.interval == pytest.approx(metric.interval, rel=1e-9, abs=1e-12), name
    assert (found.density is None) == (expected.density is None)
    if expected.density is not None:
        assert torch.equal(torch.as_tensor(found.density), torch.as_tensor(expected.density))


def check_every_metric_is_that_of_one_process(rank: int, size: int, folder: Path) -> None:
    f, world = sparse(), dist.group.WORLD
    for batch_size in (5, 7, 24):  # 5, 4 and 1 batches: with one, two processes have none
        expected = evaluated(f, batch_size=batch_size)
        same(evaluated(f, batch_size=batch_size, group=world), expected)
    assert expected.metrics["kl"].interval is not None
    shifted = featurizers.create("identity", d_in=32)
    ids = [row.tolist()[: 3 + i % 9] for i, row in enumerate(IDS)]  # padding
    same(evaluated(shifted, tokens=ids, batch_size=5, group=world), evaluated(shifted, tokens=ids, batch_size=5))


def check_several_at_once(rank: int, size: int, folder: Path) -> None:
    from tests.support.models import tiny_model

    f, model, world = sparse(), tiny_model("llama"), dist.group.WORLD
    f.site = "resid.post:1"
    options = {"batch_size": 5, "progress": False}
    for found, expected in zip(
        sweep(f, model, IDS, k=[1, 3], group=world, **options), sweep(f, model, IDS, k=[1, 3], **options), strict=True
    ):
        assert found[0] == expected[0]
        same(found[1], expected[1])
    (_, found), (_, expected) = (next(iter(compare([f], model, IDS, group=g, **options))) for g in (world, None))
    same(found, expected)


def check_a_map_with_several_writes(rank: int, size: int, folder: Path) -> None:
    f = of_maps(
        CrossLayerTranscoder,
        {i: ([f"in-{i}"], [f"out-{j}" for j in range(i, 3)]) for i in range(3)},
        {f"in-{i}": f"mlp.in:{i}" for i in range(3)},
        {f"out-{i}": f"mlp.out:{i}" for i in range(3)},
    )
    options = {"model": decoder("llama"), "tokens": IDS % 40, "batch_size": 5}
    found, expected = (evaluated(f, group=group, **options) for group in (dist.group.WORLD, None))
    same(found, expected)
    for name, metrics in expected.writes.items():
        for each, metric in metrics.items():
            assert found.writes[name][each].value == pytest.approx(metric.value, rel=1e-9, abs=1e-12), (name, each)


def check_the_error_of_one_process_is_one_of_all(rank: int, size: int, folder: Path) -> None:
    f = sparse()
    if rank == 1:
        f.reconstruct = lambda x: (_ for _ in ()).throw(UsageError("it broke"))
    with pytest.raises(UsageError if rank == 1 else OtherRankError, match="it broke"):
        evaluated(f, metrics=["reconstruction"], batch_size=5, group=dist.group.WORLD)
    with pytest.raises(UsageError, match="group is a torch"):
        evaluated(f, group=3)
