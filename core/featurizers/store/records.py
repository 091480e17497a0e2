"""`config.json` of a folder or a repository, read without its weights and without its plugin."""

from __future__ import annotations

from pathlib import Path

from featurizers.errors import ArtefactError, ManifestError, PluginError, UsageError, shown
from featurizers.files.regular import contained
from featurizers.files.replacement import recover
from featurizers.format import reference
from featurizers.format.manifest import (
    CARD_NAME,
    CONFIG_NAME,
    LABELS_NAME,
    WEIGHTS_NAME,
    Entry,
    Index,
    Manifest,
    named_folder,
    read,
)
from featurizers.hub.repository import Remote
from featurizers.hub.sources import FolderSource, HubSource, parse_source
from featurizers.registry.plugin_host import host


def list_artefacts(
    source: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> dict[str, Entry]:
    """List the artefacts of a folder or a repository; only the ``config.json`` at its root is read.

    Arguments and errors are those of `load`.

    Returns:
        Each artefact by its subfolder, ``""`` for an artefact at the root.
    """
    record = manifest_of(source, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only)
    if isinstance(record, Index):
        return dict(record.artefacts)
    return {"": record.entry()}


def manifest_of(
    source: str | Path,
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Manifest | Index:
    """Read the ``config.json`` of a source; arguments and errors are those of `load`."""
    parsed = parse_source(source, revision)
    if isinstance(parsed, FolderSource):
        root = named_folder(parsed.path)
        return local_record(root, root / (subfolder or ""))
    if isinstance(parsed, HubSource):
        return Remote(parsed, subfolder, token, cache_dir, local_files_only=local_files_only).config()[0]
    host().load(parsed.plugin)
    raise PluginError(
        f"{str(parsed)!r} is an entry of a catalogue, which has no config.json of featurizers; use load on it"
    )


def local_record(root: Path, folder: Path) -> Manifest | Index:
    """Read the ``config.json`` of an artefact or a collection on this machine.

    Args:
        root: folder that none of the files may be linked out of.
        folder: ``root``, or the subfolder of it that holds the files.

    Raises:
        ManifestError: there is no ``config.json``, or it is malformed.
        NotOursError: another library wrote it.
        ArtefactError: a file is a link out of ``root``.
    """
    where = str(folder)
    try:
        if not (folder / CONFIG_NAME).exists():
            recover(root.resolve())
        exists = (folder / CONFIG_NAME).exists()
    except (OSError, RuntimeError, ValueError):  # a name that no folder can have
        exists = False
    if not exists:
        raise ManifestError(
            where,
            f"there is no {CONFIG_NAME}; give the folder that save_pretrained wrote, or convert another one",
        )
    contained(root, folder / CONFIG_NAME, where, ArtefactError)
    record = read(folder / CONFIG_NAME, where)
    for name in (WEIGHTS_NAME, CARD_NAME, LABELS_NAME):
        contained(root, folder / name, where, ArtefactError)
    return record


def single_artefact(record: Manifest | Index, where: str, kind: str | None = None) -> Manifest:
    """Return the manifest of one artefact.

    Args:
        record: from its ``config.json``.
        where: name of the artefact in errors.
        kind: the only kind allowed, None for any; a reference is checked when it is followed.

    Raises:
        ManifestError: it is the index of a collection.
        UsageError: it is of another kind.
    """
    if isinstance(record, Index):
        names = list(record.artefacts)
        listed = ", ".join(map(shown, names[:10])) + (", …" if len(names) > 10 else "")
        raise ManifestError(where, f"it holds {len(names)} artefacts; name one with subfolder=, of {listed}")
    if record.kind != reference.KIND:
        check_kind(record.kind, where, kind)
    return record


def check_kind(kind: str, where: str, allowed: str | None) -> None:
    """Raise `UsageError` if only one kind is allowed and this is another."""
    if allowed not in (None, kind):
        raise UsageError(f"{where} holds a featurizer of kind {kind!r}, not {allowed!r}")
