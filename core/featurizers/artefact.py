"""Artefacts on disk: a folder of three files, written whole or not at all."""

from __future__ import annotations

import functools
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from featurizers import card, weights
from featurizers.errors import (
    ArtefactError,
    ConfigError,
    FeaturizerError,
    ManifestError,
    PluginError,
    UsageError,
    WeightsError,
)
from featurizers.featurizer import Featurizer
from featurizers.indices import Indices, select
from featurizers.manifest import (
    CARD_NAME,
    CONFIG_NAME,
    WEIGHTS_NAME,
    Entry,
    Index,
    Manifest,
    SiteRecord,
    dump,
    explain,
    read,
)
from featurizers.plugins import host


def save(featurizer: Featurizer[Any], folder: str | Path) -> Path:
    """Write a featurizer as an artefact and return its folder.

    The files are written to a new folder beside, which then takes the place of an artefact that was there: a save
    that fails leaves the old one as it was. Other files in the folder stay, and so does what people wrote in the
    README.

    Raises:
        ArtefactError: the folder holds something else than an artefact.
        ManifestError: the metadata is not JSON, or a name is not allowed.
    """
    target = _target(folder)
    with _replacing(target) as new:
        _write(featurizer, new, source=f"./{target.name}")
    return Path(folder).expanduser()


def save_collection(featurizers: Mapping[str, Featurizer[Any]], folder: str | Path) -> Path:
    """Write several featurizers as one folder, each in the subfolder of its name, with an index at the root.

    Args:
        featurizers: by subfolder, such as ``"resid.post/layer-3"``.
        folder: where; a collection that was there is replaced whole.

    Raises:
        UsageError: there are none.
        ArtefactError, ManifestError: as `save`.
    """
    if not featurizers:
        raise UsageError("a collection holds at least one featurizer")
    target = _target(folder)
    try:
        index = Index(artefacts={name: _entry(f) for name, f in featurizers.items()})
    except ValidationError as error:
        raise ManifestError(str(target), explain(error)) from error
    with _replacing(target, featurizers) as new:
        for name, featurizer in featurizers.items():
            (new / name).mkdir(parents=True, exist_ok=True)
            _write(featurizer, new / name, source=f"./{target.name}/{name}")
        (new / CONFIG_NAME).write_bytes(dump(index))
        card.write_collection(index, new / CARD_NAME, source=f"./{target.name}")
    return Path(folder).expanduser()


def read_folder(
    folder: Path,
    manifest: Manifest,
    *,
    where: str,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    verify: bool = False,
    indices: Indices = None,
) -> Featurizer[Any]:
    """The featurizer of an artefact whose ``config.json`` was read.

    Args:
        folder: holds ``model.safetensors``.
        manifest: its ``config.json``.
        where: what to call the artefact in an error.
        device: where to put the tensors.
        dtype: floating-point dtype to convert them to; as stored if None.
        verify: whether to compare the sha256 of the weights with that in the config.
        indices: which features to read, None for all.

    Raises:
        UsageError: the kind is loaded whole.
        FeatureIndexError: a feature that the artefact does not have.
        PluginError: no installed plugin reads this kind.
        ManifestError: the kind refuses the config.
        WeightsError: the weights are damaged or do not fit the config.
    """
    check_dtype(dtype)
    cls = host().featurizer_class(manifest.kind)
    config = _config(cls, manifest, where)
    path = folder / WEIGHTS_NAME
    if not path.exists():
        raise WeightsError(where, f"{WEIGHTS_NAME} is missing; other weight formats are not read")
    try:
        with torch.device("meta"):
            featurizer = cls(config)
    except PluginError:
        raise
    except FeaturizerError as error:
        raise ManifestError(where, f"the kind {manifest.kind!r} refuses its config: {error}") from error
    weights.check_header(weights.read_header(path, where), featurizer.state_dict(), manifest.features, where)
    if verify:
        verify_weights(path, manifest, where)
    rows: dict[str, Tensor] = {}
    added: dict[str, Tensor] = {}
    if indices is not None:
        # a kind that is loaded whole says so, whatever the indices are
        cls.sliced(config, torch.zeros(1, dtype=torch.long))
        columns = select(indices, featurizer.n_features or 0).as_columns()
        if columns is None or not columns.numel():
            raise UsageError("give the features to load as a list of numbers, the same for every example")
        config, names, added = cls.sliced(config, columns)
        rows = dict.fromkeys(names, columns)
        with torch.device("meta"):
            featurizer = cls(config)
    tensors = {**weights.read_tensors(path, device, where, rows), **added}
    sets = {name: tensors.pop(f"{weights.SET_PREFIX}{name}") for name in manifest.features}
    featurizer.load_state_dict(tensors, assign=True)
    if _on_meta(featurizer):  # the kind computes tensors that it does not store
        featurizer = cls(config)
        featurizer.load_state_dict(tensors, assign=True)
    featurizer.feature_sets = sets
    featurizer.id = manifest.id
    featurizer.site = manifest.site.site() if manifest.site else None
    featurizer.metadata = manifest.metadata
    featurizer.eval()
    featurizer.to(device=device, dtype=dtype)
    try:
        featurizer.check()
    except FeaturizerError as error:
        raise WeightsError(where, f"{WEIGHTS_NAME}: {error}") from error
    return featurizer


def check_dtype(dtype: torch.dtype | None) -> None:
    """Raise `UsageError` unless it is a floating-point dtype or None."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise UsageError(f"dtype is a floating-point torch.dtype such as torch.float16, not {dtype!r}")


def verify_weights(path: Path, manifest: Manifest, where: str) -> None:
    """Compare the sha256 of the weights with the one in the config.

    Raises:
        WeightsError: they differ.
    """
    if (found := weights.sha256(path)) != manifest.sha256:
        raise WeightsError(
            where, f"{WEIGHTS_NAME} has sha256 {found}, its config says {manifest.sha256}; fetch it again"
        )


def _config(cls: type[Featurizer[Any]], manifest: Manifest, where: str) -> Any:
    try:
        return cls.Config.model_validate(manifest.config)
    except ValidationError as error:
        raise ManifestError(where, f"the kind {manifest.kind!r} refuses its config: {explain(error)}") from error


def build(cls: type[Featurizer[Any]], config: Mapping[str, Any]) -> Featurizer[Any]:
    """A new featurizer of a class, from the keyword arguments of its config.

    Raises:
        ConfigError: the kind refuses them.
    """
    try:
        checked = cls.Config.model_validate(dict(config))
    except ValidationError as error:
        raise ConfigError(f"{cls.kind}: {explain(error)}") from error
    return cls(checked)


def _target(folder: str | Path) -> Path:
    """The folder itself, behind links and dots, because it is replaced as a whole."""
    try:
        return Path(folder).expanduser().resolve()
    except (OSError, RuntimeError) as error:
        raise ArtefactError(str(folder), f"it is not the name of a folder: {error}") from error


def _on_meta(featurizer: Featurizer[Any]) -> bool:
    return any(t.is_meta for t in (*featurizer.parameters(), *featurizer.buffers()))


def _write(featurizer: Featurizer[Any], folder: Path, source: str) -> None:
    """Write the three files into a folder that is nobody's yet."""
    sets = {f"{weights.SET_PREFIX}{name}": tensor for name, tensor in featurizer.feature_sets.items()}
    digest = weights.write_tensors({**featurizer.state_dict(), **sets}, folder / WEIGHTS_NAME, source)
    try:
        manifest = Manifest(
            kind=featurizer.kind,
            id=featurizer.id,
            config=featurizer.config.model_dump(mode="json"),
            site=None if featurizer.site is None else SiteRecord.of(featurizer.site),
            features=sorted(featurizer.feature_sets),
            saved_with=_distributions(featurizer),
            sha256=digest,
            metadata=featurizer.metadata,
        )
    except ValidationError as error:
        raise ManifestError(source, explain(error)) from error
    (folder / CONFIG_NAME).write_bytes(dump(manifest))
    card.write(manifest, folder / CARD_NAME, source=source)


def _entry(featurizer: Featurizer[Any]) -> Entry:
    return Entry(kind=featurizer.kind, id=featurizer.id, site=None if featurizer.site is None else str(featurizer.site))


def _distributions(featurizer: Featurizer[Any]) -> dict[str, str]:
    """Name and version of the core and of each distribution whose class takes part."""
    roots = {type(module).__module__.partition(".")[0] for module in featurizer.modules()}
    names = {name for root in roots for name in _owners().get(root, []) if root != "torch"}
    versions = {}
    for name in sorted({*names, "featurizers"}):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:  # a class of the program itself belongs to no distribution
            continue
    return versions


@functools.cache
def _owners() -> Mapping[str, list[str]]:
    """The distributions that each top-level package comes from; reading them all takes a while."""
    return packages_distributions()


@contextmanager
def _replacing(target: Path, parts: Iterable[str] = ()) -> Iterator[Path]:
    """A new folder that becomes ``target`` when the block ends well, and is removed when it does not.

    Args:
        target: the folder to write or to replace.
        parts: subfolders of the artefacts that it will have.
    """
    if target.exists():
        _check_replaceable(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    new, old = (target.parent / f".{target.name}.{uuid.uuid4().hex}" for _ in range(2))
    new.mkdir()
    try:
        if target.exists():
            _keep(target, new, {".", *parts})
        yield new
        if not target.exists():
            new.rename(target)
        else:
            target.rename(old)
            try:
                new.rename(target)
            except BaseException:
                old.rename(target)
                raise
            shutil.rmtree(old)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _check_replaceable(target: Path) -> None:
    if not target.is_dir() or (any(target.iterdir()) and not (target / CONFIG_NAME).exists()):
        raise ArtefactError(str(target), "it is not empty and not an artefact; choose a new or an empty folder")
    if (target / CONFIG_NAME).exists():
        read(target / CONFIG_NAME, str(target))  # refuses a config.json of another library


def _keep(old: Path, new: Path, renewed: set[str]) -> None:
    """Copy what is not ours from the old folder: other files, and the READMEs that will be renewed."""
    record = read(old / CONFIG_NAME, str(old)) if (old / CONFIG_NAME).exists() else None
    parts = {".", *(record.artefacts if isinstance(record, Index) else ())}

    def ours(folder: str, names: list[str]) -> set[str]:
        here = Path(folder).relative_to(old).as_posix()
        files = {CONFIG_NAME, WEIGHTS_NAME} if here in renewed else {CONFIG_NAME, WEIGHTS_NAME, CARD_NAME}
        return files.intersection(names) if here in parts else set()

    shutil.copytree(old, new, symlinks=True, ignore=ours, dirs_exist_ok=True)
