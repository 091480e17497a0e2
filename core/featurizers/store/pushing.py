"""`push`: upload an artefact or a collection to the Hugging Face Hub, in one commit on the commit that was read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featurizers.errors import ArtefactError, ManifestError, UsageError, WeightsError, explain, shown
from featurizers.files.regular import contained, opened, read_bytes
from featurizers.files.replacement import os_errors, temporary_folder
from featurizers.format import card, labels, measured
from featurizers.format.companion import Companion, read_companion
from featurizers.format.manifest import (
    CARD_NAME,
    CONFIG_NAME,
    INTERVENABLE_NAME,
    INTERVENABLE_WEIGHTS_NAME,
    LABELS_NAME,
    LIBRARY_NAME,
    MAX_CARD_BYTES,
    MAX_CONFIG_BYTES,
    WEIGHTS_NAME,
    Entry,
    Index,
    Manifest,
    Subfolder,
    dump,
    named_folder,
    read,
)
from featurizers.hub.repository import Remote
from featurizers.hub.sources import HubSource
from featurizers.hub.transport import DEADLINE, TIMEOUT, transfer_time, within
from featurizers.store.records import local_record
from featurizers.version import __version__

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, CommitOperationAdd

    from featurizers.features.feature_space import FeatureSpace


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
    metrics: object | None = None,
) -> CommitInfo:
    """Upload the artefact, collection or intervenable in a folder, in one commit.

    The repository and the branch are created if they are missing. With a subfolder, the same commit updates the index
    at the root. The text that people wrote in the repository's README is kept.

    Args:
        folder: written by `Featurizer.save_pretrained`, `featurizers.save_collection` or
            `featurizers.save_intervenable`.
        repo_id: ``owner/name``.
        subfolder: folder of the repository for an artefact; its root if None.
        private: whether a new repository is private; the account's default if None.
        branch: branch to commit to, ``main`` if None.
        create_pr: whether to open a pull request instead.
        commit_message: title of the commit.
        token: token for the Hub; the stored one if None.
        metrics: of an artefact, as in `featurizers.save`; the folder stays as it is.

    Returns:
        huggingface_hub's `CommitInfo`; ``oid`` is the commit.

    Raises:
        ManifestError: the folder is not an artefact, or does not go with what the root of the repository holds.
        UsageError: metrics are given for a collection, or are of another kind.
        HubConflictError: someone else pushed meanwhile; nothing was changed.
        HubError: the Hub refused.
    """
    local = named_folder(Path(folder))
    record = local_record(local, local)
    if subfolder and isinstance(record, Manifest):
        _index_entry(subfolder, record, repo_id)  # refuses a name that no index can hold
    elif subfolder:
        raise ManifestError(str(local), "a collection is pushed to the root of a repository, not to a subfolder")
    if metrics is not None:
        if not isinstance(record, Manifest):
            raise UsageError("metrics are of one artefact; push the artefacts of a collection one by one")
        record = measured.added(record, metrics)
    _refuse_both(branch, create_pr)
    with temporary_folder() as staging:
        return _commit(
            repo_id,
            lambda parent: _operations(repo_id, token, parent, local, record, subfolder, staging),
            title=commit_message or f"Upload {subfolder or 'featurizer'} with featurizers",
            private=private,
            branch=branch,
            create_pr=create_pr,
            token=token,
        )


def push_files(
    folder: Path,
    names: Sequence[str],
    repo_id: str,
    write_card: Callable[[Path], object],
    *,
    title: str,
    subfolder: str | None = None,
    private: bool | None = None,
    branch: str | None = None,
    create_pr: bool = False,
    token: str | bool | None = None,
) -> CommitInfo:
    """Upload files that are no artefact, and their card, in one commit; what people wrote in the card is kept.

    The repository and the branch are created if they are missing.

    Args:
        folder: holds the files.
        names: of the files.
        repo_id: ``owner/name``.
        write_card: writes or updates the card at the path that it is given.
        title: of the commit.
        subfolder: folder of the repository; its root if None.
        private: as in `push`.
        branch: as in `push`.
        create_pr: as in `push`.
        token: as in `push`.

    Raises:
        ManifestError: the subfolder has no valid name, or the place in the repository holds an artefact.
        HubConflictError: someone else pushed meanwhile; nothing was changed.
        HubError: the Hub refused.
    """
    from huggingface_hub import CommitOperationAdd
    from pydantic import TypeAdapter, ValidationError

    _refuse_both(branch, create_pr)
    try:
        TypeAdapter(Subfolder | None).validate_python(subfolder)
    except ValidationError as error:
        raise ManifestError(repo_id, f"the subfolder {shown(subfolder)}: {explain(error)}") from error
    prefix = f"{subfolder}/" if subfolder else ""

    def operations(parent: str | None) -> list[CommitOperationAdd]:
        existing = _existing(repo_id, token, parent)
        if existing(subfolder or "", CONFIG_NAME, MAX_CONFIG_BYTES) is not None:
            raise ManifestError(repo_id, f"{prefix}{CONFIG_NAME} is there; push to another repository or subfolder")
        path = _started_card(existing(subfolder or "", CARD_NAME, MAX_CARD_BYTES), staging / CARD_NAME)
        write_card(path)
        added = [CommitOperationAdd(f"{prefix}{name}", str(folder / name)) for name in names]
        return [*added, CommitOperationAdd(f"{prefix}{CARD_NAME}", str(path))]

    options: dict[str, Any] = {"private": private, "branch": branch, "create_pr": create_pr, "token": token}
    with temporary_folder() as staging:
        return _commit(repo_id, operations, title=title, **options)


def _refuse_both(branch: str | None, create_pr: bool) -> None:
    if branch and create_pr:
        raise UsageError("a pull request is opened against the default branch; leave out branch or create_pr")


def _existing(repo_id: str, token: str | bool | None, parent: str | None) -> Callable[[str, str, int], Path | None]:
    """Return a function that downloads a file of the parent commit, and returns None if it has no such file."""

    def existing(part: str, name: str, most: int) -> Path | None:
        if parent is None:
            return None
        return Remote(HubSource(repo_id, None), part or None, token).optional(name, parent, most)

    return existing


def _started_card(old: Path | None, target: Path) -> Path:
    """Copy an existing card to the place of the new one, and return that place."""
    with os_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        if old is not None and old.exists():
            target.write_bytes(read_bytes(old, str(old.parent), ArtefactError, MAX_CARD_BYTES))
    return target


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
    """Commit on a known parent; create the repository and the branch if they are missing."""
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


def push_featurizer(
    featurizer: FeatureSpace[Any],
    repo_id: str,
    *,
    model: object | None = None,
    metrics: object | None = None,
    **options: Any,
) -> CommitInfo:
    """Save a featurizer to a temporary folder, with a passport and metrics as `save` does, and `push` that."""
    from featurizers.store.artefact import save  # which imports torch

    with temporary_folder() as folder:
        return push(save(featurizer, folder / "artefact", model=model, metrics=metrics), repo_id, **options)


def _operations(
    repo_id: str,
    token: str | bool | None,
    parent: str | None,
    local: Path,
    record: Manifest | Index,
    subfolder: str | None,
    staging: Path,
) -> list[CommitOperationAdd]:
    """List the files of the commit: artefacts with their cards, and the index of a repository with subfolders."""
    from huggingface_hub import CommitOperationAdd

    existing = _existing(repo_id, token, parent)
    root_config = existing("", CONFIG_NAME, MAX_CONFIG_BYTES)
    root = None if root_config is None else read(root_config, repo_id)
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
        entries |= _index_entry(subfolder, record, repo_id) if subfolder else {}
    else:
        parts = {name: (local / name, local_record(local, local / name)) for name in record.artefacts}
        entries |= record.artefacts
    added: list[CommitOperationAdd] = []
    digests = dict[str, str]()
    for part, (folder, manifest) in parts.items():
        if isinstance(manifest, Index):
            raise ManifestError(str(folder), "it is a collection inside a collection; push it by itself")
        digests[part] = manifest.sha256
        prefix = f"{part}/" if part else ""
        added += [
            CommitOperationAdd(f"{prefix}{CONFIG_NAME}", dump(manifest)),
            _weights(f"{prefix}{WEIGHTS_NAME}", folder / WEIGHTS_NAME, manifest.sha256),
            CommitOperationAdd(f"{prefix}{CARD_NAME}", str(_card(repo_id, existing, folder, manifest, part, staging))),
        ]
        if (labelled := labels.record_in(manifest, str(folder))) is not None:
            added.append(_weights(f"{prefix}{LABELS_NAME}", folder / LABELS_NAME, labelled.sha256))
        if (results := measured.eval_results(manifest)) is not None:
            name = part.replace("/", "-") or "featurizer"
            added.append(CommitOperationAdd(f".eval_results/{name}.yaml", results))
    intervenable = isinstance(record, Index) and (local / INTERVENABLE_NAME).exists()
    if intervenable:
        added += _intervenable(local, digests)
    if entries:
        index = Index(artefacts=dict(sorted(entries.items())))
        own_card = local if isinstance(record, Index) else None
        card_path = _card(repo_id, existing, own_card, index, "", staging, intervenable)
        added += [CommitOperationAdd(CONFIG_NAME, dump(index)), CommitOperationAdd(CARD_NAME, str(card_path))]
    return added


def _weights(path_in_repo: str, path: Path, sha256: str) -> CommitOperationAdd:
    """Prepare the upload of weights, and compare them with their config: another program may be saving to the folder.

    Raises:
        WeightsError: the file is missing, or has another sha256.
    """
    from huggingface_hub import CommitOperationAdd

    with opened(path, str(path.parent), WeightsError):
        added = CommitOperationAdd(path_in_repo, str(path))
    if (actual := added.upload_info.sha256.hex()) != sha256:
        raise WeightsError(
            str(path.parent),
            f"{path.name} has sha256 {actual}, its config says {sha256}: it is damaged, or another program "
            "is saving to the folder; nothing was pushed",
        )
    return added


def _intervenable(folder: Path, digests: Mapping[str, str]) -> list[CommitOperationAdd]:
    """Prepare the upload of the two files of an intervenable, and compare them with its featurizers.

    Args:
        folder: holds the files.
        digests: sha256 of each featurizer in the commit, by subfolder.

    Raises:
        WeightsError: a featurizer or the tensors have another sha256.
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
                f"{entry.subfolder} is missing, or is not the featurizer that was saved with {INTERVENABLE_NAME}; "
                "nothing was pushed",
            )
    return [
        CommitOperationAdd(INTERVENABLE_NAME, raw),
        _weights(INTERVENABLE_WEIGHTS_NAME, folder / INTERVENABLE_WEIGHTS_NAME, record.sha256),
    ]


def _index_entry(subfolder: str, manifest: Manifest, where: str) -> dict[str, Entry]:
    """Return the entry of an artefact in an index.

    Raises:
        ManifestError: no index can hold this subfolder.
    """
    from pydantic import ValidationError

    try:
        return Index(artefacts={subfolder: manifest.entry()}).artefacts
    except ValidationError as error:
        raise ManifestError(where, explain(error)) from error


def _card(
    repo_id: str,
    existing: Callable[[str, str, int], Path | None],
    local: Path | None,
    record: Manifest | Index,
    part: str,
    staging: Path,
    intervenable: bool = False,
) -> Path:
    """Update the card of the repository, or else of the folder, and return the file to upload."""
    old_card = existing(part, CARD_NAME, MAX_CARD_BYTES) or (local and local / CARD_NAME)
    target = _started_card(old_card, staging / part / CARD_NAME)
    with os_errors(target):
        if isinstance(record, Index):
            card.write_collection(record, target, source=repo_id, intervenable=intervenable)
        else:
            card.write(record, target, source=repo_id, subfolder=part)
    return target
