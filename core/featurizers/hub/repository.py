"""Repository of the Hugging Face Hub, read at one commit with the functions of huggingface_hub."""

from __future__ import annotations

import hashlib
import os
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from featurizers.errors import (
    ArtefactError,
    CachedCopyWarning,
    HubError,
    HubNotFoundError,
    HubOfflineError,
    ManifestError,
    WeightsError,
    shown,
)
from featurizers.files.regular import contained, opened
from featurizers.format.manifest import (
    CONFIG_NAME,
    LIBRARY_NAME,
    MAX_CONFIG_BYTES,
    WEIGHTS_NAME,
    Index,
    Manifest,
    read,
)
from featurizers.hub.sources import HubSource
from featurizers.hub.transport import DEADLINE, TIMEOUT, transfer_time, translated, within
from featurizers.version import __version__

if TYPE_CHECKING:
    from huggingface_hub import HfFileMetadata

MAX_FILES: Final = 50_000
"""Most files that a repository of another library may have."""
MAX_NAME: Final = 1024
"""Characters that the path of a file may have."""
COMMIT: Final = re.compile(r"[0-9a-f]{40,64}")
ETAG: Final = re.compile(r"[0-9A-Za-z_-]{1,128}")
"""Etags that we accept; huggingface_hub uses the etag as a file name in its cache."""


@dataclass(frozen=True)
class Remote:
    """Repository, or a folder of it, with the options that its files are downloaded with.

    Attributes:
        source: repository and revision.
        subfolder: folder of the repository; its root if None.
        token: token for the Hub; the stored one if None.
        cache_dir: folder of the Hub's cache; the default one if None.
        force_download: whether to download files again that are cached.
        local_files_only: whether to use the cache alone.
    """

    source: HubSource
    subfolder: str | None = None
    token: str | bool | None = None
    cache_dir: str | Path | None = None
    force_download: bool = False
    local_files_only: bool = False

    def __str__(self) -> str:
        """Return ``owner/name@revision/subfolder``."""
        return f"{self.source}/{self.subfolder}" if self.subfolder else str(self.source)

    def file(self, name: str, commit: str | None = None, most: int | None = None) -> Path:
        """Return the local path of a file; download it unless it is cached.

        One HEAD request comes before a download. If the Hub does not answer, it fails at once, where the client would
        retry for 23 seconds; and it gives the size of the file before the download. If the Hub cannot be asked, the
        copy in the cache is used with a `CachedCopyWarning`.

        Args:
            name: path of the file from the subfolder.
            commit: commit to read it at; the revision of the source if None.
            most: most bytes that it may have.

        Raises:
            HubError: the Hub refused or did not answer, or has no such file.
            ManifestError: the file is larger.
        """
        size: int | None = None
        if not self._offline():
            revision = commit or self.source.revision
            cached = None if self.force_download else self._cached(name, revision)
            if cached is not None and cached.commit == revision:
                return self._inside(cached.path)  # the files of a commit never change
            try:
                metadata = self._ask(name, revision)
            except HubError as error:
                if cached is None or (isinstance(error, HubNotFoundError) and error.what != "repository"):
                    raise
                warnings.warn(f"{error}. The copy of {cached.commit} in the cache is used", CachedCopyWarning, 2)
                return self._inside(cached.path)
            if cached is not None and cached.commit == metadata.commit_hash:
                return self._inside(cached.path)
            size = metadata.size
            if most is not None and size is not None and size > most:
                raise ManifestError(str(self), f"{name} has {size} bytes, more than the {most} that it may have")
        return self._inside(Path(within(transfer_time(size), str(self), lambda: self._download(name, commit))))

    def _offline(self) -> bool:
        from huggingface_hub.constants import is_offline_mode

        return self.local_files_only or is_offline_mode()

    def _path(self, name: str) -> str:
        return f"{self.subfolder}/{name}" if self.subfolder else name

    def _snapshot(self, path: Path, name: str) -> Path:
        """Return the folder of the commit from the path of a cached file: …/snapshots/COMMIT/[subfolder/]NAME."""
        return path.parents[len(Path(self._path(name)).parts) - 1]

    def _inside(self, path: Path) -> Path:
        """Return the path of a cached file; raise if its blob is outside the cache, since the Hub chose its name."""
        return contained(path.parent, path, str(self), ArtefactError)

    def _cached(self, name: str, revision: str | None) -> _Cached | None:
        from huggingface_hub import try_to_load_from_cache

        with translated(str(self)):
            path = try_to_load_from_cache(self.source.repo_id, self._path(name), self.cache_dir, revision)
        return _Cached(Path(path), self._snapshot(Path(path), name).name) if isinstance(path, str) else None

    def _ask(self, name: str, revision: str | None) -> HfFileMetadata:
        """Ask the Hub for the commit, etag and size of a file, without the retries of the client."""
        from huggingface_hub import get_hf_file_metadata, hf_hub_url

        def ask() -> HfFileMetadata:
            return get_hf_file_metadata(
                hf_hub_url(self.source.repo_id, self._path(name), revision=revision),
                token=self.token,
                timeout=TIMEOUT,
                library_name=LIBRARY_NAME,
                library_version=__version__,
            )

        metadata = within(2 * TIMEOUT, str(self), ask)
        if not (COMMIT.fullmatch(metadata.commit_hash or "") and ETAG.fullmatch(metadata.etag or "")):
            raise HubError(str(self), "the answer is not from a Hub; check whether a proxy wants you to log in")
        if metadata.size is not None and not 0 <= metadata.size < 2**50:
            raise HubError(str(self), f"the Hub gives {name} the size of {metadata.size} bytes, which is impossible")
        return metadata

    def _download(self, name: str, commit: str | None) -> str:
        from huggingface_hub import hf_hub_download

        return hf_hub_download(
            self.source.repo_id,
            name,
            subfolder=self.subfolder,
            revision=commit or self.source.revision,
            token=self.token,
            cache_dir=self.cache_dir,
            force_download=self.force_download,
            local_files_only=self.local_files_only,
            library_name=LIBRARY_NAME,
            library_version=__version__,
            etag_timeout=TIMEOUT,
        )

    def names(self) -> tuple[tuple[str, ...], str]:
        """List the files below the subfolder.

        Returns:
            Their paths from the subfolder, and the commit that has them.

        Raises:
            HubError: they cannot be listed; the cache cannot list them either.
        """
        from huggingface_hub import HfApi

        if self._offline():
            raise HubOfflineError(
                str(self),
                "the files of a repository of another library are listed by the Hub; download it and load the folder",
            )
        api = HfApi(token=self.token, library_name=LIBRARY_NAME, library_version=__version__)
        info = within(
            DEADLINE,
            str(self),
            lambda: api.model_info(self.source.repo_id, revision=self.source.revision, timeout=TIMEOUT),
        )
        prefix = f"{self.subfolder}/" if self.subfolder else ""
        if not COMMIT.fullmatch(str(info.sha)) or not all(isinstance(s.rfilename, str) for s in info.siblings or ()):
            raise HubError(str(self), "the answer is not from a Hub: its list of files is malformed")
        names = [s.rfilename.removeprefix(prefix) for s in info.siblings or () if s.rfilename.startswith(prefix)]
        if len(names) > MAX_FILES:
            raise HubError(str(self), f"it has more than {MAX_FILES} files; name the folder of one with subfolder=")
        if outside := next((name for name in names if not _is_inside(name)), None):
            raise HubError(str(self), f"its list of files has {shown(outside, 200)}, which is outside the repository")
        return tuple(sorted(names)), str(info.sha)

    def config(self) -> tuple[Manifest | Index, str]:
        """Read the ``config.json``; return it with its commit, to read every other file at."""
        path = self.file(CONFIG_NAME, most=MAX_CONFIG_BYTES)
        return read(path, str(self)), self._snapshot(path, CONFIG_NAME).name

    def weights(self, commit: str, most: int | None = None) -> Path:
        """Download ``model.safetensors`` at a commit and return its folder; arguments and errors as in `file`."""
        return self.file(WEIGHTS_NAME, commit, most).parent

    def optional(self, name: str, commit: str, most: int) -> Path | None:
        """Return the local path of a file as `file` does, or None if the repository has no such file."""
        try:
            return self.file(name, commit, most)
        except HubNotFoundError as error:
            if error.what == "file":
                return None
            raise

    def verify(self, path: Path, name: str) -> None:
        """Compare a downloaded file with the Hub's checksum: sha256 for a large file, Git's sha1 for a small one.

        Args:
            path: local path of the file.
            name: name of the file in errors.

        Raises:
            WeightsError: they differ, or the cache does not keep the checksum.
        """
        expected = Path(os.readlink(path)).name if path.is_symlink() else ""  # the client names blobs by their checksum
        with opened(path, str(self), WeightsError, name) as file:
            size = os.fstat(file.fileno()).st_size
            if re.fullmatch("[0-9a-f]{64}", expected):
                actual = hashlib.file_digest(file, "sha256").hexdigest()
            elif re.fullmatch("[0-9a-f]{40}", expected):
                digest = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
                while piece := file.read(2**20):
                    digest.update(piece)
                actual = digest.hexdigest()
            else:
                raise WeightsError(str(self), f"the cache keeps no checksum of {name}; leave out verify")
        if actual != expected:
            raise WeightsError(
                str(self), f"{name} has checksum {actual}, the Hub says {expected}; load it with force_download=True"
            )


@dataclass(frozen=True)
class _Cached:
    path: Path
    commit: str


def _is_inside(name: str) -> bool:
    """Return whether a path stays below its folder, on any operating system, and is no longer than paths are."""
    if len(name) > MAX_NAME:
        return False
    return not any(part in ("", ".", "..") or re.search(r"[\\:\0]", part) for part in name.split("/"))
