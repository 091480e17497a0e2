"""Artefacts on disk: a folder of three files, written whole or not at all."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from featurizers.errors import (
    ArtefactError,
    FeaturizerError,
    ManifestError,
    PluginError,
    UsageError,
    WeightsError,
    explain,
    one_line,
)
from featurizers.features.featurizer import Featurizer
from featurizers.features.indices import Indices, select
from featurizers.files.regular import contained, read_bytes
from featurizers.files.replacement import replacing, resolved
from featurizers.format import card, weights
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
)
from featurizers.registry.plugin_host import host

MOST_OF_A_SET = 2**16
"""How many numbers a stored set may have for each feature."""


def save(featurizer: Featurizer[Any], folder: str | Path) -> Path:
    """Write a featurizer as an artefact and return its folder.

    The files are written to a new folder beside, which then takes the place of an artefact that was there: a save
    that fails leaves the old one as it was. Other files in the folder stay, and so does what people wrote in the
    README.

    Raises:
        ArtefactError: the folder holds something else than an artefact.
        ManifestError: the metadata is not JSON, or a name is not allowed.
    """
    target = resolved(folder)
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
    with writing_collection(featurizers, folder):
        pass
    return Path(folder).expanduser()


@contextmanager
def writing_collection(
    featurizers: Mapping[str, Featurizer[Any]], folder: str | Path, beside: Collection[str] = ()
) -> Iterator[tuple[Path, dict[str, Manifest]]]:
    """As `save_collection`; the block may write more files into the new folder, before it takes its place.

    Args:
        featurizers: by subfolder.
        folder: where.
        beside: names of the files at its root that the block writes; old ones are not kept.

    Returns:
        The new folder, and what the config of each artefact in it says.
    """
    if not featurizers:
        raise UsageError("a collection holds at least one featurizer")
    target = resolved(folder)
    try:
        index = Index(artefacts={name: _entry(f) for name, f in featurizers.items()})
    except ValidationError as error:
        raise ManifestError(str(target), explain(error)) from error
    with _replacing(target, featurizers, beside) as new:
        manifests = {}
        for name, featurizer in featurizers.items():
            (new / name).mkdir(parents=True, exist_ok=True)
            manifests[name] = _write(featurizer, new / name, source=f"./{target.name}/{name}")
        (new / CONFIG_NAME).write_bytes(dump(index))
        card.write_collection(index, new / CARD_NAME, source=f"./{target.name}", intervenable=bool(beside))
        yield new, manifests


def read_folder(
    folder: Path,
    manifest: Manifest,
    *,
    where: str,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    verify: bool = False,
    indices: Indices = None,
    allow_nonfinite: bool = False,
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
        allow_nonfinite: take weights that hold NaN or infinity too; such a featurizer is not checked further.

    Raises:
        UsageError: the kind is loaded whole.
        FeatureIndexError: a feature that the artefact does not have.
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
            featurizer = _on_meta(cls, config, where)
        tensors = {**weights.read_tensors(path, device, where, rows, allow_nonfinite=allow_nonfinite), **added}
        sets = {name: tensors.pop(f"{weights.SET_PREFIX}{name}") for name in manifest.features}
        tensors = weights.laid_out(tensors, featurizer.state_dict())
        featurizer.load_state_dict(tensors, assign=True)
        if any(t.is_meta for t in (*featurizer.parameters(), *featurizer.buffers())):
            featurizer = cls(config)  # the kind computes tensors that it does not store
            featurizer.load_state_dict(tensors, assign=True)
        featurizer.feature_sets = sets
        featurizer.id = manifest.id
        featurizer.site = manifest.site.site() if manifest.site else None
        featurizer.metadata = manifest.metadata
        featurizer.eval()
        featurizer.to(device=device, dtype=dtype)
        if allow_nonfinite and not all(map(weights.is_finite, tensors.values())):
            return featurizer
        try:
            featurizer.check()
        except FeaturizerError as error:
            raise WeightsError(where, f"{WEIGHTS_NAME}: {error}") from error
    return featurizer


def most_bytes(manifest: Manifest, where: str) -> int:
    """How many bytes the weights may have that a ``config.json`` implies; known before they are fetched.

    Raises:
        PluginError, ManifestError: as `read_folder`.
    """
    cls = host().featurizer_class(manifest.kind)
    with plugin_errors(f"kind {manifest.kind!r}", where):
        featurizer = _on_meta(cls, _config(cls, manifest, where), where)
        numbers: int = sum(tensor.numel() for tensor in featurizer.state_dict().values())
        numbers += len(manifest.features) * MOST_OF_A_SET * max(featurizer.n_features or 0, 1)
    return 8 * numbers + weights.MAX_HEADER_BYTES  # float64 is the widest


@contextmanager
def plugin_errors(what: str, where: str) -> Iterator[None]:
    """What the code of a plugin's class raises that is no error of ours, as one that names the class."""
    try:
        yield
    except FeaturizerError:
        raise
    except Exception as error:
        raise PluginError(
            f"{where}: the {what} failed on it: {type(error).__name__}: {one_line(error)}. "
            "If its config is sound, tell the author of its plugin"
        ) from error


def _on_meta(cls: type[Featurizer[Any]], config: Any, where: str) -> Featurizer[Any]:
    """A featurizer without weights, which says what its weights are."""
    try:
        with torch.device("meta"):
            return cls(config)
    except PluginError:
        raise
    except FeaturizerError as error:
        raise ManifestError(where, f"the kind {cls.kind!r} refuses its config: {error}") from error


def _config(cls: type[Featurizer[Any]], manifest: Manifest, where: str) -> Any:
    try:
        return cls.Config.model_validate(manifest.config)
    except ValidationError as error:
        raise ManifestError(where, f"the kind {manifest.kind!r} refuses its config: {explain(error)}") from error


def _write(featurizer: Featurizer[Any], folder: Path, source: str) -> Manifest:
    """Write the three files into a folder that is nobody's yet, and return what the config says."""
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
    return manifest


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
def _replacing(target: Path, parts: Iterable[str] = ("",), beside: Collection[str] = ()) -> Iterator[Path]:
    """A new folder that takes the place of ``target``, with its other files and the READMEs that are to be renewed.

    Args:
        target: the folder to write or to replace.
        parts: subfolders of the artefacts that it will have.
        beside: names of other files that are written anew.
    """
    renewed = {"", *parts}
    before: set[str] = set()

    def check(folder: Path) -> None:
        if any(folder.iterdir()) and not (folder / CONFIG_NAME).exists():
            raise ArtefactError(str(folder), "it is not empty and not an artefact; choose a new or an empty folder")
        if (folder / CONFIG_NAME).exists():  # refuses a config.json of another library
            record = read(folder / CONFIG_NAME, str(folder))
            before.update(["", *record.artefacts] if isinstance(record, Index) else [""])

    def ours(name: str) -> bool:
        part, _, file = name.rpartition("/")
        return name in beside or (part in before and file in RESERVED) or (part in renewed and file == CARD_NAME)

    with replacing(target, ours, check) as new:
        for part in renewed:
            if (old := target / part / CARD_NAME).is_file():
                contained(target, old, str(target), ArtefactError)
                (new / part).mkdir(parents=True, exist_ok=True)
                (new / part / CARD_NAME).write_bytes(read_bytes(old, str(target), ArtefactError, MAX_CARD_BYTES))
        yield new
