"""Suggestions for a source that names nothing: an entry of a plugin's catalogue, written without the plugin's name."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from featurizers.errors import FeaturizerError, HubNotFoundError, HubOfflineError, SourceError, printable
from featurizers.registry.plugin_host import host


@contextmanager
def suggesting(source: str | Path) -> Iterator[None]:
    """Add to an error about a source that names nothing the entry of a catalogue that it may mean.

    Raises:
        SourceError, HubNotFoundError, HubOfflineError: as the block, with the suggestion if there is one.
    """
    try:
        yield
    except (SourceError, HubNotFoundError, HubOfflineError) as error:
        if isinstance(error, HubNotFoundError) and error.what != "repository":
            raise
        entry = _entry(source) if isinstance(source, str) else None
        if entry is None:
            raise
        more = copy.copy(error)
        more.args = (f"{str(error).rstrip('.')}. Did you mean {printable(entry, 300)!r}?",)
        raise more.with_traceback(error.__traceback__) from error.__cause__


def _entry(source: str) -> str | None:
    """Return a source that a plugin suggests; None if no plugin does."""
    try:
        entry = host().ask("featurizers_suggest", reference=source)
    except FeaturizerError:  # a faulty plugin must not hide the error
        return None
    return entry if isinstance(entry, str) else None
