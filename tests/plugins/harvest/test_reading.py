"""A harvest that is read back: batches, densities, the index by feature, and the files of others."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import featurizers_harvest
import pyarrow as pa
import pyarrow.dataset
import pytest
import torch
from featurizers.errors import ArtefactError, UsageError
from featurizers_harvest import Harvest, index

from tests.plugins.harvest.test_harvest import IDS, harvest, topk


@pytest.fixture(scope="module")
def found(tmp_path_factory: Any) -> Harvest:
    """Return a harvest of features and activations."""
    return harvest({"f": topk(), "x": "resid.post:1"}, IDS, Path(tmp_path_factory.mktemp("it")) / "out")


def stacked(found: Harvest) -> torch.Tensor:
    return torch.tensor([row["activation"] for row in found.table("x").to_pylist()])


def test_batches_have_each_activation_once_an_epoch_and_are_seeded(found: Harvest) -> None:
    whole = stacked(found)
    in_order = list(found.batches("x", 16, seed=None))
    assert torch.equal(torch.cat(in_order), whole)
    assert {len(batch) for batch in in_order[:-1]} == {16}
    first, again, other = (list(found.batches("x", 16, seed=s, buffer=40, epochs=2)) for s in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    rows = torch.cat(first)
    assert len(rows) == 2 * len(whole)
    for epoch in (rows[: len(whole)], rows[len(whole) :]):
        assert not torch.equal(epoch, whole)
        assert sorted(map(tuple, epoch.tolist())) == sorted(map(tuple, whole.tolist()))


def test_densities_are_the_shares_of_the_rows(found: Harvest) -> None:
    counts = torch.zeros(64, dtype=torch.float64)
    for row in found.table("f").to_pylist():
        counts[row["indices"]] += 1
    torch.testing.assert_close(found.densities("f"), counts / found.n_tokens)


@pytest.mark.parametrize("pairs", [50, 10**6])
def test_the_index_has_every_pair_by_feature_and_the_largest_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pairs: int
) -> None:
    own = harvest({"f": topk()}, IDS, tmp_path / "out")
    monkeypatch.setattr(index, "PAIRS", pairs)
    folder = featurizers_harvest.build_index(own, "f")
    assert (len(list(folder.glob("*.parquet"))) > 5) == (pairs == 50)
    rows = pa.dataset.dataset(sorted(map(str, folder.glob("*.parquet")))).to_table().to_pylist()
    expected = [
        {"feature": feature, "value": value, "document": row["document"], "position": row["position"]}
        for row in own.table("f").to_pylist()
        for feature, value in zip(row["indices"], row["values"], strict=True)
    ]
    expected.sort(key=lambda row: (row["feature"], -row["value"], row["document"], row["position"]))
    assert rows == expected
    feature = max(range(64), key=lambda number: sum(row["feature"] == number for row in rows))
    of_feature = [row for row in rows if row["feature"] == feature]
    contexts = featurizers_harvest.top_contexts(own, "f", feature, k=5, width=2)
    assert [(c.document, c.position, c.value) for c in contexts] == [
        (row["document"], row["position"], row["value"]) for row in of_feature[:5]
    ]
    for context in contexts:
        assert context.start == max(0, context.position - 2)
        assert context.tokens == IDS[context.document][context.start : context.position + 3]
    assert own.is_complete, "the index is beside the harvest"
    assert featurizers_harvest.open(tmp_path / "out").is_complete


def test_what_cannot_be_read_is_refused(found: Harvest) -> None:
    with pytest.raises(UsageError, match="'f' has features; activations are harvested by naming"):
        found.batches("f", 16)
    with pytest.raises(UsageError, match="'x' has activations and no features"):
        found.densities("x")
    with pytest.raises(UsageError, match="nothing was harvested as 'y'"):
        found.table("y")
    with pytest.raises(UsageError, match="batch_size is a whole number"):
        found.batches("x", 0)
    with pytest.raises(UsageError, match="feature is a whole number"):
        featurizers_harvest.top_contexts(found, "f", -1)
    assert featurizers_harvest.top_contexts(found, "f", 10**6) == []


@pytest.mark.parametrize("values", ["float32", "float16"])
def test_sae_lens_reads_the_activations(tmp_path: Path, values: str) -> None:
    pytest.importorskip("datasets")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        store = pytest.importorskip("sae_lens.training.activations_store")
    found = harvest({"x": "resid.post:1"}, IDS, tmp_path / "out", values=values)
    hook = "blocks.1.hook_resid_post"
    contexts = featurizers_harvest.to_sae_lens(found, "x", tmp_path / "cached", hook_name=hook, context_size=8)
    assert contexts == found.n_tokens // 8
    theirs = object.__new__(store.ActivationsStore)
    theirs.cached_activations_path, theirs.hook_name = str(tmp_path / "cached"), hook
    theirs.device, theirs.dtype, theirs.context_size, theirs.d_in = torch.device("cpu"), torch.float32, 8, 32
    cached = theirs.load_cached_activation_dataset()
    x, tokens = cached[:][hook], cached[:]["token_ids"]
    assert x.shape == (contexts, 8, 32)
    torch.testing.assert_close(x.flatten(0, 1).float(), stacked(found)[: contexts * 8].float())  # datasets 3 widens
    assert tokens.flatten().tolist() == [i for ids in IDS for i in ids][: contexts * 8]
    with pytest.raises(ArtefactError, match="it is there already"):
        featurizers_harvest.to_sae_lens(found, "x", tmp_path / "cached", hook_name=hook, context_size=8)


def cached_by_delphi(path: Path) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return what a file of delphi says, by its own reader where that is installed."""
    try:
        from delphi.latents.loader import TensorBuffer
    except ImportError:
        from safetensors.numpy import load_file

        data = load_file(path)
        locations = torch.tensor(data["locations"].astype("int64"))
        locations[:, 2] += int(path.stem.split("_")[0])
        return locations, torch.tensor(data["activations"]), torch.tensor(data["tokens"])
    return TensorBuffer(str(path), "layers.1").load()  # type: ignore[no-any-return]


def test_delphi_reads_the_features(tmp_path: Path) -> None:
    f = topk()
    f.special_tokens = (IDS[2][0],)
    found = harvest({"f": f}, IDS, tmp_path / "out")
    contexts = featurizers_harvest.to_delphi(
        found, "f", tmp_path / "cache", module="layers.1", context_size=8, splits=3
    )
    assert contexts == found.n_tokens // 8
    places = {(row["document"], row["position"]): i for i, row in enumerate(found.table().to_pylist())}
    expected = {}
    for row in found.table("f").to_pylist():
        at = places[row["document"], row["position"]]
        if at < contexts * 8:
            pairs = zip(row["indices"], torch.tensor(row["values"]).half().tolist(), strict=True)
            expected |= {(at // 8, at % 8, feature): value for feature, value in pairs}
    paths = sorted((tmp_path / "cache" / "layers.1").glob("*.safetensors"))
    assert [path.stem for path in paths] == ["0_20", "21_41", "42_63"]
    read: dict[tuple[int, ...], float] = {}
    for path in paths:
        locations, activations, tokens = cached_by_delphi(path)
        assert tokens.flatten().tolist() == [i for ids in IDS for i in ids][: contexts * 8]
        read |= {tuple(place): value for place, value in zip(locations.tolist(), activations.tolist(), strict=True)}
    assert read == expected
    with pytest.raises(UsageError, match="a module is letters"):
        featurizers_harvest.to_delphi(found, "f", tmp_path / "x", module="../x", context_size=8)
