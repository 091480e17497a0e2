"""The Hugging Face Hub: what a repository holds is read at one commit, by functions of huggingface_hub."""

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
"""How many files of a repository of another library are looked at."""
COMMIT: Final = re.compile(r"[0-9a-f]{40,64}")
ETAG: Final = re.compile(r"[0-9A-Za-z_-]{1,128}")
"""What a Hub may call a file's contents; the client makes a file of that name."""


@dataclass(frozen=True)
class Remote:
    """A repository as one call sees it, and how to read it.

    Attributes:
        source: repository and revision.
        subfolder: where in it.
        options: what huggingface_hub's downloads take beside.
    """

    source: HubSource
    subfolder: str | None = None
    token: str | bool | None = None
    cache_dir: str | Path | None = None
    force_download: bool = False
    local_files_only: bool = False

    def __str__(self) -> str:
        """``owner/name@revision/subfolder``."""
        return f"{self.source}/{self.subfolder}" if self.subfolder else str(self.source)

    def file(self, name: str, commit: str | None = None, most: int | None = None) -> Path:
        """The local path of a file, downloaded unless it is cached.

        The Hub is asked for the file first: it then fails at once where the client would go on asking a dead Hub for
        23 seconds, and tells the size of a file before it is fetched. A copy in the cache that the Hub no longer
        vouches for is used with a `CachedCopyWarning`.

        Args:
            name: of the file.
            commit: to read it at, the source's revision if None.
            most: how many bytes it may have.

        Raises:
            HubError: it cannot be had.
            ManifestError: it is larger.
        """
        size: int | None = None
        if not self._offline():
            wanted = commit or self.source.revision
            cached = None if self.force_download else self._cached(name, wanted)
            if cached is not None and cached.commit == wanted:
                return self._inside(cached.path)  # what a commit holds does not change
            try:
                asked = self._ask(name, wanted)
            except HubError as error:
                if cached is None or (isinstance(error, HubNotFoundError) and error.what != "repository"):
                    raise
                warnings.warn(f"{error}. The copy of {cached.commit} in the cache is used", CachedCopyWarning, 2)
                return self._inside(cached.path)
            if cached is not None and cached.commit == asked.commit_hash:
                return self._inside(cached.path)
            size = asked.size
            if most is not None and size is not None and size > most:
                raise ManifestError(str(self), f"{name} has {size} bytes, more than the {most} that it may have")
        return self._inside(Path(within(transfer_time(size), str(self), lambda: self._download(name, commit))))

    def _offline(self) -> bool:
        from huggingface_hub.constants import is_offline_mode

        return self.local_files_only or is_offline_mode()

    def _path(self, name: str) -> str:
        return f"{self.subfolder}/{name}" if self.subfolder else name

    def _snapshot(self, path: Path, name: str) -> Path:
        """The folder of the commit that a cached file is of: …/snapshots/COMMIT/[subfolder/]NAME."""
        return path.parents[len(Path(self._path(name)).parts) - 1]

    def _inside(self, path: Path) -> Path:
        """The path of a cached file, unless its blob is elsewhere: the client names it as the Hub says."""
        return contained(path.parent, path, str(self), ArtefactError)

    def _cached(self, name: str, revision: str | None) -> _Cached | None:
        from huggingface_hub import try_to_load_from_cache

        with translated(str(self)):
            found = try_to_load_from_cache(self.source.repo_id, self._path(name), self.cache_dir, revision)
        return _Cached(Path(found), self._snapshot(Path(found), name).name) if isinstance(found, str) else None

    def _ask(self, name: str, revision: str | None) -> HfFileMetadata:
        """What the Hub says of a file, without any of the client's repetitions."""
        from huggingface_hub import get_hf_file_metadata, hf_hub_url

        def ask() -> HfFileMetadata:
            return get_hf_file_metadata(
                hf_hub_url(self.source.repo_id, self._path(name), revision=revision),
                token=self.token,
                timeout=TIMEOUT,
                library_name=LIBRARY_NAME,
                library_version=__version__,
            )

        asked = within(2 * TIMEOUT, str(self), ask)
        if not (COMMIT.fullmatch(asked.commit_hash or "") and ETAG.fullmatch(asked.etag or "")):
            raise HubError(str(self), "what answered is not a Hub; look whether a proxy wants you to log in")
        if asked.size is not None and not 0 <= asked.size < 2**50:
            raise HubError(str(self), f"{name} has {asked.size} bytes by the Hub's word, which cannot be")
        return asked

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
        """The files below the subfolder, as they are called from there, and the commit that they are listed at.

        Raises:
            HubError: they cannot be listed; without the network nothing is, whatever is cached.
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
            raise HubError(str(self), "what answered is not a Hub: its list of files is none")
        names = [s.rfilename.removeprefix(prefix) for s in info.siblings or () if s.rfilename.startswith(prefix)]
        if len(names) > MAX_FILES:
            raise HubError(str(self), f"it has more than {MAX_FILES} files; name the folder of one with subfolder=")
        if outside := next((name for name in names if not _is_inside(name)), None):
            raise HubError(str(self), f"its list of files has {shown(outside, 200)}, which would lie elsewhere")
        return tuple(sorted(names)), str(info.sha)

    def config(self) -> tuple[Manifest | Index, str]:
        """The ``config.json``, and the commit that everything else is then read at."""
        path = self.file(CONFIG_NAME, most=MAX_CONFIG_BYTES)
        return read(path, str(self)), self._snapshot(path, CONFIG_NAME).name

    def weights(self, commit: str, most: int | None = None) -> Path:
        """The folder that holds ``model.safetensors``, downloaded at a commit, of so many bytes at most."""
        return self.file(WEIGHTS_NAME, commit, most).parent

    def optional(self, name: str, commit: str, most: int) -> Path | None:
        """As `file`; None if the repository has no such file."""
        try:
            return self.file(name, commit, most)
        except HubNotFoundError as error:
            if error.what == "file":
                return None
            raise

    def verify(self, path: Path, name: str) -> None:
        """Compare a downloaded file with the checksum that the Hub gave for it: a sha256, or Git's sha1 of a small one.

        Raises:
            WeightsError: they differ, or the cache does not keep the checksum.
        """
        expected = Path(os.readlink(path)).name if path.is_symlink() else ""  # the client names blobs by it
        with opened(path, str(self), WeightsError, name) as file:
            size = os.fstat(file.fileno()).st_size
            if re.fullmatch("[0-9a-f]{64}", expected):
                found = hashlib.file_digest(file, "sha256").hexdigest()
            elif re.fullmatch("[0-9a-f]{40}", expected):
                digest = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
                while piece := file.read(2**20):
                    digest.update(piece)
                found = digest.hexdigest()
            else:
                raise WeightsError(str(self), f"the cache keeps no checksum of {name}; leave out verify")
        if found != expected:
            raise WeightsError(
                str(self), f"{name} has checksum {found}, the Hub says {expected}; load it with force_download=True"
            )


@dataclass(frozen=True)
class _Cached:
    path: Path
    commit: str


def _is_inside(name: str) -> bool:
    """Whether the name of a file leads to one below its folder, on any system."""
    return not any(part in ("", ".", "..") or re.search(r"[\\:\0]", part) for part in name.split("/"))
