"""The conformance suite: every law of `featurizers.Featurizer`, for a plugin's author to subclass.

A plugin's whole test may be::

    from featurizers.testing import FeaturizerContract

    class TestScale(FeaturizerContract):
        @pytest.fixture
        def featurizer(self):
            return featurizers.create("scale", d_in=8)

        @pytest.fixture
        def activations(self):
            return torch.randn(12, 8, generator=torch.Generator().manual_seed(0))
"""

from featurizers.testing.contract import FeaturizerContract

__all__ = ["FeaturizerContract"]
