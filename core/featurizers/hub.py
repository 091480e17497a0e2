"""The Hugging Face Hub: artefacts are pulled at one commit and pushed in one, by functions of huggingface_hub."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featurizers import card
from featurizers.errors import (
    ArtefactError,
    FeaturizerError,
    HubAccessError,
    HubConflictError,
    HubError,
    HubNotFoundError,
    HubOfflineError,
    ManifestError,
    UsageError,
)
from featurizers.manifest import (
    CARD_NAME,
    CONFIG_NAME,
    LIBRARY_NAME,
    WEIGHTS_NAME,
    Entry,
    Index,
    Manifest,
    dump,
    explain,
    parse,
    read,
    read_local,
)
from featurizers.sources import HubSource

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi

    from featurizers.featurizer import Featurizer

TIMEOUT = 10.0
"""Seconds that a question to the Hub may take."""


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

    def file(self, name: str, commit: str | None = None) -> Path:
        """The local path of a file, downloaded unless it is cached.

        Args:
            name: of the file.
            commit: to read it at, the source's revision if None.

        Raises:
            HubError: it cannot be had.
        """
        from huggingface_hub import hf_hub_download

        from featurizers import __version__

        with translated(str(self)):
            if commit is None:
                self._ask(name)
            return Path(
                hf_hub_download(
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
            )

    def _ask(self, name: str) -> None:
        """Fail at once where `hf_hub_download` would go on asking a dead Hub for 23 seconds, a hanging one for minutes.

        A file in the cache is not asked for twice: the client falls back on it by itself.
        """
        from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache

        from featurizers import __version__

        path = f"{self.subfolder}/{name}" if self.subfolder else name
        cached = try_to_load_from_cache(self.source.repo_id, path, self.cache_dir, self.source.revision)
        if self.local_files_only or self.force_download or isinstance(cached, str):
            return
        get_hf_file_metadata(
            hf_hub_url(self.source.repo_id, path, revision=self.source.revision),
            token=self.token,
            timeout=TIMEOUT,
            library_name=LIBRARY_NAME,
            library_version=__version__,
        )

    def names(self) -> tuple[tuple[str, ...], str]:
        """The files below the subfolder, as they are called from there, and the commit that they are listed at.

        Raises:
            HubError: they cannot be listed; without the network nothing is, whatever is cached.
        """
        from huggingface_hub import HfApi

        from featurizers import __version__

        if self.local_files_only:
            raise HubOfflineError(
                str(self),
                "the files of a repository of another library are listed by the Hub; download it and load the folder",
            )
        with translated(str(self)):
            api = HfApi(token=self.token, library_name=LIBRARY_NAME, library_version=__version__)
            info = api.model_info(self.source.repo_id, revision=self.source.revision, timeout=TIMEOUT)
        prefix = f"{self.subfolder}/" if self.subfolder else ""
        names = [s.rfilename.removeprefix(prefix) for s in info.siblings or () if s.rfilename.startswith(prefix)]
        return tuple(sorted(names)), str(info.sha)

    def config(self) -> tuple[Manifest | Index, str]:
        """The ``config.json``, and the commit that everything else is then read at."""
        path = self.file(CONFIG_NAME)
        # …/snapshots/COMMIT/[subfolder/]config.json
        depth = len(Path(self.subfolder).parts) if self.subfolder else 0
        return read(path, str(self)), path.parents[depth].name

    def weights(self, commit: str) -> Path:
        """The folder that holds ``model.safetensors``, downloaded at a commit."""
        return self.file(WEIGHTS_NAME, commit).parent


def push(
    folder: str | Path,
    repo_id: str,
    *,
    subfolder: str | None = None,
    private: bool | None = None,
    branch: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    token: str | bool | None = None,
) -> CommitInfo:
    """Upload the artefact or collection in a folder, in one commit.

    The repository and the branch are created where they are missing. With a subfolder, the index at the root is
    brought up to date in the same commit. What people wrote in the repository's README stays.

    Args:
        folder: what `Featurizer.save_pretrained` or `featurizers.save_collection` wrote.
        repo_id: ``owner/name``.
        subfolder: where in the repository to put an artefact.
        private: whether a new repository is private; the account's default if None.
        branch: to commit to, ``main`` if None.
        create_pr: whether to open a pull request instead.
        commit_message: its title.
        token: of the Hub; the stored one if None.

    Returns:
        huggingface_hub's `CommitInfo`; ``oid`` is the commit.

    Raises:
        ManifestError: the folder is not an artefact, or the repository's root is something else.
        HubConflictError: someone else pushed meanwhile; nothing was changed.
        HubError: the Hub refused.
    """
    local, record = read_local(Path(folder), None)
    if subfolder and isinstance(record, Manifest):
        _as_entry(subfolder, record, repo_id)  # refuses a name that no index can hold
    elif subfolder:
        raise ManifestError(str(local), "a collection is pushed to the root of a repository, not to a subfolder")
    if branch and create_pr:
        raise UsageError("a pull request is opened against the default branch; leave out branch or create_pr")
    with tempfile.TemporaryDirectory() as staging:
        return _commit(
            repo_id,
            lambda api, parent: _operations(api, repo_id, parent, local, record, subfolder, Path(staging)),
            title=commit_message or f"Upload {subfolder or 'featurizer'} with featurizers",
            private=private,
            branch=branch,
            create_pr=create_pr,
            token=token,
        )


def push_files(
    files: Mapping[str, Path],
    repo_id: str,
    *,
    private: bool | None = None,
    branch: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    token: str | bool | None = None,
) -> CommitInfo:
    """Upload files of a plugin's own, in one commit; the options are those of `push`.

    Args:
        files: their local paths by their names in the repository.
        repo_id: ``owner/name``.

    Raises:
        HubError: the Hub refused.
    """
    from huggingface_hub import CommitOperationAdd

    return _commit(
        repo_id,
        lambda *_: [CommitOperationAdd(name, str(path)) for name, path in files.items()],
        title=commit_message or "Upload with featurizers",
        private=private,
        branch=branch,
        create_pr=create_pr,
        token=token,
    )


def _commit(
    repo_id: str,
    operations: Callable[[HfApi, str | None], list[CommitOperationAdd]],
    *,
    title: str,
    private: bool | None,
    branch: str | None,
    create_pr: bool,
    token: str | bool | None,
) -> CommitInfo:
    """One commit on a known parent; the repository and the branch are created where they are missing."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    from featurizers import __version__

    api = HfApi(token=token, library_name=LIBRARY_NAME, library_version=__version__)
    with translated(repo_id):
        try:
            api.model_info(repo_id, timeout=TIMEOUT)  # a Hub that hangs is found out here; create_repo has no timeout
        except RepositoryNotFoundError:
            api.create_repo(repo_id, private=private, exist_ok=True)
        if branch:
            api.create_branch(repo_id, branch=branch, exist_ok=True)
        parent = api.model_info(repo_id, revision=branch, timeout=TIMEOUT).sha
        return api.create_commit(
            repo_id,
            operations(api, parent),
            commit_message=title,
            revision=branch,
            create_pr=create_pr,
            parent_commit=parent,
        )


def push_featurizer(featurizer: Featurizer[Any], repo_id: str, **options: Any) -> CommitInfo:
    """Save a featurizer to a temporary folder and `push` that."""
    from featurizers.artefact import save

    with tempfile.TemporaryDirectory() as folder:
        return push(save(featurizer, Path(folder) / "artefact"), repo_id, **options)


@contextmanager
def translated(where: str) -> Iterator[None]:
    """Turn what huggingface_hub raises into one of our errors, with the original as its cause."""
    try:
        yield
    except FeaturizerError:
        raise
    except Exception as error:
        raise _translate(error, where) from error


def _translate(error: Exception, where: str) -> FeaturizerError:
    from huggingface_hub import errors as hub

    cause = error
    while isinstance(cause.__cause__, Exception) and (
        type(cause) is ValueError  # a forced download that failed
        or (isinstance(cause, hub.LocalEntryNotFoundError) and hasattr(cause.__cause__, "response"))
    ):
        cause = cause.__cause__
    status = getattr(getattr(cause, "response", None), "status_code", None)
    if isinstance(cause, hub.GatedRepoError):
        return HubAccessError(where, "the repository is gated; ask for access on its page and log in: hf auth login")
    if isinstance(cause, hub.RepositoryNotFoundError):
        return HubNotFoundError(
            where, "no such repository, or it is private and this token may not see it; log in: hf auth login"
        )
    if isinstance(cause, hub.RevisionNotFoundError):
        return HubNotFoundError(where, "the repository has no such branch, tag or commit")
    if any(base.__name__ == "TransportError" for base in type(cause).__mro__):  # of the client's own HTTP library
        return HubOfflineError(where, f"the Hub cannot be reached: {type(cause).__name__}: {_line(cause)}")
    if isinstance(cause, hub.LocalEntryNotFoundError | hub.OfflineModeIsEnabled):
        return HubOfflineError(
            where,
            f"the Hub cannot be reached or may not be asked, and the file is not cached: {_line(cause)}",
        )
    if isinstance(cause, hub.EntryNotFoundError):
        missing = HubNotFoundError(where, f"a file is not in the repository: {_line(cause)}")
        missing.is_file = True
        return missing
    if status == 412:
        return HubConflictError(where, "someone else pushed meanwhile; nothing was changed, so try again")
    if status in (401, 403):
        return HubAccessError(where, f"the Hub refused this token ({status}): {_line(cause)}")
    if isinstance(cause, hub.HFValidationError):
        return HubError(where, f"not a valid repository or file name: {_line(cause)}")
    return HubError(where, f"the Hub could not be used: {type(cause).__name__}: {_line(cause)}")


def _line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines)[:300]


def _operations(
    api: HfApi,
    repo_id: str,
    parent: str | None,
    local: Path,
    record: Manifest | Index,
    subfolder: str | None,
    staging: Path,
) -> list[CommitOperationAdd]:
    """What one commit adds: our files, the cards, and the index of a repository with subfolders."""
    from huggingface_hub import CommitOperationAdd

    root = _remote_root(api, repo_id, parent)
    if root is not None and isinstance(root, Index) != (bool(subfolder) or isinstance(record, Index)):
        raise ManifestError(
            repo_id,
            "its root holds an artefact; push to another repository, or without subfolder"
            if isinstance(root, Manifest)
            else "its root is the index of a collection; give a subfolder",
        )
    entries = dict(root.artefacts) if isinstance(root, Index) else {}
    parts: dict[str, tuple[Manifest | Index, Path]] = {}
    if isinstance(record, Manifest):
        parts[subfolder or ""] = record, local
        entries |= _as_entry(subfolder, record, repo_id) if subfolder else {}
    else:
        parts = {name: (read(local / name / CONFIG_NAME, str(local / name)), local / name) for name in record.artefacts}
        entries |= record.artefacts
    added: dict[str, Path] = {}
    for place, (part, folder) in parts.items():
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            if not (folder / name).exists():
                raise ArtefactError(str(folder), f"{name} is missing")
            added[f"{place}/{name}".lstrip("/")] = folder / name
        added[f"{place}/{CARD_NAME}".lstrip("/")] = _card(api, repo_id, parent, folder, part, place, staging)
    if entries:
        index = Index(artefacts=dict(sorted(entries.items())))
        (staging / CONFIG_NAME).write_bytes(dump(index))
        added[CONFIG_NAME] = staging / CONFIG_NAME
        added[CARD_NAME] = _card(api, repo_id, parent, local if isinstance(record, Index) else None, index, "", staging)
    return [CommitOperationAdd(place, str(path)) for place, path in added.items()]


def _as_entry(subfolder: str, manifest: Manifest, where: str) -> dict[str, Entry]:
    """What an index says of one artefact."""
    from pydantic import ValidationError

    try:
        return Index(artefacts={subfolder: manifest.entry()}).artefacts
    except ValidationError as error:
        raise ManifestError(where, explain(error)) from error


def _remote_root(api: HfApi, repo_id: str, commit: str | None) -> Manifest | Index | None:
    """The ``config.json`` at the root of a repository, None if there is none."""
    path = _remote_file(api, repo_id, commit, CONFIG_NAME)
    return None if path is None else parse(path.read_bytes(), repo_id)


def _remote_file(api: HfApi, repo_id: str, commit: str | None, name: str) -> Path | None:
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return Path(api.hf_hub_download(repo_id, name, revision=commit))
    except LocalEntryNotFoundError:
        raise
    except EntryNotFoundError:
        return None


def _card(
    api: HfApi,
    repo_id: str,
    commit: str | None,
    local: Path | None,
    record: Manifest | Index,
    place: str,
    staging: Path,
) -> Path:
    """The card to upload: the repository's own, or else the folder's, with our part of it renewed."""
    target = staging / place / CARD_NAME
    target.parent.mkdir(parents=True, exist_ok=True)
    theirs = _remote_file(api, repo_id, commit, f"{place}/{CARD_NAME}".lstrip("/"))
    before = theirs or (local and local / CARD_NAME)
    if before is not None and before.exists():
        shutil.copyfile(before, target)
    if isinstance(record, Index):
        card.write_collection(record, target, source=repo_id)
    else:
        card.write(record, target, source=repo_id, subfolder=place)
    return target
