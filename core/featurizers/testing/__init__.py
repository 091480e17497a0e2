"""Conformance suite for plugins: every law of `featurizers.Featurizer` as a test, in a class to subclass.

The whole test of a plugin may be::

    from featurizers.testing import FeaturizerContract

    class TestScale(FeaturizerContract):
        @pytest.fixture
        def featurizer(self):
            return featurizers.create("scale", d_in=8)

        @pytest.fixture
        def activations(self):
            return torch.randn(12, 8, generator=torch.Generator().manual_seed(0))
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
