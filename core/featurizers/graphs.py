"""Names of the distribution `featurizers-graphs`, as attributes of the core.

`featurizers.graph` and `featurizers.load_graph` are looked up in the installed plugin when they are used, so that the
core does not import it.
"""

from __future__ import annotations

from typing import Any

from featurizers.registry.forwarding import forwarded


def __getattr__(name: str) -> Any:
    """Return an attribute of `featurizers_graphs`.

    Raises:
        MissingDependencyError: `featurizers-graphs` is not installed.
        AttributeError: the plugin has no such name.
    """
    if name.startswith("__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return forwarded("graphs", name, f"featurizers.{name}")
