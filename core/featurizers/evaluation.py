"""Names of the distribution `featurizers-evaluate`, as attributes of the core.

`featurizers.evaluate`, `featurizers.load_evaluation` and `featurizers.report` are looked up in the installed plugin
when they are used, so that the core does not import it.
"""

from __future__ import annotations

from featurizers.registry.forwarding import attributes_of

__getattr__ = attributes_of("evaluate", __name__)
