"""Readouts: functions from the activations of a layer to a distribution over the vocabulary.

This room imports `featurizers` and no other room of this package.
"""

from featurizers_causal_basis.lens.external import ExternalLens
from featurizers_causal_basis.lens.logit_lens import LogitLens
from featurizers_causal_basis.lens.readouts import AffineNorm, Decoder, Readout, agree
from featurizers_causal_basis.lens.tuned_lens import TunedLens

__all__ = ["AffineNorm", "Decoder", "ExternalLens", "LogitLens", "Readout", "TunedLens", "agree"]
