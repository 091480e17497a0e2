"""Commands ``featurizers evaluate`` and ``featurizers compare``."""
