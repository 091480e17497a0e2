"""Grids: means over pairs, files, pictures and heads."""

from __future__ import annotations

import math
from typing import Any

import featurizers
import pytest
import torch
from featurizers.errors import UsageError
from featurizers_patching import Grid, patch

from tests.support.patching import packable

BASE, SOURCE = [5, 9, 3, 7, 11, 2], [5, 9, 14, 3, 9, 7]
SHORT, SHORT_SOURCE = [8, 1, 4, 6], [3, 12, 5, 1]


@pytest.fixture(scope="module")
def model() -> Any:
    return packable("llama")


def test_means_and_errors_over_pairs_are_those_of_torch(model: Any) -> None:
    bases, sources = [BASE, SHORT, SHORT_SOURCE], [SOURCE, SHORT_SOURCE, SHORT]
    grid = patch(model, bases, sources, metric=("logit_difference", 7, 9))
    assert grid.mean().shape == grid.stderr().shape == (1, 3, 6)
    first = grid.values[0, 1, :, 2]
    torch.testing.assert_close(grid.mean()[0, 1, 2], first.mean())
    torch.testing.assert_close(grid.stderr()[0, 1, 2], first.std() / math.sqrt(3))
    assert grid.stderr()[0, 1, 5].isnan()  # one pair alone has that token
    assert grid.counts()[0, 1].tolist() == [3, 3, 3, 3, 1, 1]
    best = grid.top(1)[0]
    assert abs(best.value) == float(grid.mean().abs().nan_to_num().max())
    assert len(list(grid.rows())) == 3 * (6 + 4 + 4)
    assert "resid.pre:" in repr(grid)


def test_a_grid_is_saved_and_loaded(model: Any, tmp_path: Any) -> None:
    from featurizers.errors import ArtefactError
    from safetensors.torch import load_file, save_file

    grid = patch(model, [BASE, SHORT], [SOURCE, SHORT_SOURCE], ["resid.pre", "attn.z:0:1"], metric=("probability", 7))
    path = grid.save(tmp_path / "grid.safetensors")
    again = featurizers.load_grid(path)
    assert isinstance(again, Grid)
    assert torch.equal(again.raw.nan_to_num(-9), grid.raw.nan_to_num(-9))
    for name in ("metrics", "sites", "positions", "labels", "prompts", "normalized", "about"):
        assert getattr(again, name) == getattr(grid, name)
    assert repr(again) == repr(grid)
    tensors = load_file(path)
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = file.read(size)
    import json

    metadata = json.loads(header)["__metadata__"]
    save_file({**tensors, "base": tensors["base"][:, :1].clone()}, path, metadata=metadata)
    with pytest.raises(ArtefactError, match="sizes"):
        featurizers.load_grid(path)
    save_file(tensors, path)
    with pytest.raises(ArtefactError, match="expected a grid of patching"):
        featurizers.load_grid(path)


def test_a_heat_map_shows_the_means(model: Any) -> None:
    grid = patch(model, BASE, SOURCE, metric=("logit_difference", 7, 9))
    axes = grid.plot()
    torch.testing.assert_close(torch.tensor(axes.images[0].get_array()), grid.mean()[0])
    low, high = axes.images[0].get_clim()
    assert low == -high
    assert [label.get_text() for label in axes.get_xticklabels()] == list(map(str, BASE))


def test_heads_are_patched_one_by_one_and_drawn_by_block(model: Any) -> None:
    options: dict[str, Any] = {"metric": ("logit_difference", 7, 9)}
    grid = patch(model, BASE, SOURCE, heads="all", **options)
    assert torch.equal(grid.values, patch(model, BASE, SOURCE, "attn.z:*:*", **options).values)
    some = patch(model, BASE, SOURCE, ["attn.q:2", "attn.q:0"], heads=[3, 1], positions=["all"], **options)
    assert list(map(str, some.sites)) == ["attn.q:2:3", "attn.q:2:1", "attn.q:0:3", "attn.q:0:1"]
    values, blocks = some.by_head()
    assert blocks == [0, 2]
    expected = some.mean()[0, :, 0]
    assert torch.equal(values[1, [3, 1]], expected[:2])
    assert torch.equal(values[0, [3, 1]], expected[2:])
    assert values[:, [0, 2]].isnan().all()
    drawn = torch.tensor(some.plot().images[0].get_array().filled(math.nan))
    torch.testing.assert_close(drawn, values, equal_nan=True)
    at_2 = torch.tensor(grid.plot(position="2").images[0].get_array())
    torch.testing.assert_close(at_2, grid.mean()[0, :, 2].view(3, 4))
    assert grid.plot().images[0].get_array().shape == (12, 6)
    with pytest.raises(UsageError, match="name one position of the grid"):
        grid.by_head()
    with pytest.raises(UsageError, match="not heads of one kind"):
        patch(model, BASE, SOURCE, "resid.pre", positions=[-1], **options).by_head()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": "every"}, "heads are 'all' or a list"),
        ({"heads": []}, "heads are 'all' or a list"),
        ({"heads": [-1]}, "heads are 'all' or a list"),
        ({"heads": "all", "sites": "resid.pre"}, "heads= is for sites such as"),
        ({"heads": "all", "sites": ["attn.z:1:0"]}, "heads= is for sites such as"),
    ],
)
def test_heads_that_there_are_not_are_refused(model: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        patch(model, BASE, SOURCE, metric=("logit_difference", 7, 9), **options)
