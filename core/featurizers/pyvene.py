"""Names of the distribution `featurizers-pyvene`, as attributes of the core.

Saved pyvene models and existing programs import `featurizers.pyvene`. Each name is looked up in the installed plugin
when it is used, so that the core imports neither the plugin nor pyvene.
"""

from __future__ import annotations

from featurizers.registry.forwarding import attributes_of

__getattr__ = attributes_of("pyvene", __name__, "featurizers.pyvene")
