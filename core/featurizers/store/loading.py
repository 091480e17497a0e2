"""`load` and `create`: how a featurizer comes into being."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featurizers.errors import (
    ArtefactError,
    FeaturizerError,
    HubNotFoundError,
    ManifestError,
    NotOursError,
    PluginError,
    UsageError,
    one_line,
    shown,
)
from featurizers.format.manifest import Entry, Index, Manifest, named_folder, read_local
from featurizers.hub.sources import CatalogueSource, FolderSource, HubSource, parse_source
from featurizers.registry.plugin_host import host

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from featurizers.features.featurizer import Featurizer
    from featurizers.features.indices import Indices
    from featurizers.format.external_files import ExternalFiles

RETRIES = 20
"""How often a folder is read anew that another program replaces meanwhile."""


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
    indices: Indices = None,
    verify: bool = False,
    allow_nonfinite: bool = False,
) -> Featurizer[Any]:
    """The featurizer that a folder, a repository or a plugin's catalogue holds, ready to use.

    Nothing in an artefact is run: its kind is looked up among the installed plugins, its config is validated by
    that kind, and its weights are safetensors whose shapes are compared with the config before they are read. What
    another library wrote is read by the plugin that knows its format, as data too.

    Args:
        source: ``"owner/name"``, ``"owner/name@revision"`` or ``"hub:owner/name"`` on the Hugging Face Hub;
            ``"./folder"``, ``"local:folder"`` or a `Path`; ``"plugin:reference"`` in a plugin's own catalogue.
        kind: refuse any other kind.
        subfolder: which artefact of a collection.
        revision: branch, tag or commit; ``revision`` of the result is the commit it resolved to.
        token: of the Hub; the stored one if None.
        cache_dir: where the Hub's files are cached.
        force_download: download again what is cached.
        local_files_only: use the cache alone.
        device: where to put the tensors.
        dtype: floating-point dtype to convert them to; as stored if None.
        indices: read these features alone, of a kind whose features are rows of its tensors, such as a dictionary;
            they keep their numbers.
        verify: compare the sha256 of the weights with that in the config; of what another library wrote, the files
            with the Hub's checksums.
        allow_nonfinite: load weights that hold NaN or infinity too, to look at them.

    Raises:
        FeatureIndexError: a feature that there is not.
        SourceError: the source is in none of these forms, or could be two things.
        ManifestError, WeightsError, ArtefactError: the artefact is damaged, inconsistent or of another library.
        UsageError: an argument is none that can be.
        HubError: the Hub refused or did not answer.
        PluginError: no installed plugin reads the kind, or it fails.

    Example:
        >>> import tempfile, featurizers
        >>> folder = tempfile.mkdtemp()
        >>> _ = featurizers.create("subspace", d_in=8, n_features=2).save_pretrained(folder)
        >>> featurizers.load("local:" + folder).n_features
        2
    """
    from featurizers.features.placement import check_placement
    from featurizers.files.regular import contained
    from featurizers.hub.repository import Remote
    from featurizers.store import artefact
    from featurizers.store.reading import of_folder, of_repository, read

    check_placement(device, dtype)
    parsed = parse_source(source, revision)
    options: dict[str, Any] = {"device": device, "dtype": dtype, "verify": verify, "allow_nonfinite": allow_nonfinite}
    if isinstance(parsed, FolderSource):
        if other := _foreign_folder(parsed.path, subfolder):
            contained(named_folder(parsed.path, None), other, str(other), ManifestError)
            if verify:
                raise UsageError(f"{other} was written by another library, and holds no checksum; leave out verify")
            return _placed(read(of_folder(other, _wanted(indices), allow_nonfinite)), kind, str(other), device, dtype)
        return _of_folder(parsed.path, subfolder, kind, indices=indices, **options)
    hub_options = (token, cache_dir, force_download, local_files_only)
    if isinstance(parsed, CatalogueSource):
        featurizer = _of_catalogue(parsed, _wanted(indices), allow_nonfinite, verify, hub_options)
        return _placed(featurizer, kind, str(parsed), device, dtype)
    remote = Remote(parsed, subfolder, *hub_options)
    try:
        record, commit = remote.config()
    except (HubNotFoundError, NotOursError) as error:
        if isinstance(error, HubNotFoundError) and error.what != "file":
            raise
        foreign = of_repository(remote, _wanted(indices), allow_nonfinite, verify)
        if not foreign.names:
            raise
        return _placed(read(foreign), kind, str(remote), device, dtype)
    manifest = _one(record, str(remote), kind)
    most = artefact.most_bytes(manifest, str(remote))  # refuses what cannot be read before it is downloaded
    folder = remote.weights(commit, most)
    featurizer = artefact.read_folder(folder, manifest, where=str(remote), indices=indices, **options)
    featurizer.revision = commit
    return featurizer


def _of_folder(path: Path, subfolder: str | None, kind: str | None, **options: Any) -> Featurizer[Any]:
    """The featurizer of one of our folders, of one state of it: another program may be saving to it."""
    from featurizers.files.regular import stat_signature
    from featurizers.format.manifest import CONFIG_NAME, WEIGHTS_NAME
    from featurizers.store.artefact import read_folder

    files = (CONFIG_NAME, WEIGHTS_NAME)
    for _ in range(RETRIES):
        place = named_folder(path, subfolder)
        before = stat_signature(place, *files)
        try:
            folder, record = read_local(path, subfolder)
            featurizer = read_folder(folder, _one(record, str(folder), kind), where=str(folder), **options)
        except FeaturizerError:  # of one state's config and another one's weights, anything may be wrong
            if before == stat_signature(place, *files):
                raise
        else:
            if before == stat_signature(place, *files):
                return featurizer
    raise ArtefactError(str(path), "another program keeps writing to it; load it when that one has finished")


def _foreign_folder(path: Path, subfolder: str | None) -> Path | None:
    """The folder, if it is one without a ``config.json`` of ours and with other files."""
    from featurizers.format.manifest import CONFIG_NAME, read

    try:
        folder = named_folder(path, subfolder)
        before = folder.stat()
        if not folder.is_dir() or not any(folder.iterdir()):
            return None
        if (folder / CONFIG_NAME).exists():
            read(folder / CONFIG_NAME, str(folder))
            return None
        if not os.path.samestat(before, folder.stat()):  # another program replaces it; it may be one of ours
            return None
    except NotOursError:
        return folder
    except (OSError, RuntimeError, ValueError):  # said better where our own artefact is read
        return None
    return folder


def _of_catalogue(
    source: CatalogueSource,
    indices: Tensor | None,
    allow_nonfinite: bool,
    verify: bool,
    hub_options: tuple[Any, ...],
) -> Featurizer[Any]:
    from featurizers.hub.repository import Remote
    from featurizers.store.reading import checked, of_repository

    opened = []

    def repository(repo_id: str, subfolder: str | None = None, revision: str | None = None) -> ExternalFiles:
        remote = Remote(HubSource(repo_id, revision), subfolder, *hub_options)
        foreign = of_repository(remote, indices, allow_nonfinite, verify)
        opened.append(foreign)
        return foreign

    found = host().ask("featurizers_resolve", source.plugin, reference=source.reference, repository=repository)
    if found is None:
        raise PluginError(f"the plugin {source.plugin!r} has no catalogue, so that {str(source)!r} names nothing")
    return checked(found, opened[-1]) if opened else found


def _placed(
    featurizer: Featurizer[Any],
    kind: str | None,
    where: str,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> Featurizer[Any]:
    if kind not in (None, featurizer.kind):
        raise UsageError(f"{where} holds a featurizer of kind {featurizer.kind!r}, not {kind!r}")
    try:
        return featurizer.to(device=device, dtype=dtype)
    except (AssertionError, RuntimeError, NotImplementedError, ImportError) as error:  # torch's, of absent devices
        raise UsageError(f"{where} cannot be put on {shown(device)}: {one_line(error)}") from error


def _wanted(indices: Indices) -> Tensor | None:
    """The features to read of a file whose number of features is not known yet."""
    import torch

    from featurizers.features.indices import select

    if indices is None:
        return None
    wrong = UsageError("give the features to load as a list of numbers, the same for every example")
    if isinstance(indices, slice | str) or getattr(indices, "dtype", None) == torch.bool:
        raise wrong  # how many features there are is not known yet
    if isinstance(indices, list | tuple) and any(isinstance(index, list | tuple) for index in indices):
        raise wrong
    columns = select(indices, 2**31).as_columns()
    if columns is None or not columns.numel():
        raise wrong
    return columns


def create(kind: str, **config: Any) -> Featurizer[Any]:
    """A new featurizer of a kind, from the keyword arguments of its config.

    Raises:
        UnknownKindError: no installed plugin provides the kind.
        ConfigError: the kind refuses the arguments.
        UsageError: the kind is no string.

    Example:
        >>> create("subspace", d_in=768, n_features=16, seed=0).n_features
        16
    """
    from featurizers.registry.plugin_host import build, host

    if not isinstance(kind, str):
        raise UsageError(f"a kind is a string such as 'subspace', not {shown(kind)}")
    return build(host().featurizer_class(kind), config)


def list_artefacts(
    source: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> dict[str, Entry]:
    """The artefacts of a folder or a repository by subfolder, ``""`` for one at the root; reads the root's config only.

    Raises:
        SourceError, ManifestError, HubError: as `load`.
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
    """The ``config.json`` of a source, without its weights and without its plugin."""
    parsed = parse_source(source, revision)
    if isinstance(parsed, FolderSource):
        return read_local(parsed.path, subfolder)[1]
    if isinstance(parsed, HubSource):
        from featurizers.hub.repository import Remote

        return Remote(parsed, subfolder, token, cache_dir, local_files_only=local_files_only).config()[0]
    host().load(parsed.plugin)
    raise PluginError(f"{str(parsed)!r} is an entry of a catalogue, which has no config.json of ours; load it")


def _one(record: Manifest | Index, where: str, kind: str | None) -> Manifest:
    if isinstance(record, Index):
        names = list(record.artefacts)
        shown = ", ".join(map(repr, names[:10])) + (", …" if len(names) > 10 else "")
        raise ManifestError(where, f"it holds {len(names)} artefacts; name one with subfolder=, of {shown}")
    if kind is not None and record.kind != kind:
        raise UsageError(f"{where} holds a featurizer of kind {record.kind!r}, not {kind!r}")
    return record
