"""``featurizers demo``: finds a causal variable in a language model, layer by layer, and saves it as a featurizer."""
