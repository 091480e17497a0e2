"""The identity featurizer."""

import featurizers
import pytest
import torch
from featurizers.testing import FeaturizerContract


class TestIdentity(FeaturizerContract):
    @pytest.fixture(params=[6, None], ids=["d_in known", "d_in unknown"])
    def featurizer(self, request):
        return featurizers.create("identity", d_in=request.param)

    @pytest.fixture
    def activations(self):
        return torch.randn(12, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("indices", [None, [1], [0, 2, 3, 4, 5], [[1], [], [0, 5]]])
def test_an_interchange_swaps_coordinates_bit_for_bit(dtype, indices):
    generator = torch.Generator().manual_seed(1)
    base, source = (torch.randn(3, 6, generator=generator).to(dtype) * 10.0**e for e in (4, -4))
    f = featurizers.create("identity", d_in=6)
    expected = base.clone()
    rows = indices if indices and isinstance(indices[0], list) else [range(6) if indices is None else indices] * 3
    for i, row in enumerate(rows):
        expected[i, list(row)] = source[i, list(row)]
    assert torch.equal(f.interchange(base, source, indices), expected)


def test_both_directions_are_exact():
    x = torch.randn(5, 6)
    f = featurizers.create("identity")
    features, error = f.featurize(x)
    assert error is None
    assert torch.equal(features, x)
    assert torch.equal(f.inverse_featurize(features, error), x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_source_may_have_another_dtype_than_the_base(dtype):
    f = featurizers.create("identity", d_in=6)
    base, source = torch.zeros(3, 6, dtype=dtype), torch.arange(6.0).expand(3, 6)
    expected = torch.arange(6.0).to(dtype).expand(3, 6)
    assert torch.equal(f.mask(base, source, torch.ones(6)), expected)
    for indices in (None, [0], [1, 2, 3], [[0], [], [5]]):
        result = f.interchange(base, source, indices)
        assert result.dtype == dtype
        assert torch.equal(result, f.interchange(base, expected, indices))
