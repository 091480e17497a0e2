"""The laws that every featurizer keeps: https://featurizers.github.io/featurizers/plugins-reference/#laws."""

import featurizers
import pytest
import torch
from featurizers.testing import FeaturizerContract
from featurizers_flow import FlowFeaturizer


class TestFlow(FeaturizerContract):
    @pytest.fixture
    def featurizer(self) -> FlowFeaturizer:
        """A new one for each test, with parameters that are not all 0 or 1."""
        f = featurizers.create("flow", d_in=7, layers=3, hidden=5)
        assert isinstance(f, FlowFeaturizer)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in f.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 3)
        return f

    @pytest.fixture
    def activations(self) -> torch.Tensor:
        """At least 12 different vectors."""
        return torch.randn(12, 7, generator=torch.Generator().manual_seed(0))
