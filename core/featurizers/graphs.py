"""Names of the distribution `featurizers-graphs`, as attributes of the core.

`featurizers.graph` and `featurizers.load_graph` are looked up in the installed plugin when they are used, so that the
core does not import it.
"""

from __future__ import annotations

from featurizers.registry.forwarding import attributes_of

__getattr__ = attributes_of("graphs", __name__)
