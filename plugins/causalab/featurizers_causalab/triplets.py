"""Triplets ``NAME_featurizer``, ``NAME_inverse_featurizer``, ``NAME_indices``, as the MIB benchmark takes them."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from featurizers import Featurizer
from featurizers.errors import ArtefactError, ManifestError, UsageError, WeightsError, one_line, shown
from featurizers.files import contained, read_bytes
from featurizers.format import MAX_CONFIG_BYTES, ExternalFiles, parse_json
from featurizers.models import SELECTED

from featurizers_causalab import units
from featurizers_causalab.payloads import Payload, featurizer_of, payload_of, same, selected_of, selection

FORWARD, INVERSE, INDICES = "_featurizer", "_inverse_featurizer", "_indices"


def names(source: ExternalFiles) -> list[str]:
    """The names of the units that a source holds, with their folders.

    Of a unit whose name says that it is one, a single file is enough; of any other both modules are there.
    """
    files = set(source.names)
    found = {
        name.removesuffix(suffix) for suffix in (INVERSE, FORWARD, INDICES) for name in files if name.endswith(suffix)
    }
    return sorted(
        name for name in found if units.parse(name.rpartition("/")[2]) or {name + FORWARD, name + INVERSE} <= files
    )


def read(source: ExternalFiles, name: str) -> Featurizer[Any]:
    """The featurizer of one unit, the features that it acts on as its feature set ``selected``.

    Args:
        source: what holds its files.
        name: of the unit, with its folder.

    Raises:
        ManifestError: a file is missing, or says what cannot be.
        WeightsError: the files are damaged, or contradict each other.
        UsageError: some features are asked for: a rotation is loaded whole.
    """
    unit = name.rpartition("/")[2]
    where = f"{source.where}: {shown(name, 200)}"
    if source.indices is not None:
        raise UsageError(f"{where}: it is loaded whole; give the indices to the operation instead")
    if f"{name}{FORWARD}" not in source.names and f"{name}{INVERSE}" not in source.names:
        raise ManifestError(
            where,
            "there is a list of features and nothing that says of what: CausalAbstraction saves no sparse "
            "autoencoder. Load that one, and set its feature_sets['selected']",
        )
    featurizer = featurizer_of(read_payload(source, name), where)
    chosen = selection(_indices(source, name), featurizer.n_features, where, f"{unit}{INDICES}")
    if chosen is not None:
        featurizer.feature_sets[SELECTED] = chosen
    if featurizer.id == featurizer.kind:
        featurizer.id = unit
    parsed = units.parse(unit)
    featurizer.site = None if parsed is None else parsed.site
    featurizer.metadata = {"causalab": {"unit": unit, **({"token": parsed.token} if parsed else {})}}
    return featurizer


def read_payload(source: ExternalFiles, name: str) -> Payload:
    """What the two files of one unit hold, once they are known to describe the same.

    Raises:
        ManifestError: one is missing, or they describe different featurizers.
        WeightsError: one is damaged, or no such file.
    """
    where = f"{source.where}: {shown(name, 200)}"
    forward, inverse = (_part(source, f"{name}{suffix}", where) for suffix in (FORWARD, INVERSE))
    if not same(forward["model_info"], inverse["model_info"]):
        raise ManifestError(where, "the featurizer and its inverse describe different featurizers in their model_info")
    return Payload(forward["model_info"], forward["state_dict"], inverse["state_dict"])


def write(featurizer: Featurizer[Any], path: Path, *, tie_masks: bool = False, indices: bool = True) -> None:
    """Write the files of one unit in place of those that were there.

    All are written beside first, so that what cannot be written leaves the old ones as they were.

    Args:
        featurizer: an identity or a subspace.
        path: of the unit: a folder, which is made, and a name.
        tie_masks: whether its masks have one logit for all features.
        indices: whether to write the list of its selected features too.

    Raises:
        ConversionError: CausalAbstraction has no class for it.
        ArtefactError: the files cannot be written.
    """
    payload = payload_of(featurizer, str(path), tie_masks=tie_masks)
    states = {FORWARD: payload.state, INVERSE: payload.inverse}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".causalab-", dir=path.parent) as scratch:
            for suffix, state in states.items():
                torch.save({"model_info": payload.info, "state_dict": state}, Path(scratch) / suffix)
            if indices:
                (Path(scratch) / INDICES).write_text(json.dumps(selected_of(featurizer)), encoding="utf-8")
            for file in sorted(Path(scratch).iterdir()):
                file.replace(f"{path}{file.name}")
    except (OSError, ValueError, RuntimeError) as error:
        raise ArtefactError(str(path), f"its files cannot be written: {one_line(error)}") from error


def at(path: str | Path) -> tuple[ExternalFiles, str]:
    """The files of one unit of this machine, and its name: of ``FOLDER/NAME``, as `write` takes it."""
    folder, name = Path(path).parent, Path(path).name
    files = (f"{name}{suffix}" for suffix in (FORWARD, INVERSE, INDICES))
    there = tuple(file for file in files if (folder / file).exists())

    def fetch(file: str, _most: int | None) -> Path:
        return contained(folder, folder / file, str(folder), ManifestError)

    return ExternalFiles(str(folder), there, fetch), name


def _part(source: ExternalFiles, name: str, where: str) -> dict[str, Any]:
    if name not in source.names:
        raise ManifestError(where, f"{shown(name.rpartition('/')[2], 200)} is missing; a unit has both files")
    part = source.torch(name)
    if not isinstance(part, dict) or part.keys() != {"model_info", "state_dict"}:
        given = sorted(map(str, part)) if isinstance(part, dict) else type(part).__name__
        raise WeightsError(where, f"{shown(name, 200)} holds model_info and state_dict, not {given!r}")
    return part


def _indices(source: ExternalFiles, name: str) -> Any:
    """What the list of features says; null where there is none, as the benchmark reads it."""
    file = f"{name}{INDICES}"
    if file not in source.names:
        return None
    raw = read_bytes(source.path(file, MAX_CONFIG_BYTES), source.where, ManifestError, MAX_CONFIG_BYTES, file)
    return parse_json(raw, source.where, file)
