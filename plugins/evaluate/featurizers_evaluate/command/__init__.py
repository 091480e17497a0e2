"""Commands ``featurizers evaluate``, ``compare``, ``labels`` and ``report``."""
