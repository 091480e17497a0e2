"""Sources of featurizers, parsed from strings: a folder, a repository, or an entry of a plugin's catalogue."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from featurizers.errors import SourceError

REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
CATALOGUE = re.compile(r"([a-z0-9]+(?:-[a-z0-9]+)*):(.+)", re.DOTALL)
FORMS = (
    "write 'owner/name' or 'owner/name@revision' for a repository of the Hugging Face Hub, './folder' or a "
    "pathlib.Path for a folder, or 'plugin:reference' for an entry of a plugin's catalogue"
)


@dataclass(frozen=True)
class FolderSource:
    """Folder on this machine."""

    path: Path

    def __str__(self) -> str:
        """Return the path."""
        return str(self.path)


@dataclass(frozen=True)
class HubSource:
    """Repository of the Hugging Face Hub, at a branch, tag or commit; at ``main`` if None."""

    repo_id: str
    revision: str | None = None

    def __str__(self) -> str:
        """Return ``owner/name@revision``."""
        return self.repo_id if self.revision is None else f"{self.repo_id}@{self.revision}"


@dataclass(frozen=True)
class CatalogueSource:
    """Entry of a plugin's catalogue."""

    plugin: str
    reference: str

    def __str__(self) -> str:
        """Return ``plugin:reference``."""
        return f"{self.plugin}:{self.reference}"


Source: TypeAlias = FolderSource | HubSource | CatalogueSource


def parse_source(source: str | Path, revision: str | None = None) -> Source:
    """Parse the source of a featurizer. A string that could be a folder or a repository is refused, not guessed.

    Args:
        source: a path, or a string in one of the forms that `featurizers.load` describes.
        revision: branch, tag or commit, for a repository.

    Raises:
        SourceError: the source has none of the forms, fits two of them, or names two revisions.

    Examples:
        >>> parse_source("owner/name@v1")
        HubSource(repo_id='owner/name', revision='v1')
    """
    parsed = _parse(source)
    if revision is None:
        return parsed
    if not isinstance(parsed, HubSource):
        raise SourceError(f"{str(source)!r} is not a repository, so it has no revision {revision!r}")
    if parsed.revision not in (None, revision):
        raise SourceError(f"{source!r} and revision={revision!r} name two revisions; give one")
    return HubSource(parsed.repo_id, revision)


def _parse(source: str | Path) -> Source:
    if isinstance(source, Path):
        return FolderSource(source)
    if not isinstance(source, str):
        raise SourceError(f"a source is a string or a path, not {type(source).__name__}; {FORMS}")
    if source.startswith("local:"):
        return FolderSource(Path(source.removeprefix("local:")))
    if source in (".", "..", "~") or source.startswith(("./", "../", "/", "~/")) or re.match(r"[A-Za-z]:[\\/]", source):
        return FolderSource(Path(source))
    if source.startswith("hub:"):
        return _hub(source.removeprefix("hub:"), source)
    if (match := CATALOGUE.fullmatch(source)) and not match[2].startswith("//"):
        return CatalogueSource(match[1], match[2])
    parsed = _hub(source, source)
    if _is_here(parsed.repo_id):
        raise SourceError(
            f"{source!r} may be a repository or the folder of that name here; write 'hub:{source}' or './{source}'"
        )
    return parsed


def _is_here(path: str) -> bool:
    try:
        return Path(path).exists()
    except OSError:  # the name is too long
        return False


def _hub(text: str, source: str) -> HubSource:
    repo_id, at, revision = text.partition("@")
    if not REPO_ID.fullmatch(repo_id) or (at and not revision):
        if source and not source.startswith("hub:") and _is_here(source):
            raise SourceError(f"{source!r} is no repository of the Hub; did you mean './{source}', which is here?")
        raise SourceError(f"cannot tell what the source {source!r} names; {FORMS}")
    return HubSource(repo_id, revision or None)
