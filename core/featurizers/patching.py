"""Names of the distribution `featurizers-patching`, as attributes of the core.

`featurizers.patch` and `featurizers.load_grid` are looked up in the installed plugin when they are used, so that the
core does not import it.
"""

from __future__ import annotations

from featurizers.registry.forwarding import attributes_of

__getattr__ = attributes_of("patching", __name__)
