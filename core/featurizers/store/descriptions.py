"""What an artefact says of its featurizer beside config and weights: sites, labels, edits; written and given back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch

from featurizers.errors import ArtefactError, FeatureIndexError, FeaturizerError, ManifestError, UsageError, shown
from featurizers.features.feature_space import FeatureSpace
from featurizers.features.featurizer import Featurizer
from featurizers.features.site_map import SiteMap
from featurizers.format import edits, labels, weights
from featurizers.format.manifest import LABELS_NAME, WEIGHTS_NAME, Manifest
from featurizers.models.saved_edits import operation_of, spec_of

OWN_KEYS: Final = (labels.KEY, edits.KEY)
"""Keys of the metadata that describe attributes of the featurizer."""


def written(featurizer: FeatureSpace[Any], folder: Path, source: str) -> dict[str, Any]:
    """Write the file of labels, and return the metadata with what they say of labels and edits.

    Args:
        featurizer: whose labels and edits are written.
        folder: of the new artefact.
        source: name of the artefact in errors.

    Raises:
        ManifestError: the metadata hold a key that is written here.
        UsageError: an edit cannot be saved.
    """
    metadata = featurizer.metadata
    if taken := next((key for key in OWN_KEYS if key in metadata), None):
        raise ManifestError(source, f"the metadata have the key {taken!r}, which save writes itself; rename it")
    if featurizer.labels:
        raw = labels.dump(featurizer.labels)
        (folder / LABELS_NAME).write_bytes(raw)
        metadata = {**metadata, labels.KEY: labels.record_of(featurizer.labels, raw).model_dump()}
    if len(featurizer.edits) > edits.MAX_EDITS:
        raise UsageError(f"there are {len(featurizer.edits)} edits; an artefact holds {edits.MAX_EDITS} at most")
    if featurizer.edits:
        specs = [spec_of(edit, featurizer).model_dump(mode="json", exclude_none=True) for edit in featurizer.edits]
        metadata = {**metadata, edits.KEY: {"version": 1, "edits": specs}}
    return metadata


def give(featurizer: FeatureSpace[Any], folder: Path, manifest: Manifest, columns: Any, where: str) -> None:
    """Give a featurizer the metadata, labels and edits of its artefact.

    Args:
        featurizer: built and placed, with its id and site.
        folder: holds the labels.
        manifest: of the artefact.
        columns: of the slice that is loaded, as `FeatureSpace.checked_columns` returns them; None for all.
        where: name of the artefact in errors.

    Raises:
        ArtefactError: labels are damaged or of features that are not there, or edits do not fit.
        FeatureIndexError: a slice is loaded that lacks features of an edit.
    """
    featurizer.metadata = {name: value for name, value in manifest.metadata.items() if name not in OWN_KEYS}
    _give_labels(featurizer, folder, manifest, columns, where)
    _give_edits(featurizer, manifest, columns, where)


def set_sites(featurizer: FeatureSpace[Any], manifest: Manifest, where: str) -> None:
    """Give a featurizer the sites of its manifest.

    Raises:
        ManifestError: they are those of another form, or their names are not those of the config.
    """
    is_map = isinstance(featurizer, SiteMap)
    if is_map != (manifest.reads is not None):
        raise ManifestError(
            where,
            f"the kind {manifest.kind!r} has {'reads and writes' if is_map else 'one site'}, and so the format_version "
            f"{2 if is_map else 1}, not {manifest.format_version}",
        )
    if isinstance(featurizer, SiteMap):
        try:
            featurizer.reads = {name: record.site() for name, record in (manifest.reads or {}).items()}
            featurizer.writes = {name: record.site() for name, record in (manifest.writes or {}).items()}
        except FeaturizerError as error:
            raise ManifestError(where, str(error)) from error
    elif isinstance(featurizer, Featurizer):
        featurizer.site = manifest.site.site() if manifest.site else None


def apply_description(
    featurizer: FeatureSpace[Any], folder: Path, manifest: Manifest, *, where: str, verify: bool, is_slice: bool
) -> FeatureSpace[Any]:
    """Give a featurizer of another artefact the name, sites, feature sets, labels and edits of one that refers to it.

    Args:
        featurizer: loaded from the repository that is referred to.
        folder: of the artefact that refers to it.
        manifest: of that artefact.
        where: its name in errors.
        verify: whether to compare the sha256 of its feature sets.
        is_slice: whether only some features were loaded.

    Raises:
        ArtefactError: the artefact is damaged, or does not fit the featurizer.
    """
    path = folder / WEIGHTS_NAME
    weights.check_header(weights.read_header(path, where), {}, manifest.features, where)
    if verify:
        weights.verify_weights(path, manifest.sha256, where)
    tensor = next(iter((*featurizer.parameters(), *featurizer.buffers())), torch.empty(0))
    stored = weights.read_tensors(path, tensor.device, where, {}, names=None, allow_nonfinite=False)
    featurizer.feature_sets = {name: stored[f"{weights.SET_PREFIX}{name}"] for name in manifest.features}
    featurizer.id, featurizer.revision, featurizer.edits = manifest.id, None, []
    set_sites(featurizer, manifest, where)
    columns: Any = None
    if is_slice:
        columns = {group: torch.tensor(list(own.numbers)) for group, own in featurizer.numbering().items()}
    give(featurizer, folder, manifest, columns, where)
    return featurizer


def _give_labels(featurizer: FeatureSpace[Any], folder: Path, manifest: Manifest, columns: Any, where: str) -> None:
    """Give a featurizer the labels of its artefact; of a slice, those of its features.

    Args:
        featurizer: built, with the numbers of its features.
        folder: holds the labels.
        manifest: says whether there are any.
        columns: of the slice that is loaded, as `FeatureSpace.checked_columns` returns them; None for all.
        where: name of the artefact in errors.

    Raises:
        ArtefactError: the labels are damaged, or are of features that are not there.
    """
    if (record := labels.record_in(manifest, where)) is None:
        return
    found = labels.read(folder, record, where)
    if columns is not None:
        by_group = columns if isinstance(columns, Mapping) else {None: columns}
        found = found.only({group: set(own.tolist()) for group, own in by_group.items()})
    try:
        featurizer.labels = found
    except FeaturizerError as error:
        raise ArtefactError(where, f"{LABELS_NAME}: {error}") from error


def _give_edits(featurizer: FeatureSpace[Any], manifest: Manifest, columns: Any, where: str) -> None:
    """Give a featurizer the edits of its artefact.

    Raises:
        ManifestError: the edits do not fit the featurizer.
        UsageError: a slice is loaded that lacks features of an edit.
    """
    record = edits.record_in(manifest, where)
    for spec in () if record is None else record.edits:
        try:
            if not isinstance(featurizer, Featurizer):
                raise UsageError("a map between sites has no saved edits")
            own = (str(featurizer.site), featurizer.id)
            if (spec.site, spec.featurizer) != own:
                raise UsageError(
                    f"it is at {shown(spec.site)} through {shown(spec.featurizer)}, and the artefact is {own[1]!r} at "
                    f"{own[0]}"
                )
            if columns is not None and (isinstance(spec, edits.MaskSpec) or spec.indices is None):
                raise FeatureIndexError("it changes all features; load the artefact whole, without indices=")
            featurizer.edits.append(operation_of(spec, featurizer))
        except FeatureIndexError as error:
            raise (ManifestError(where, f"an edit: {error}") if columns is None else error) from error
        except FeaturizerError as error:
            raise ManifestError(where, f"an edit does not fit: {error}") from error
