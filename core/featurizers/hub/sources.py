"""What a caller may write for the source of a featurizer: a folder, a repository, or a plugin's catalogue entry."""

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
    """A folder on this machine."""

    path: Path

    def __str__(self) -> str:
        """The path."""
        return str(self.path)


@dataclass(frozen=True)
class HubSource:
    """A repository of the Hugging Face Hub, at a branch, tag or commit if one is named."""

    repo_id: str
    revision: str | None = None

    def __str__(self) -> str:
        """``owner/name@revision``."""
        return self.repo_id if self.revision is None else f"{self.repo_id}@{self.revision}"


@dataclass(frozen=True)
class CatalogueSource:
    """An entry of a plugin's own catalogue."""

    plugin: str
    reference: str

    def __str__(self) -> str:
        """``plugin:reference``."""
        return f"{self.plugin}:{self.reference}"


Source: TypeAlias = FolderSource | HubSource | CatalogueSource


def parse_source(source: str | Path, revision: str | None = None) -> Source:
    """What a source names; nothing is guessed between a folder and a repository.

    Args:
        source: a path, or a string in one of the forms above.
        revision: branch, tag or commit, for a repository.

    Raises:
        SourceError: it is in none of the forms, in two at once, or names two revisions.

    Example:
        >>> parse_source("owner/name@v1")
        HubSource(repo_id='owner/name', revision='v1')
    """
    parsed = _parse(source)
    if revision is None:
        return parsed
    if not isinstance(parsed, HubSource):
        raise SourceError(f"{str(source)!r} is not a repository, so that it has no revision {revision!r}")
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
    except OSError:  # longer than a name can be
        return False


def _hub(text: str, source: str) -> HubSource:
    repo_id, at, revision = text.partition("@")
    if not REPO_ID.fullmatch(repo_id) or (at and not revision):
        raise SourceError(f"cannot tell what the source {source!r} names; {FORMS}")
    return HubSource(repo_id, revision or None)
