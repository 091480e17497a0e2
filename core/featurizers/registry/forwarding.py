"""Names of the core that a plugin of this project defines, looked up when they are used."""

from __future__ import annotations

from typing import Any

from featurizers.errors import MissingDependencyError, UnknownKindError
from featurizers.names import FIRST_PARTY
from featurizers.registry.plugin_host import host


def forwarded(plugin: str, name: str, purpose: str) -> Any:
    """Return an attribute of a plugin's module, so that the core imports no plugin.

    Args:
        plugin: name of the plugin, a key of `FIRST_PARTY`.
        name: of the attribute.
        purpose: what the error says is needed for.

    Raises:
        MissingDependencyError: the plugin, or a package that it needs, is not installed.
        AttributeError: the plugin has no such name.
    """
    try:
        module = host().module(plugin)
    except UnknownKindError as error:
        command = f"pip install 'featurizers[{plugin}]'"
        raise MissingDependencyError(purpose, FIRST_PARTY[plugin], command) from error
    return getattr(module, name)
