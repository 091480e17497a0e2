"""Reader and writer of the triplets ``NAME_featurizer``, ``NAME_inverse_featurizer`` and ``NAME_indices`` of MIB."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from featurizers import Featurizer
from featurizers.errors import ArtefactError, ManifestError, WeightsError, one_line, shown
from featurizers.files import contained, read_bytes
from featurizers.format import MAX_CONFIG_BYTES, ExternalFiles, parse_json
from featurizers.models import SELECTED

from featurizers_causalab import units
from featurizers_causalab.payloads import (
    Payload,
    featurizer_of,
    payload_of,
    refuse_indices,
    same,
    selected_of,
    selection,
)

FORWARD, INVERSE, INDICES = "_featurizer", "_inverse_featurizer", "_indices"


def names(source: ExternalFiles) -> list[str]:
    """Return the names of the units in a source, with their folders.

    A name in CausalAbstraction's form, such as ``ResidualStream(…)``, is a unit if it has any of the three files. Any
    other name is a unit if it has both modules.
    """
    files = set(source.names)
    candidates = {
        name.removesuffix(suffix) for suffix in (INVERSE, FORWARD, INDICES) for name in files if name.endswith(suffix)
    }
    return sorted(
        name for name in candidates if units.parse(name.rpartition("/")[2]) or {name + FORWARD, name + INVERSE} <= files
    )


def read(source: ExternalFiles, name: str) -> Featurizer[Any]:
    """Read the featurizer of one unit. Its feature set ``selected`` holds the features that the unit acts on.

    Args:
        source: the files.
        name: name of the unit, with its folder.

    Raises:
        ManifestError: a file is missing or invalid.
        WeightsError: the files are damaged or contradict each other.
        UsageError: only some features are requested; a rotation is loaded whole.
    """
    unit = name.rpartition("/")[2]
    where = f"{source.where}: {shown(name, 200)}"
    refuse_indices(source, where)
    if f"{name}{FORWARD}" not in source.names and f"{name}{INVERSE}" not in source.names:
        raise ManifestError(
            where,
            "there is a list of features but no featurizer that has them: CausalAbstraction saves no sparse "
            "autoencoder. Load the autoencoder itself and set its feature_sets['selected']",
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
    """Read the two modules of one unit and check that they describe the same featurizer.

    Raises:
        ManifestError: a file is missing, or they describe different featurizers.
        WeightsError: a file is damaged or of another format.
    """
    where = f"{source.where}: {shown(name, 200)}"
    forward, inverse = (_part(source, f"{name}{suffix}", where) for suffix in (FORWARD, INVERSE))
    if not same(forward["model_info"], inverse["model_info"]):
        raise ManifestError(where, "the featurizer and its inverse describe different featurizers in their model_info")
    return Payload(forward["model_info"], forward["state_dict"], inverse["state_dict"])


def write(featurizer: Featurizer[Any], path: Path, *, tie_masks: bool = False, indices: bool = True) -> None:
    """Write the files of one unit, replacing existing ones.

    The files are written to a temporary folder first, so a failure leaves the existing ones unchanged.

    Args:
        featurizer: an identity or a subspace.
        path: path of the unit, ``FOLDER/NAME``; the folder is created.
        tie_masks: record that masks of this featurizer have one logit for all features.
        indices: write the list of selected features too.

    Raises:
        ConversionError: CausalAbstraction has no class for the featurizer.
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
        raise ArtefactError(str(path), f"the files of the unit cannot be written: {one_line(error)}") from error


def at(path: str | Path) -> tuple[ExternalFiles, str]:
    """Return the local files of the unit ``FOLDER/NAME``, the path that `write` takes, and its name."""
    folder, name = Path(path).parent, Path(path).name
    files = (f"{name}{suffix}" for suffix in (FORWARD, INVERSE, INDICES))
    existing = tuple(file for file in files if (folder / file).exists())

    def fetch(file: str, _most: int | None) -> Path:
        return contained(folder, folder / file, str(folder), ManifestError)

    return ExternalFiles(str(folder), existing, fetch), name


def _part(source: ExternalFiles, name: str, where: str) -> dict[str, Any]:
    if name not in source.names:
        raise ManifestError(where, f"{shown(name.rpartition('/')[2], 200)} is missing; a unit needs both modules")
    part = source.torch(name)
    if not isinstance(part, dict) or part.keys() != {"model_info", "state_dict"}:
        keys = sorted(map(str, part)) if isinstance(part, dict) else type(part).__name__
        raise WeightsError(where, f"{shown(name, 200)} must hold model_info and state_dict, not {keys!r}")
    return part


def _indices(source: ExternalFiles, name: str) -> Any:
    """Return the content of the list of features; None if there is no list, as the benchmark reads it."""
    file = f"{name}{INDICES}"
    if file not in source.names:
        return None
    raw = read_bytes(source.path(file, MAX_CONFIG_BYTES), source.where, ManifestError, MAX_CONFIG_BYTES, file)
    return parse_json(raw, source.where, file)
