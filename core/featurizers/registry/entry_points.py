"""Entry points of the installed distributions, read from `importlib.metadata` without importing any.

pluggy's own discovery is not used, because it silently drops the second of two distributions with the same entry-point
name.
"""

from __future__ import annotations

import contextlib
import re
from typing import TYPE_CHECKING, Any

from featurizers.errors import PluginError, one_line, shown
from featurizers.version import __version__

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint


def discovered(group: str) -> list[EntryPoint]:
    """Return the entry points of a group; of one that `sys.path` has twice, the first, which is imported.

    Args:
        group: such as ``featurizers``.
    """
    entries = reversed(_all(group))
    return list(reversed({(entry.name, entry.value, distribution_of(entry)): entry for entry in entries}.values()))


def _all(group: str) -> list[EntryPoint]:
    from importlib.metadata import distributions, entry_points

    try:
        return list(entry_points(group=group))
    except Exception:  # an unreadable file of any installed package makes entry_points fail
        entries: list[EntryPoint] = []
        for distribution in distributions():
            with contextlib.suppress(Exception):
                entries += distribution.entry_points.select(group=group)
        return entries


def claimant(entry: EntryPoint) -> tuple[str, str]:
    """Return the printable name and version of an entry point's distribution; ``?`` if its metadata lack them."""
    name = version = "?"
    with contextlib.suppress(Exception):  # no metadata, or in another encoding
        metadata: Any = entry.dist and entry.dist.metadata  # each access parses them again
        name, version = (str((metadata.get_all(field) or ["?"])[0]) for field in ("Name", "Version"))
    return plain(name), plain(version)


def distribution_of(entry: EntryPoint) -> str:
    """Return the printable name and version of an entry point's distribution, or its value without metadata."""
    name, version = claimant(entry)
    return shown(entry.value) if name == "?" else f"{name} {version}"


def plain(text: str) -> str:
    """Return a name, a version or a specifier unchanged, and anything else from metadata as its `repr`."""
    return text if re.fullmatch(r"\?|[A-Za-z0-9.,<>=!~+*_-]{1,80}", text) else shown(text)


def unmet(entry: EntryPoint) -> str | None:
    """Return why a distribution's metadata exclude this version of the core; None if they do not."""
    try:
        for text in (entry.dist.requires if entry.dist else None) or []:
            # pip checks the requirements of other projects, and parsing them takes time
            if not re.match(r"\s*(featurizers(?![\w.-])|[^a-z0-9\s]|$)", text, re.IGNORECASE):
                continue
            from packaging.requirements import Requirement

            requirement = Requirement(text)
            applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
            if applies and not requirement.specifier.contains(__version__, prereleases=True):
                return f"it needs featurizers {plain(str(requirement.specifier))}, this is {__version__}"
    except Exception as error:
        return f"its requirements cannot be read: {reason_of(error)}"
    return None


def reason_of(error: BaseException) -> str:
    """Return the exception of a plugin in one line; the message of a `PluginError` alone, without its type."""
    message = "?"
    with contextlib.suppress(Exception):  # __str__ may be the plugin's code
        message = str(error)
    if isinstance(error, PluginError):
        return one_line(message, 200)
    return f"{type(error).__name__}: {shown(message, 200)}"
