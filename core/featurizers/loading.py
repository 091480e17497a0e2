"""`load` and `create`: how a featurizer comes into being."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from featurizers.errors import ManifestError, PluginError, UsageError
from featurizers.manifest import Entry, Index, Manifest, read_local
from featurizers.plugins import host
from featurizers.sources import CatalogueSource, FolderSource, HubSource, parse_source

if TYPE_CHECKING:
    import torch

    from featurizers.featurizer import Featurizer


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
    verify: bool = False,
) -> Featurizer[Any]:
    """The featurizer that a folder or a repository holds, ready to use.

    Nothing in an artefact is run: its kind is looked up among the installed plugins, its config is validated by
    that kind, and its weights are safetensors whose shapes are compared with the config before they are read.

    Args:
        source: ``"owner/name"``, ``"owner/name@revision"`` or ``"hub:owner/name"`` on the Hugging Face Hub;
            ``"./folder"``, ``"local:folder"`` or a `Path`.
        kind: refuse any other kind.
        subfolder: which artefact of a collection.
        revision: branch, tag or commit; ``revision`` of the result is the commit it resolved to.
        token: of the Hub; the stored one if None.
        cache_dir: where the Hub's files are cached.
        force_download: download again what is cached.
        local_files_only: use the cache alone.
        device: where to put the tensors.
        dtype: floating-point dtype to convert them to; as stored if None.
        verify: compare the sha256 of the weights with that in the config.

    Raises:
        SourceError: the source is in none of these forms, or could be two things.
        ManifestError, WeightsError: the artefact is damaged, inconsistent or of another library.
        HubError: the Hub refused or did not answer.
        PluginError: no installed plugin reads the kind, or it fails.

    Example:
        >>> import tempfile, featurizers
        >>> folder = tempfile.mkdtemp()
        >>> _ = featurizers.create("subspace", d_in=8, n_features=2).save_pretrained(folder)
        >>> featurizers.load("local:" + folder).n_features
        2
    """
    from featurizers.artefact import read_folder

    parsed = parse_source(source, revision)
    commit = None
    if isinstance(parsed, FolderSource):
        folder, record = read_local(parsed.path, subfolder)
        where = str(folder)
        manifest = _one(record, where, kind)
    elif isinstance(parsed, HubSource):
        from featurizers.hub import Remote

        remote = Remote(parsed, subfolder, token, cache_dir, force_download, local_files_only)
        record, commit = remote.config()
        where = str(remote)
        manifest = _one(record, where, kind)
        host().featurizer_class(manifest.kind)  # before the download of what could not be read
        folder = remote.weights(commit)
    else:
        raise _no_catalogue(parsed)
    featurizer = read_folder(folder, manifest, where=where, device=device, dtype=dtype, verify=verify)
    featurizer.revision = commit
    return featurizer


def create(kind: str, **config: Any) -> Featurizer[Any]:
    """A new featurizer of a kind, from the keyword arguments of its config.

    Raises:
        UnknownKindError: no installed plugin provides the kind.
        ConfigError: the kind refuses the arguments.

    Example:
        >>> create("subspace", d_in=768, n_features=16, seed=0).n_features
        16
    """
    from featurizers.artefact import build

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
        from featurizers.hub import Remote

        return Remote(parsed, subfolder, token, cache_dir, local_files_only=local_files_only).config()[0]
    raise _no_catalogue(parsed)


def _one(record: Manifest | Index, where: str, kind: str | None) -> Manifest:
    if isinstance(record, Index):
        names = list(record.artefacts)
        shown = ", ".join(map(repr, names[:10])) + (", …" if len(names) > 10 else "")
        raise ManifestError(where, f"it holds {len(names)} artefacts; name one with subfolder=, of {shown}")
    if kind is not None and record.kind != kind:
        raise UsageError(f"{where} holds a featurizer of kind {record.kind!r}, not {kind!r}")
    return record


def _no_catalogue(source: CatalogueSource) -> PluginError:
    host().load(source.plugin)
    return PluginError(f"the plugin {source.plugin!r} has no catalogue, so that {str(source)!r} names nothing")
