"""Pushing: an artefact or a collection goes to the Hugging Face Hub in one commit, on the state that was looked at."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featurizers.errors import ArtefactError, ManifestError, UsageError, WeightsError, explain
from featurizers.files.regular import contained, opened, read_bytes
from featurizers.format import card
from featurizers.format.companion import Companion, read_companion
from featurizers.format.manifest import (
    CARD_NAME,
    CONFIG_NAME,
    INTERVENABLE_NAME,
    INTERVENABLE_WEIGHTS_NAME,
    LIBRARY_NAME,
    MAX_CARD_BYTES,
    MAX_CONFIG_BYTES,
    WEIGHTS_NAME,
    Entry,
    Index,
    Manifest,
    dump,
    read,
    read_local,
)
from featurizers.hub.repository import Remote
from featurizers.hub.sources import HubSource
from featurizers.hub.transport import DEADLINE, TIMEOUT, transfer_time, within
from featurizers.version import __version__

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, CommitOperationAdd

    from featurizers.features.featurizer import Featurizer


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
    """Upload the artefact, collection or intervenable in a folder, in one commit.

    The repository and the branch are created where they are missing. With a subfolder, the index at the root is
    brought up to date in the same commit. What people wrote in the repository's README stays.

    Args:
        folder: what `Featurizer.save_pretrained`, `featurizers.save_collection` or `featurizers.save_intervenable`
            wrote.
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
            lambda parent: _operations(repo_id, token, parent, local, record, subfolder, Path(staging)),
            title=commit_message or f"Upload {subfolder or 'featurizer'} with featurizers",
            private=private,
            branch=branch,
            create_pr=create_pr,
            token=token,
        )


def _commit(
    repo_id: str,
    operations: Callable[[str | None], list[CommitOperationAdd]],
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

    api = HfApi(token=token, library_name=LIBRARY_NAME, library_version=__version__)

    def prepare() -> str | None:
        try:
            api.model_info(repo_id, timeout=TIMEOUT)
        except RepositoryNotFoundError:
            api.create_repo(repo_id, private=private, exist_ok=True)
        if branch:
            api.create_branch(repo_id, branch=branch, exist_ok=True)
        return api.model_info(repo_id, revision=branch, timeout=TIMEOUT).sha

    parent = within(DEADLINE, repo_id, prepare)
    added = operations(parent)
    return within(
        transfer_time(sum(operation.upload_info.size for operation in added)),
        repo_id,
        lambda: api.create_commit(
            repo_id,
            added,
            commit_message=title,
            revision=branch,
            create_pr=create_pr,
            parent_commit=parent,
        ),
        late="the commit may arrive all the same: look at the repository before you push again",
    )


def push_featurizer(featurizer: Featurizer[Any], repo_id: str, **options: Any) -> CommitInfo:
    """Save a featurizer to a temporary folder and `push` that."""
    from featurizers.store.artefact import save

    with tempfile.TemporaryDirectory() as folder:
        return push(save(featurizer, Path(folder) / "artefact"), repo_id, **options)


def _operations(
    repo_id: str,
    token: str | bool | None,
    parent: str | None,
    local: Path,
    record: Manifest | Index,
    subfolder: str | None,
    staging: Path,
) -> list[CommitOperationAdd]:
    """What one commit adds: our files, the cards, and the index of a repository with subfolders."""
    from huggingface_hub import CommitOperationAdd

    def theirs(place: str, name: str, most: int) -> Path | None:
        """A file of the repository as it stands, None if there is none."""
        if parent is None:
            return None
        return Remote(HubSource(repo_id, None), place or None, token).optional(name, parent, most)

    found = theirs("", CONFIG_NAME, MAX_CONFIG_BYTES)
    root = None if found is None else read(found, repo_id)
    if root is not None and isinstance(root, Index) != (bool(subfolder) or isinstance(record, Index)):
        raise ManifestError(
            repo_id,
            "its root holds an artefact; push to another repository, or without subfolder"
            if isinstance(root, Manifest)
            else "its root is the index of a collection; give a subfolder",
        )
    entries = dict(root.artefacts) if isinstance(root, Index) else {}
    parts: dict[str, tuple[Path, Manifest | Index]] = {}
    if isinstance(record, Manifest):
        parts[subfolder or ""] = local, record
        entries |= _as_entry(subfolder, record, repo_id) if subfolder else {}
    else:
        parts = {name: read_local(local, name) for name in record.artefacts}
        entries |= record.artefacts
    added: list[CommitOperationAdd] = []
    digests = dict[str, str]()
    for place, (folder, part) in parts.items():
        if isinstance(part, Index):
            raise ManifestError(str(folder), "it is a collection inside a collection; push it by itself")
        digests[place] = part.sha256
        added += [
            CommitOperationAdd(_in(place, CONFIG_NAME), dump(part)),
            _weights(_in(place, WEIGHTS_NAME), folder / WEIGHTS_NAME, part.sha256),
            CommitOperationAdd(_in(place, CARD_NAME), str(_card(repo_id, theirs, folder, part, place, staging))),
        ]
    intervenable = isinstance(record, Index) and (local / INTERVENABLE_NAME).exists()
    if intervenable:
        added += _intervenable(local, digests)
    if entries:
        index = Index(artefacts=dict(sorted(entries.items())))
        prose = local if isinstance(record, Index) else None
        card_path = _card(repo_id, theirs, prose, index, "", staging, intervenable)
        added += [CommitOperationAdd(CONFIG_NAME, dump(index)), CommitOperationAdd(CARD_NAME, str(card_path))]
    return added


def _in(place: str, name: str) -> str:
    return f"{place}/{name}" if place else name


def _weights(place: str, path: Path, sha256: str) -> CommitOperationAdd:
    """The upload of the weights that a config is of: another program may be saving to the folder.

    Raises:
        WeightsError: they are other ones, or none.
    """
    from huggingface_hub import CommitOperationAdd

    with opened(path, str(path.parent), WeightsError):
        added = CommitOperationAdd(place, str(path))
    if (found := added.upload_info.sha256.hex()) != sha256:
        raise WeightsError(
            str(path.parent),
            f"{path.name} has sha256 {found}, its config says {sha256}: it is damaged, or another program "
            "is saving to the folder; nothing was pushed",
        )
    return added


def _intervenable(folder: Path, digests: Mapping[str, str]) -> list[CommitOperationAdd]:
    """The upload of an intervenable's own two files.

    Args:
        folder: what holds them.
        digests: sha256 of each featurizer that goes along.

    Raises:
        WeightsError: its featurizers or its tensors are other ones.
    """
    from huggingface_hub import CommitOperationAdd

    where = str(folder)
    for name in (INTERVENABLE_NAME, INTERVENABLE_WEIGHTS_NAME):
        contained(folder, folder / name, where, ArtefactError)
    record, raw = read_companion(folder, where, Companion)
    for entry in record.featurizers:
        if digests.get(entry.subfolder) != entry.sha256:
            raise WeightsError(
                where,
                f"{entry.subfolder} is none of its featurizers, or another than was saved with {INTERVENABLE_NAME}; "
                "nothing was pushed",
            )
    return [
        CommitOperationAdd(INTERVENABLE_NAME, raw),
        _weights(INTERVENABLE_WEIGHTS_NAME, folder / INTERVENABLE_WEIGHTS_NAME, record.sha256),
    ]


def _as_entry(subfolder: str, manifest: Manifest, where: str) -> dict[str, Entry]:
    """What an index says of one artefact."""
    from pydantic import ValidationError

    try:
        return Index(artefacts={subfolder: manifest.entry()}).artefacts
    except ValidationError as error:
        raise ManifestError(where, explain(error)) from error


def _card(
    repo_id: str,
    theirs: Callable[[str, str, int], Path | None],
    local: Path | None,
    record: Manifest | Index,
    place: str,
    staging: Path,
    intervenable: bool = False,
) -> Path:
    """The card to upload: the repository's own, or else the folder's, with our part of it renewed."""
    target = staging / place / CARD_NAME
    target.parent.mkdir(parents=True, exist_ok=True)
    before = theirs(place, CARD_NAME, MAX_CARD_BYTES) or (local and local / CARD_NAME)
    if before is not None and before.exists():
        target.write_bytes(read_bytes(before, str(before.parent), ArtefactError, MAX_CARD_BYTES))
    if isinstance(record, Index):
        card.write_collection(record, target, source=repo_id, intervenable=intervenable)
    else:
        card.write(record, target, source=repo_id, subfolder=place)
    return target
