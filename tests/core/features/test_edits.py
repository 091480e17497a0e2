"""Edits of no features, and edits that overflow: beside plain arithmetic."""

from __future__ import annotations

from typing import Any

import featurizers
import pytest
import torch
from torch import Tensor


@pytest.mark.parametrize("none", [[], torch.zeros(4, dtype=torch.bool), torch.zeros(0, dtype=torch.long)])
@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4)])
def test_to_edit_no_feature_gives_a_copy(shape, none):
    f = featurizers.create("identity", d_in=4)
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    before = x.clone()
    for result in (f.steer(x, 2.0, none), f.ablate(x, none, 5.0), f.interchange(x, -x, none)):
        assert torch.equal(result, before)
        result.add_(1.0)
        assert torch.equal(x, before)


def test_infinities_of_a_featurizer_that_is_not_float16_are_those_of_arithmetic():
    f = featurizers.create("identity", d_in=4)
    x, source = torch.arange(8.0).reshape(2, 4) + 1, torch.full((2, 4), 1e5)
    source[1, 2] = float("inf")
    expected = x.clone()
    expected[:, 0] += float("inf")
    assert torch.equal(f.steer(x, float("inf"), [0]), expected)
    expected = x.clone()
    expected[:, 2] = source[:, 2]
    assert torch.equal(f.interchange(x, source, [2]), expected)
    assert torch.equal(f.interchange(1e5 * x, x, [2])[:, :2], 1e5 * x[:, :2])


def test_a_float16_featurizer_is_mapped_by_vmap_as_one_batch():
    f = featurizers.create("subspace", d_in=8, n_features=3).half()
    x, source = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    found = torch.func.vmap(f.interchange)(x, source)
    torch.testing.assert_close(found, f.interchange(x, source), rtol=1e-3, atol=1e-3)
    q = f.orthonormal_basis().detach().float()
    torch.testing.assert_close(found, x + (source - x) @ q @ q.T, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("base_dtype", "source_dtype"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float64)]
)
def test_some_features_of_a_source_in_another_dtype_are_those_that_torch_would_assign(base_dtype, source_dtype):
    f = featurizers.create("identity", d_in=16)
    base, source = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    base, source = base.to(base_dtype), source.to(source_dtype)
    expected = base.clone()
    expected[:, [2, 7]] = source[:, [2, 7]].to(base_dtype)
    found = f.interchange(base, source, [2, 7])
    assert found.dtype == base_dtype
    assert torch.equal(found, expected)


class Assigned(featurizers.Featurizer[Any]):
    """Coordinates that torch assigns, which it does only in the dtype of what they are assigned to."""

    kind = "assigned"

    def __init__(self, width: int) -> None:
        super().__init__(featurizers.create("identity", d_in=width).config)
        self.d_in = self.n_features = width

    def featurize(self, x: Tensor) -> tuple[Tensor, None]:
        return x.clone(), None

    def inverse_featurize(self, features: Tensor, error: Any) -> Tensor:
        return features.clone()

    def apply_edit(self, base: Tensor, features: Tensor, edited: Tensor, columns: Tensor | None = None) -> Tensor:
        return edited if columns is None else base.index_copy(-1, columns, edited)


def test_a_kind_is_given_edited_features_in_the_dtype_of_its_features():
    base, source = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
    base = base.bfloat16()
    expected = base.clone()
    expected[:, [2, 7]] = source[:, [2, 7]].bfloat16()
    assert torch.equal(Assigned(16).interchange(base, source, [2, 7]), expected)
