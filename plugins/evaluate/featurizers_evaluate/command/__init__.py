"""Commands ``featurizers evaluate``, ``featurizers compare`` and ``featurizers labels``."""
