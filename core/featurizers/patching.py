"""Names of the distribution `featurizers-patching`, as attributes of the core.

`featurizers.patch` and `featurizers.load_grid` are looked up in the installed plugin when they are used, so that the
core does not import it.
"""

from __future__ import annotations

from typing import Any

from featurizers.registry.forwarding import forwarded


def __getattr__(name: str) -> Any:
    """Return an attribute of `featurizers_patching`.

    Raises:
        MissingDependencyError: `featurizers-patching` is not installed.
        AttributeError: the plugin has no such name.
    """
    if name.startswith("__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return forwarded("patching", name, f"featurizers.{name}")
