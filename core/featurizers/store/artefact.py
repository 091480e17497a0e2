"""Artefacts on disk: a folder of three files, written as a whole or not at all."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path
from typing import Any, TypeAlias

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from featurizers.errors import (
    ArtefactError,
    FeaturizerError,
    ManifestError,
    PluginError,
    UsageError,
    WeightsError,
    explain,
    one_line,
    shown,
)
from featurizers.features.feature_space import FeatureSpace
from featurizers.features.site_map import SiteMap
from featurizers.files.regular import contained, read_bytes
from featurizers.files.replacement import replacing, resolved
from featurizers.format import card, measured, weights
from featurizers.format.manifest import (
    CARD_NAME,
    CONFIG_NAME,
    MAX_CARD_BYTES,
    RESERVED,
    WEIGHTS_NAME,
    Entry,
    Index,
    Manifest,
    SiteRecord,
    dump,
    read,
    repeated,
)
from featurizers.format.reference import KIND as REFERENCE
from featurizers.format.reference import Reference
from featurizers.models.passport import KEY as PASSPORT
from featurizers.models.passport import passport_of
from featurizers.registry.plugin_host import host
from featurizers.store import descriptions

Divide: TypeAlias = "Callable[[FeatureSpace[Any]], tuple[FeatureSpace[Any], nn.Module, Mapping[str, slice]]]"
"""From a featurizer without memory to what one of several processes holds of it: that featurizer, the module in it
whose tensors have the names of the file, and the rows to read of each tensor that is not read whole."""

MAX_SET_NUMBERS = 2**16
"""Most numbers for each feature that a stored feature set may have."""


def save(
    featurizer: FeatureSpace[Any], folder: str | Path, *, model: object | None = None, metrics: object | None = None
) -> Path:
    """Write a featurizer as an artefact and return its folder.

    The files are written to a new folder, which then replaces the old artefact: a save that fails leaves the old one
    unchanged. Other files in the folder and the text that people wrote in the README are kept.

    Args:
        featurizer: to save.
        folder: to write to.
        model: in which the featurizer was found. A passport of it goes into the metadata: a few numbers of its
            activations at the featurizer's sites, with which `attach` and ``featurizers verify --model`` tell it from
            other models, revisions and coordinates.
        metrics: what `featurizers.evaluate` returned for it, or the path of its file. They go into the metadata and
            onto the card; the card shows them as long as the weights are those that were measured.

    Raises:
        ArtefactError: the folder is not empty and not an artefact.
        ManifestError: the metadata is not JSON, or a name is not allowed.
        UsageError: a model is given, and the featurizer has no site; or the metrics are of another kind.
    """
    if model is not None:
        record = passport_of(model, featurizer).model_dump(mode="json")
        featurizer.metadata = {**featurizer.metadata, PASSPORT: record}
    with featurizer.saving() as is_writer:
        if is_writer:
            target = resolved(folder)
            with _replacing(target) as new_folder:
                _write(featurizer, new_folder, source=f"./{target.name}", metrics=metrics)
    return Path(folder).expanduser()


def save_referring(featurizer: FeatureSpace[Any], folder: str | Path, to: Reference) -> Path:
    """Write an artefact that refers to the featurizer's repository and holds the rest: see `save_reference`."""
    target = resolved(folder)
    with _replacing(target) as new_folder:
        _write(featurizer, new_folder, source=f"./{target.name}", reference=to)
    return Path(folder).expanduser()


def save_collection(featurizers: Mapping[str, FeatureSpace[Any]], folder: str | Path) -> Path:
    """Write several featurizers to one folder, each in a subfolder of its own, with an index at the root.

    Args:
        featurizers: by subfolder, such as ``"resid.post/layer-3"``.
        folder: to write to; a collection in it is replaced as a whole.

    Raises:
        UsageError: no featurizer is given.
        ArtefactError, ManifestError: as `save`.
    """
    with writing_collection(featurizers, folder):
        pass
    return Path(folder).expanduser()


@contextmanager
def writing_collection(
    featurizers: Mapping[str, FeatureSpace[Any]], folder: str | Path, beside: Collection[str] = ()
) -> Iterator[tuple[Path, dict[str, Manifest]]]:
    """Write a collection as `save_collection` does; the block may add files before it replaces the old one.

    Args:
        featurizers: by subfolder.
        folder: to write to.
        beside: names of the files that the block writes at the root; old files of these names are not kept.

    Yields:
        The new folder, and the manifest of each artefact by its subfolder.

    Raises:
        UsageError, ArtefactError, ManifestError: as `save_collection`.
    """
    if not featurizers:
        raise UsageError("a collection holds at least one featurizer")
    if same := repeated(name.lower() for name in map(str, featurizers)):
        raise UsageError(f"two subfolders are {shown(same)} but for their case, which some disks do not tell apart")
    target = resolved(folder)
    try:
        index = Index(artefacts={name: _entry(f) for name, f in featurizers.items()})
    except ValidationError as error:
        raise ManifestError(str(target), explain(error)) from error
    with _replacing(target, featurizers, beside) as new_folder:
        manifests = {}
        for name, featurizer in featurizers.items():
            (new_folder / name).mkdir(parents=True, exist_ok=True)
            manifests[name] = _write(featurizer, new_folder / name, source=f"./{target.name}/{name}")
        (new_folder / CONFIG_NAME).write_bytes(dump(index))
        models = {site.model for manifest in manifests.values() for site in manifest.sites().values() if site.model}
        card.write_collection(
            index,
            new_folder / CARD_NAME,
            source=f"./{target.name}",
            intervenable=bool(beside),
            base_models=sorted(models),
        )
        yield new_folder, manifests


def read_folder(
    folder: Path,
    manifest: Manifest,
    *,
    where: str,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    verify: bool = False,
    indices: Any = None,
    allow_nonfinite: bool = False,
    divide: Divide | None = None,
) -> FeatureSpace[Any]:
    """Read the weights of an artefact and build its featurizer.

    Args:
        folder: holds ``model.safetensors``.
        manifest: its ``config.json``.
        where: name of the artefact in errors.
        device: where to put the tensors.
        dtype: floating-point dtype to convert them to; as stored if None.
        verify: whether to compare the sha256 of the weights with the one in the config.
        indices: which features to read, None for all.
        allow_nonfinite: accept weights that hold NaN or infinity; such a featurizer is not checked further.
        divide: chooses what this process reads of it, if several processes share it.

    Raises:
        UsageError: the kind can be loaded only as a whole.
        FeatureIndexError: an index is out of range.
        PluginError: no installed plugin reads this kind.
        ManifestError: the kind refuses the config.
        WeightsError: the weights are damaged or do not fit the config.
    """
    cls = host().featurizer_class(manifest.kind)
    path = folder / WEIGHTS_NAME
    with plugin_errors(f"kind {manifest.kind!r}", where):
        config = _config(cls, manifest, where)
        if not path.exists():
            raise WeightsError(where, f"{WEIGHTS_NAME} is missing; other weight formats are not read")
        featurizer = _on_meta(cls, config, where)
        weights.check_header(weights.read_header(path, where), featurizer.state_dict(), manifest.features, where)
        if verify:
            weights.verify_weights(path, manifest.sha256, where)
        rows: Mapping[str, Tensor | slice] = {}
        added: dict[str, Tensor] = {}
        names: set[str] | None = None
        columns: Any = None
        if indices is not None:
            columns = featurizer.checked_columns(indices)
            config, rows, added = cls.rows_of_slice(config, columns)
            featurizer = _on_meta(cls, config, where)
            names = {*featurizer.state_dict(), *(f"{weights.SET_PREFIX}{name}" for name in manifest.features)}
        part: nn.Module = featurizer
        if divide is not None:
            featurizer, part, rows = divide(featurizer)
        stored = weights.read_tensors(path, device, where, rows, names=names, allow_nonfinite=allow_nonfinite)
        tensors = {**stored, **added}
        sets = {name: tensors.pop(f"{weights.SET_PREFIX}{name}") for name in manifest.features}
        tensors = weights.laid_out(tensors, part.state_dict())
        part.load_state_dict(tensors, assign=True)
        if any(t.is_meta for t in (*featurizer.parameters(), *featurizer.buffers())):
            featurizer = cls(config)  # the kind computes tensors that it does not store
            featurizer.load_state_dict(tensors, assign=True)
        featurizer.feature_sets = sets
        featurizer.id = manifest.id
        descriptions.set_sites(featurizer, manifest, where)
        featurizer.eval()
        featurizer.to(device=device, dtype=dtype)
        descriptions.give(featurizer, folder, manifest, columns, where)
        if allow_nonfinite and not all(map(weights.is_finite, tensors.values())):
            return featurizer
        try:
            featurizer.check()
        except FeaturizerError as error:
            raise WeightsError(where, f"{WEIGHTS_NAME}: {error}") from error
    return featurizer


def most_bytes(manifest: Manifest, where: str) -> int:
    """Return the most bytes that the weights of a config may have, to refuse larger files before a download.

    Raises:
        PluginError, ManifestError: as `read_folder`.
    """
    if manifest.kind == REFERENCE:
        return 8 * len(manifest.features) * MAX_SET_NUMBERS * 2**8 + weights.MAX_HEADER_BYTES
    cls = host().featurizer_class(manifest.kind)
    with plugin_errors(f"kind {manifest.kind!r}", where):
        featurizer = _on_meta(cls, _config(cls, manifest, where), where)
        numbers: int = sum(tensor.numel() for tensor in featurizer.state_dict().values())
        numbers += len(manifest.features) * MAX_SET_NUMBERS * max(featurizer.n_features or 0, 1)
    return 8 * numbers + weights.MAX_HEADER_BYTES  # float64 is the widest


@contextmanager
def plugin_errors(what: str, where: str) -> Iterator[None]:
    """Re-raise any other exception from plugin code as a `PluginError` that names the class."""
    try:
        yield
    except FeaturizerError:
        raise
    except Exception as error:
        raise PluginError(
            f"{where}: the {what} failed on it: {type(error).__name__}: {one_line(error)}. "
            "If its config is sound, tell the author of its plugin"
        ) from error


def _on_meta(cls: type[FeatureSpace[Any]], config: Any, where: str) -> FeatureSpace[Any]:
    """Build a featurizer without memory for its weights, to know their names and shapes."""
    try:
        with torch.device("meta"):
            return cls(config)
    except PluginError:
        raise
    except FeaturizerError as error:
        raise ManifestError(where, f"the kind {cls.kind!r} refuses its config: {error}") from error


def _config(cls: type[FeatureSpace[Any]], manifest: Manifest, where: str) -> Any:
    try:
        return cls.Config.model_validate(manifest.config)
    except ValidationError as error:
        raise ManifestError(where, f"the kind {manifest.kind!r} refuses its config: {explain(error)}") from error


def _write(
    featurizer: FeatureSpace[Any],
    folder: Path,
    source: str,
    metrics: object | None = None,
    reference: Reference | None = None,
) -> Manifest:
    """Write the files into a new folder, and return the manifest.

    Raises:
        ManifestError: the metadata hold a key that is written here, or are not JSON.
        UsageError: an edit cannot be saved.
    """
    metadata = descriptions.written(featurizer, folder, source)
    sets = {f"{weights.SET_PREFIX}{name}": tensor for name, tensor in featurizer.feature_sets.items()}
    tensors = featurizer.stored_tensors() if reference is None else {}
    digest = weights.write_tensors({**tensors, **sets}, folder / WEIGHTS_NAME, source)
    config = featurizer.config if reference is None else reference
    try:
        manifest = Manifest(
            kind=featurizer.kind if reference is None else REFERENCE,
            id=featurizer.id,
            config=config.model_dump(mode="json"),
            **_site_fields(featurizer),
            features=sorted(featurizer.feature_sets),
            saved_with=_distributions(featurizer),
            sha256=digest,
            metadata=metadata,
        )
    except ValidationError as error:
        raise ManifestError(source, explain(error)) from error
    if metrics is not None:
        manifest = measured.added(manifest, metrics)
        featurizer.metadata = {**featurizer.metadata, measured.KEY: manifest.metadata[measured.KEY]}
    (folder / CONFIG_NAME).write_bytes(dump(manifest))
    card.write(manifest, folder / CARD_NAME, source=source)
    return manifest


def _entry(featurizer: FeatureSpace[Any]) -> Entry:
    return Entry(kind=featurizer.kind, id=featurizer.id, site=featurizer.sites_text)


def _site_fields(featurizer: FeatureSpace[Any]) -> dict[str, Any]:
    """Return what a manifest says of the sites."""
    if isinstance(featurizer, SiteMap):
        reads, writes = (
            {n: SiteRecord.of(s) for n, s in sites.items()} for sites in (featurizer.reads, featurizer.writes)
        )
        return {"format_version": 2, "reads": reads, "writes": writes}
    site = featurizer.sites.get("site")
    return {"site": None if site is None else SiteRecord.of(site)}


def _distributions(featurizer: FeatureSpace[Any]) -> dict[str, str]:
    """Return the versions of the core and of each distribution that defines a class of the featurizer."""
    roots = {type(module).__module__.partition(".")[0] for module in featurizer.modules()}
    names = {name for root in roots for name in _owners().get(root, []) if root != "torch"}
    versions = {}
    for name in sorted({*names, "featurizers"}):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:  # a class that the running program defines
            continue
    return versions


@functools.cache
def _owners() -> Mapping[str, list[str]]:
    """Return the distributions of each top-level package; cached, because it reads the metadata of all of them."""
    return packages_distributions()


@contextmanager
def _replacing(target: Path, parts: Iterable[str] = ("",), beside: Collection[str] = ()) -> Iterator[Path]:
    """Yield a new folder that replaces ``target`` at the end; it has the target's other files and its READMEs.

    Args:
        target: folder to write or to replace.
        parts: subfolders of the new artefacts.
        beside: names of other files that are written anew.
    """
    new_parts = {"", *parts}
    old_parts: set[str] = set()

    def check(folder: Path) -> None:
        if any(folder.iterdir()) and not (folder / CONFIG_NAME).exists():
            raise ArtefactError(str(folder), "it is not empty and not an artefact; choose a new or an empty folder")
        if (folder / CONFIG_NAME).exists():
            record = read(folder / CONFIG_NAME, str(folder))  # raises for a config.json of another library
            old_parts.update(["", *record.artefacts] if isinstance(record, Index) else [""])

    def is_rewritten(name: str) -> bool:
        part, _, file = name.rpartition("/")
        return name in beside or (part in old_parts and file in RESERVED) or (part in new_parts and file == CARD_NAME)

    with replacing(target, is_rewritten, check) as new_folder:
        for part in new_parts:
            if (old_card := target / part / CARD_NAME).is_file():
                contained(target, old_card, str(target), ArtefactError)
                (new_folder / part).mkdir(parents=True, exist_ok=True)
                text = read_bytes(old_card, str(target), ArtefactError, MAX_CARD_BYTES)
                (new_folder / part / CARD_NAME).write_bytes(text)
        yield new_folder
