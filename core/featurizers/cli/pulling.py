"""Download of an artefact or a collection to a folder, for ``featurizers pull``."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from pathlib import Path

from featurizers import files, hub
from featurizers.errors import ManifestError, SourceError
from featurizers.format import labels as labels_format
from featurizers.format.companion import Companion, read_companion
from featurizers.format.manifest import (
    CARD_NAME,
    CONFIG_NAME,
    INTERVENABLE_NAME,
    INTERVENABLE_WEIGHTS_NAME,
    LABELS_NAME,
    MAX_CARD_BYTES,
    MAX_CONFIG_BYTES,
    WEIGHTS_NAME,
    Index,
    Manifest,
    read,
)
from featurizers.format.weights import verify_weights


def pull(source: str, out: Path | None, subfolder: str | None, revision: str | None) -> tuple[Path, str, int]:
    """Download an artefact or a whole collection at one commit; return its folder, the commit and the number.

    Args:
        source: a repository of the Hub.
        out: new folder to copy the files to; None to leave them in the cache.
        subfolder: of an artefact in a collection.
        revision: branch, tag or commit.

    Raises:
        SourceError: the source is not on the Hub.
        ArtefactError: the artefact, or the folder, is unfit.
    """
    parsed = hub.parse_source(source, revision)
    if not isinstance(parsed, hub.HubSource):
        raise SourceError(f"{source!r} is not a repository of the Hub: there is nothing to pull")
    remote = hub.Remote(parsed, subfolder)
    record, commit = remote.config()
    names = list(record.artefacts) if isinstance(record, Index) else [""]
    root = remote.file(CONFIG_NAME, commit).parent
    with nullcontext() if out is None else files.filling(out) as new_folder:
        for name in names:
            part = hub.Remote(parsed, "/".join(filter(None, (subfolder, name))) or None)
            config, weights = part.file(CONFIG_NAME, commit, MAX_CONFIG_BYTES), part.file(WEIGHTS_NAME, commit)
            manifest = read(config, str(part))
            if isinstance(manifest, Index):
                raise ManifestError(str(part), "it is a collection inside a collection, which no weights belong to")
            verify_weights(weights, manifest.sha256, str(part))
            card = part.optional(CARD_NAME, commit, MAX_CARD_BYTES)
            labels = _pulled_labels(part, commit, manifest)
            _copy(new_folder and new_folder / name, config, weights, card, labels)
        if isinstance(record, Index):
            card = remote.optional(CARD_NAME, commit, MAX_CARD_BYTES)
            companion = remote.optional(INTERVENABLE_NAME, commit, MAX_CONFIG_BYTES)
            tensors = remote.file(INTERVENABLE_WEIGHTS_NAME, commit) if companion else None
            if tensors:
                verify_weights(tensors, read_companion(root, str(remote), Companion)[0].sha256, str(remote))
            _copy(new_folder, root / CONFIG_NAME, card, companion, tensors)
    return out or root, commit, len(names)


def _pulled_labels(part: hub.Remote, commit: str, manifest: Manifest) -> Path | None:
    """Download the labels of an artefact and check them; return None if it has none."""
    if (record := labels_format.record_in(manifest, str(part))) is None:
        return None
    path = part.file(LABELS_NAME, commit, labels_format.MAX_BYTES)
    labels_format.read(path.parent, record, str(part))
    return path


def _copy(folder: Path | None, *paths: Path | None) -> None:
    """Copy the files that exist into a folder, if there is one."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        for path in filter(None, paths):
            shutil.copyfile(path, folder / path.name)
