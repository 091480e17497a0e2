"""`load`: the source is located, its files are read, and the featurizer is placed on a device."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from pydantic import ValidationError

from featurizers.errors import HubNotFoundError, ManifestError, NotOursError, PluginError, UsageError, one_line, shown
from featurizers.features.feature_space import FeatureSpace
from featurizers.features.indices import Indices, select
from featurizers.features.placement import check_placement
from featurizers.files.regular import contained
from featurizers.format import labels
from featurizers.format.external_files import ExternalFiles
from featurizers.format.manifest import CONFIG_NAME, LABELS_NAME, WEIGHTS_NAME, Manifest, named_folder
from featurizers.format.reference import KIND as REFERENCE
from featurizers.format.reference import Reference, reference_in
from featurizers.hub.repository import Remote
from featurizers.hub.sources import CatalogueSource, FolderSource, HubSource, Source, parse_source
from featurizers.registry.forwarding import forwarded
from featurizers.registry.plugin_host import host
from featurizers.store import artefact, descriptions, external
from featurizers.store.records import check_kind, local_record, single_artefact
from featurizers.store.retrying import read_unchanged
from featurizers.store.suggestions import suggesting


def load(
    source: str | Path,
    *,
    kind: str | None = None,
    subfolder: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    indices: Indices | Mapping[str, Indices] = None,
    verify: bool = False,
    allow_nonfinite: bool = False,
    mesh: Any = None,
) -> Any:
    """Load a featurizer from a folder, a repository or the catalogue of a plugin.

    No code in an artefact is run: its kind is looked up among the installed plugins, that kind validates its config,
    and its weights are safetensors, whose shapes are compared with the config before they are read. Files of another
    library are read by the plugin that knows their format, as data too.

    Args:
        source: ``"owner/name"``, ``"owner/name@revision"`` or ``"hub:owner/name"`` on the Hugging Face Hub;
            ``"./folder"``, ``"local:folder"`` or a `Path`; ``"plugin:reference"`` in the catalogue of a plugin.
        kind: the only kind allowed, None for any.
        subfolder: which artefact of a collection.
        revision: branch, tag or commit; ``revision`` of the result is the commit that was read.
        token: token for the Hub; the stored one if None.
        cache_dir: folder of the Hub's cache; the default one if None.
        force_download: download files again that are cached.
        local_files_only: use the cache alone.
        device: where to put the tensors.
        dtype: floating-point dtype to convert them to; as stored if None.
        indices: read these features alone, of a kind whose features are rows of its tensors, such as a dictionary;
            they keep their numbers. Of a map with several groups, such features by group, None for all of a group.
        verify: compare the sha256 of the weights with the one in the config; for files of another library, compare
            them with the Hub's checksums.
        allow_nonfinite: load weights that hold NaN or infinity too, to look at them.
        mesh: `torch.distributed.device_mesh.DeviceMesh` whose processes share a dictionary, a transcoder or a
            crosscoder: each reads and holds its own rows. A mesh with several axes is divided along the one named
            ``features``. It needs ``featurizers-sharded``.

    Returns:
        A `Featurizer`, or a `SiteMap` where the features are read and written at different sites; the source decides,
        so that the type is not declared. ``from_pretrained`` of a class declares it.

    Raises:
        FeatureIndexError: an index is out of range.
        SourceError: the source has none of these forms, or fits two of them.
        ManifestError, WeightsError, ArtefactError: the files are damaged, do not fit together or have no known format.
        UsageError: an argument is invalid.
        HubError: the Hub refused or did not answer.
        PluginError: no installed plugin reads the kind, or the plugin fails.

    Examples:
        >>> import tempfile, featurizers
        >>> folder = tempfile.mkdtemp()
        >>> _ = featurizers.create("subspace", d_in=8, n_features=2).save_pretrained(folder)
        >>> featurizers.load("local:" + folder).n_features
        2
    """
    check_placement(device, dtype)
    with suggesting(source):
        parsed = parse_source(source, revision)
    if isinstance(parsed, FolderSource):
        parsed = FolderSource(named_folder(parsed.path))
    request = Request(
        source=parsed,
        kind=kind,
        subfolder=subfolder,
        token=token,
        cache_dir=cache_dir,
        force_download=force_download,
        local_files_only=local_files_only,
        device=device,
        dtype=dtype,
        indices=indices,
        verify=verify,
        allow_nonfinite=allow_nonfinite,
    )
    if mesh is None:
        return _loaded(request, source)
    if indices is not None:
        raise UsageError("give mesh= or indices=: with a mesh all features are loaded, and take() gives some of them")
    load_share = forwarded("sharded", "load_share", "load with mesh=")
    return load_share(lambda **share: _loaded(replace(request, **share), source), mesh, device)


def _loaded(request: Request, source: str | Path) -> FeatureSpace[Any]:
    """Locate, read and place the featurizer of a request, whose source the caller wrote as ``source``."""
    if isinstance(request.source, FolderSource):
        featurizer = read_unchanged(
            request.source.path / (request.subfolder or ""),
            (CONFIG_NAME, WEIGHTS_NAME, LABELS_NAME),
            lambda: read(locate(request), request),
            str(request.source),
        )
    else:
        with suggesting(source):
            located = locate(request)
        featurizer = read(located, request)
    return place(featurizer, request)


@dataclass(frozen=True)
class Request:
    """Options of one call of `load`, which describes them.

    Attributes:
        source: parsed, with its revision; ``~`` in the path of a folder is expanded.
        divide: as in `artefact.read_folder`.
    """

    source: Source
    kind: str | None
    subfolder: str | None
    token: str | bool | None
    cache_dir: str | Path | None
    force_download: bool
    local_files_only: bool
    device: torch.device | str | None
    dtype: torch.dtype | None
    indices: Indices | Mapping[str, Indices]
    verify: bool
    allow_nonfinite: bool
    divide: artefact.Divide | None = None

    @property
    def where(self) -> str:
        """Name of the source in errors."""
        if isinstance(self.source, FolderSource):
            return str(self.source.path / (self.subfolder or ""))
        return str(self.remote(self.source, self.subfolder) if isinstance(self.source, HubSource) else self.source)

    def remote(self, repository: HubSource, subfolder: str | None) -> Remote:
        """Return a repository, to be read with the options for the Hub."""
        return Remote(repository, subfolder, self.token, self.cache_dir, self.force_download, self.local_files_only)


@dataclass(frozen=True)
class LocalArtefact:
    """Artefact in a folder on this machine, with its ``config.json``."""

    folder: Path
    manifest: Manifest


@dataclass(frozen=True)
class RemoteArtefact:
    """Artefact in a repository of the Hub at one commit, with its ``config.json``."""

    remote: Remote
    commit: str
    manifest: Manifest


Located: TypeAlias = LocalArtefact | RemoteArtefact | ExternalFiles | CatalogueSource


def locate(request: Request) -> Located:
    """Find out what the source holds: an artefact, or files of another library. Its ``config.json`` is read once.

    An entry of a catalogue is returned as it is, because its plugin knows where its files are.

    Raises:
        ManifestError: the folder holds neither, or a collection, or its ``config.json`` is malformed.
        UsageError: the artefact is of another kind, or an option does not go with files of another library.
        HubError: the Hub refused or did not answer.
    """
    if isinstance(request.source, CatalogueSource):
        return request.source
    if isinstance(request.source, FolderSource):
        root = request.source.path
        folder = root / (request.subfolder or "")
        try:
            manifest = single_artefact(local_record(root, folder), str(folder), request.kind)
        except NotOursError:
            pass
        except ManifestError:
            if not _holds_other_files(folder):
                raise
        else:
            return LocalArtefact(folder, manifest)
        contained(root, folder, str(folder), ManifestError)
        if request.verify:
            raise UsageError(f"{folder} was written by another library, and holds no checksum; leave out verify")
        return external.of_folder(folder, _columns(request.indices), request.allow_nonfinite)
    remote = request.remote(request.source, request.subfolder)
    try:
        record, commit = remote.config()
    except (HubNotFoundError, NotOursError) as error:
        if isinstance(error, HubNotFoundError) and error.what != "file":
            raise
        files = external.of_repository(remote, _columns(request.indices), request.allow_nonfinite, request.verify)
        if not files.names:
            raise
        return files
    return RemoteArtefact(remote, commit, single_artefact(record, str(remote), request.kind))


def read(located: Located, request: Request) -> FeatureSpace[Any]:
    """Read the files and build the featurizer.

    Raises:
        WeightsError, ManifestError: the files are damaged, or do not fit together.
        PluginError: no installed plugin reads the kind, or the plugin fails.
        HubError: the Hub refused or did not answer.
    """
    if request.divide is not None and isinstance(located, ExternalFiles | CatalogueSource):
        raise UsageError(
            f"{request.where} was written by another library, and only an artefact of featurizers is divided over a "
            "mesh: load it without mesh=, save it with save_pretrained, and load that folder"
        )
    if isinstance(located, ExternalFiles):
        return _with_origin(external.read(located), request)
    if isinstance(located, CatalogueSource):
        return _read_entry(located, request)
    if (to := reference_in(located.manifest, request.where)) is not None:
        return _read_reference(located, to, request)
    revision = None
    if isinstance(located, LocalArtefact):
        folder = located.folder
    else:
        revision = located.commit
        # a config that cannot be read is refused before the weights are downloaded
        folder = located.remote.weights(revision, artefact.most_bytes(located.manifest, request.where))
        if labels.record_in(located.manifest, request.where):
            located.remote.file(LABELS_NAME, revision, labels.MAX_BYTES)
    featurizer = artefact.read_folder(
        folder,
        located.manifest,
        where=request.where,
        device=request.device,
        dtype=request.dtype,
        verify=request.verify,
        indices=request.indices,
        allow_nonfinite=request.allow_nonfinite,
        divide=request.divide,
    )
    featurizer.revision = revision
    return _with_origin(featurizer, request)


def _with_origin(featurizer: FeatureSpace[Any], request: Request) -> FeatureSpace[Any]:
    """Note the repository and the commit that a featurizer comes from, if it comes from the Hub."""
    if isinstance(request.source, HubSource) and featurizer.revision is not None:
        repository, subfolder = request.source.repo_id, request.subfolder or None
        with suppress(ValidationError):  # names that no reference holds
            featurizer.origin = Reference(repository=repository, revision=featurizer.revision, subfolder=subfolder)
    return featurizer


def _read_reference(located: LocalArtefact | RemoteArtefact, to: Reference, request: Request) -> FeatureSpace[Any]:
    """Read the featurizer that an artefact refers to, and give it what the artefact says itself.

    Raises:
        ManifestError: it refers to another reference, or does not fit what it refers to.
        HubError: the Hub refused or did not answer.
    """
    of_target = replace(request, source=HubSource(to.repository, to.revision), subfolder=to.subfolder, kind=None)
    target = locate(of_target)
    if isinstance(target, LocalArtefact | RemoteArtefact) and target.manifest.kind == REFERENCE:
        raise ManifestError(request.where, f"it refers to {to}, which refers to another repository; name that one")
    featurizer = read(target, of_target)
    if isinstance(located, LocalArtefact):
        folder, revision = located.folder, None
    else:
        revision = located.commit
        folder = located.remote.weights(revision, artefact.most_bytes(located.manifest, request.where))
        if labels.record_in(located.manifest, request.where):
            located.remote.file(LABELS_NAME, revision, labels.MAX_BYTES)
    descriptions.apply_description(
        featurizer,
        folder,
        located.manifest,
        where=request.where,
        verify=request.verify,
        is_slice=request.indices is not None,
    )
    featurizer.revision = revision
    return featurizer


def place(featurizer: FeatureSpace[Any], request: Request) -> FeatureSpace[Any]:
    """Check the kind of a featurizer, and move it to the device and the dtype.

    Raises:
        UsageError: it is of another kind, or the device is absent.
    """
    check_kind(featurizer.kind, request.where, request.kind)
    try:
        return featurizer.to(device=request.device, dtype=request.dtype)
    except (AssertionError, RuntimeError, NotImplementedError, ImportError) as error:  # raised by torch
        raise UsageError(f"{request.where} cannot be put on {shown(request.device)}: {one_line(error)}") from error


def _holds_other_files(folder: Path) -> bool:
    """Return whether it is a folder with files, but without a ``config.json``."""
    try:
        return folder.is_dir() and not (folder / CONFIG_NAME).exists() and any(folder.iterdir())
    except (OSError, RuntimeError, ValueError):  # it cannot be read, or no folder can have this name
        return False


def _read_entry(entry: CatalogueSource, request: Request) -> FeatureSpace[Any]:
    """Let a plugin read an entry of its catalogue."""
    opened: list[ExternalFiles] = []

    def repository(repo_id: str, subfolder: str | None = None, revision: str | None = None) -> ExternalFiles:
        remote = request.remote(HubSource(repo_id, revision), subfolder)
        opened.append(external.of_repository(remote, columns, request.allow_nonfinite, request.verify))
        return opened[-1]

    columns = _columns(request.indices)
    featurizer = host().ask("featurizers_resolve", entry.plugin, reference=entry.reference, repository=repository)
    if featurizer is None:
        raise PluginError(f"the plugin {entry.plugin!r} has no catalogue, so {str(entry)!r} names nothing")
    return external.checked(featurizer, opened[-1]) if opened else featurizer


def _columns(indices: Indices | Mapping[str, Indices]) -> external.Columns:
    """Return the features to read, for files whose number of features is not known yet; None for all.

    Raises:
        UsageError: the form of the indices needs the number of features, or there are none.
    """
    if indices is None:
        return None
    if isinstance(indices, Mapping):
        if not indices:
            raise UsageError("the indices name no group: give the features to load by group, or no indices for all")
        return {group: _columns(own) for group, own in indices.items()}  # type: ignore[misc]
    needs_number = isinstance(indices, slice | str) or getattr(indices, "dtype", None) == torch.bool
    of_examples = isinstance(indices, list | tuple) and any(isinstance(index, list | tuple) for index in indices)
    columns = None if needs_number or of_examples else select(indices, 2**31).as_columns()
    if columns is None or not columns.numel():
        raise UsageError("give the features to load as a list of numbers, the same for every example")
    return columns
