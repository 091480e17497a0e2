"""Commands that the plugin adds to ``featurizers``: ``train``, ``evaluate``, ``sweep`` and ``demo``."""
