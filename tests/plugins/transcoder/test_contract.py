"""Every kind of the plugin keeps the laws of maps between sites."""

import pytest
import torch
from featurizers.testing import SiteMapContract
from featurizers_transcoder import Crosscoder, CrossLayerTranscoder, LinearMap, Transcoder

from tests.support.site_maps import linear_map


class TestTranscoder(SiteMapContract):
    @pytest.fixture
    def site_map(self):
        return Transcoder.from_weights(torch.randn(9, 4), torch.randn(9, 3), torch.randn(9), torch.randn(3))


class TestSkipTranscoder(SiteMapContract):
    @pytest.fixture(params=["none", "rms", "standard", "layer-norm", "constant-norm"])
    def site_map(self, request):
        return Transcoder.from_weights(
            torch.randn(9, 4),
            torch.randn(9, 3),
            torch.randn(9),
            torch.randn(3),
            torch.randn(4, 3),
            rule="jumprelu",
            threshold=torch.rand(9),
            normalize=request.param,
            centre=torch.randn(4),
        )


class TestTopK(SiteMapContract):
    @pytest.fixture
    def site_map(self):
        return Transcoder.from_weights(
            torch.randn(9, 4), torch.randn(9, 4), rule="topk", rule_options={"k": 3}, special_tokens=[1]
        )


class TestCrossLayerTranscoder(SiteMapContract):
    @pytest.fixture
    def site_map(self):
        return linear_map(CrossLayerTranscoder, {i: ([f"in-{i}"], [f"out-{j}" for j in range(i, 3)]) for i in range(3)})


class TestCausalCrosscoder(SiteMapContract):
    @pytest.fixture
    def site_map(self):
        return linear_map(Crosscoder, {i: ([f"site-{i}"], [f"site-{j}" for j in range(i, 3)]) for i in range(3)})


class TestAcausalCrosscoder(SiteMapContract):
    @pytest.fixture
    def site_map(self):
        names = [f"site-{i}" for i in range(3)]
        return linear_map(Crosscoder, {0: (names, names)})


def test_the_base_is_no_kind():
    assert not hasattr(LinearMap, "kind")
