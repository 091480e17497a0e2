"""Names of the distribution `featurizers-evaluate`, as attributes of the core.

`featurizers.evaluate` and `featurizers.load_evaluation` are looked up in the installed plugin when they are used, so
that the core does not import it.
"""

from __future__ import annotations

from typing import Any

from featurizers.registry.forwarding import forwarded


def __getattr__(name: str) -> Any:
    """Return an attribute of `featurizers_evaluate`.

    Raises:
        MissingDependencyError: `featurizers-evaluate` is not installed.
        AttributeError: the plugin has no such name.
    """
    if name.startswith("__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return forwarded("evaluate", name, f"featurizers.{name}")
