"""Names of the core that a plugin of this project defines, looked up when they are used."""

from __future__ import annotations

from collections.abc import Callable
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


def attributes_of(plugin: str, module: str, within: str = "featurizers") -> Callable[[str], Any]:
    """Return the ``__getattr__`` of a module of the core that stands for a plugin.

    Args:
        plugin: name of the plugin, a key of `FIRST_PARTY`.
        module: name of the module, for the error of an attribute that Python itself looks for.
        within: what the error for a plugin that is not installed puts before the name.
    """

    def look_up(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        return forwarded(plugin, name, f"{within}.{name}")

    return look_up
