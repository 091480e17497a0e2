"""Scalars derived from a decoder's activations and gradients, in the basis of any featurizer."""
