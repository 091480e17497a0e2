"""Names of the distribution `featurizers-pyvene`, as attributes of the core.

Saved pyvene models and existing programs import `featurizers.pyvene`. Each name is looked up in the installed plugin
when it is used, so that the core imports neither the plugin nor pyvene.
"""

from __future__ import annotations

from typing import Any

from featurizers.registry.forwarding import forwarded


def __getattr__(name: str) -> Any:
    """Return an attribute of `featurizers_pyvene`.

    Raises:
        MissingDependencyError: `featurizers-pyvene` or pyvene is not installed.
        AttributeError: the plugin has no such name.
    """
    if name.startswith("__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return forwarded("pyvene", name, f"featurizers.pyvene.{name}")
