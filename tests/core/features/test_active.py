"""Features that are not 0, in flat form and side by side, of every kind; compared with dense features."""

from __future__ import annotations

from typing import Any

import featurizers
import pytest
import torch
from featurizers.errors import UsageError
from featurizers.features import Active, nonzero
from torch import Tensor

from tests.support.dictionaries import dictionary
from tests.support.models import fresh_model

X = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
IDS = torch.arange(12).reshape(2, 6)


def dense(active: Active, n: int, n_features: int) -> Tensor:
    return torch.zeros(n, n_features).index_put((active.rows, active.columns), active.values)


@pytest.mark.parametrize("rule", ["relu", "topk", "jumprelu", "identity"])
def test_the_flat_form_has_the_features_in_order_and_no_zero(rule: str) -> None:
    f = dictionary(rule, bias=-3.0)
    active = f.encode_active(X)
    torch.testing.assert_close(dense(active, 15, 64), f.encode(X).reshape(15, 64))
    assert ((active.rows * 64 + active.columns).diff() > 0).all()
    assert (active.values != 0).all()


def test_a_selected_feature_of_value_0_is_no_active_feature() -> None:
    f = featurizers.DictionaryFeaturizer.from_tensors(
        torch.eye(4, 3), torch.eye(4, 3), rule="topk", rule_options={"k": 2}
    )
    active = f.encode_active(torch.tensor([[0.0, -1.0, 2.0], [3.0, 4.0, 5.0]]))
    assert (active.rows.tolist(), active.columns.tolist(), active.values.tolist()) == (
        [0, 1, 1],
        [2, 1, 2],
        [2.0, 4.0, 5.0],
    )
    assert active.offsets(3).tolist() == [0, 1, 3, 3]


def test_a_kind_without_a_sparse_form_has_the_default() -> None:
    f = featurizers.create("subspace", d_in=8, n_features=3, seed=0)
    active = f.encode_active(X)
    torch.testing.assert_close(dense(active, 15, 3), f.encode(X).reshape(15, 3))
    values, indices = f.encode_sparse(X)
    torch.testing.assert_close(values, f.encode(X))
    assert torch.equal(indices, torch.arange(3).expand(3, 5, 3))


def test_a_composition_encodes_sparsely_in_its_last_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    f = featurizers.create("subspace", d_in=8, n_features=8, seed=0) >> dictionary("topk", k=3)
    expected = nonzero(f.encode(X).reshape(15, 64))
    monkeypatch.setattr(featurizers.DictionaryFeaturizer, "encode", lambda *_: pytest.fail("it encoded all features"))
    for found, known in zip(f.encode_active(X), expected, strict=True):
        torch.testing.assert_close(found, known)


def test_a_map_has_a_flat_form_of_each_group() -> None:
    from featurizers_transcoder import Transcoder

    w = torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(1))
    f = Transcoder.from_weights(w[0], w[1])
    active = f.encode_active("features", {"in": X})
    torch.testing.assert_close(dense(active, 15, 16), f.encode("features", {"in": X}).reshape(15, 16))


def test_sparse_features_of_a_model_are_those_that_it_collects_densely() -> None:
    model = fresh_model("llama")
    f = dictionary("topk", d_in=32, k=3)
    others = {"resid.post:0": f, "mlp.out:1": featurizers.create("identity", d_in=32)}
    expected = featurizers.collect(model, {"input_ids": IDS}, others)
    found = featurizers.collect(model, {"input_ids": IDS}, others, sparse=True)
    assert found["resid.post:0"].indices.shape == (2, 6, 3)
    for site, (values, indices) in found.items():
        whole = torch.zeros_like(expected[site]).scatter_add(-1, indices, values)
        torch.testing.assert_close(whole, expected[site])
    with pytest.raises(UsageError, match="give a mapping from sites to featurizers"):
        featurizers.collect(model, {"input_ids": IDS}, ["resid.post:0"], sparse=True)  # type: ignore[call-overload]


def test_the_flat_form_is_an_arrow_list_without_a_copy() -> None:
    pa: Any = pytest.importorskip("pyarrow")
    active = dictionary("topk", k=3).encode_active(X)
    values = active.values.detach().numpy()
    column = pa.ListArray.from_arrays(active.offsets(15).int().numpy(), pa.array(values))
    assert column.values.buffers()[1].address == values.ctypes.data
    assert column[4].as_py() == active.values[active.rows == 4].tolist()
