"""Names of the distribution `featurizers-harvest`, as attributes of the core.

`featurizers.harvest` is looked up in the installed plugin when it is used, so that the core does not import it.
"""

from __future__ import annotations

from featurizers.registry.forwarding import attributes_of

__getattr__ = attributes_of("harvest", __name__)
