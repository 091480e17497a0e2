"""Reader of causalab's format 2.0: ``units_metadata.json``, ``featurizers.safetensors`` and its JSON skeleton."""

from __future__ import annotations

from typing import Any, Final

from featurizers import Featurizer
from featurizers.errors import ManifestError, WeightsError, shown
from featurizers.format import ExternalFiles, TensorFile
from featurizers.models import SELECTED
from featurizers_identity import IdentityConfig, IdentityFeaturizer

from featurizers_causalab import units
from featurizers_causalab.payloads import Payload, featurizer_of, refuse_indices, selection

UNITS: Final = "units_metadata.json"
SKELETON: Final = "featurizers.meta.json"
TENSORS: Final = "featurizers.safetensors"
VERSION: Final = "2.0"
SKELETON_VERSION: Final = 1
REQUIRED: Final = ("id", "n_features", "is_trivial")
"""Keys that the ``featurizer_info`` of a unit must have."""


def folders(source: ExternalFiles) -> list[str]:
    """Return the folders of a source that hold a bundle, each as a prefix of its file names."""
    return sorted(name.removesuffix(UNITS) for name in source.names if name.rpartition("/")[2] == UNITS)


def read(source: ExternalFiles, folder: str = "") -> dict[str, Featurizer[Any]]:
    """Read the featurizers of a bundle, by unit name.

    Args:
        source: the files.
        folder: prefix of the file names of the bundle.

    Raises:
        ManifestError: a file is missing or invalid, or of another version.
        WeightsError: the tensors are damaged or contradict each other.
        UsageError: only some features are requested; a rotation is loaded whole.
    """
    refuse_indices(source, source.where)
    records, payloads = source.json(f"{folder}{UNITS}"), _payloads(source, folder)
    if unknown := sorted(payloads.keys() - records.keys()):
        raise ManifestError(source.where, f"{SKELETON} has the unit {shown(unknown[0])}, which {UNITS} lacks")
    return {name: _unit(source.where, name, record, payloads.get(name)) for name, record in records.items()}


def _unit(where: str, name: str, record: Any, payload: Any) -> Featurizer[Any]:
    where = f"{where}: {shown(name, 200)}"
    record = record if isinstance(record, dict) else {}
    info = record.get("featurizer_info")
    if record.get("version") != VERSION:
        raise ManifestError(where, f"the unit is of version {shown(record.get('version'))}; only {VERSION!r} is read")
    if record.get("id") != name or not isinstance(info, dict) or not info.keys() >= set(REQUIRED):
        raise ManifestError(
            where, f"{UNITS} must give the unit its own name as id, and {', '.join(REQUIRED)} as featurizer_info"
        )
    if payload is not None:
        featurizer = featurizer_of(_payload(payload, where), where)
    elif info["is_trivial"] is not True:
        raise ManifestError(
            where,
            f"it has the featurizer {shown(info['id'])}, whose tensors were not saved: causalab does not write some "
            "featurizers, such as a sparse autoencoder or a composition with an identity. Save the featurizer itself",
        )
    else:
        featurizer = _identity(info["n_features"], where)
    if payload is not None and (featurizer.n_features, featurizer.id) != (info["n_features"], info["id"]):
        raise ManifestError(where, f"{UNITS} and {SKELETON} describe different featurizers for this unit")
    chosen = selection(record.get("feature_indices"), featurizer.n_features, where, "feature_indices")
    if chosen is not None:
        featurizer.feature_sets[SELECTED] = chosen
    component = record.get("component_type")
    parsed = units.parse(name, component if isinstance(component, str) else None)
    featurizer.site = None if parsed is None else parsed.site
    if featurizer.id == featurizer.kind:
        featurizer.id = name
    featurizer.metadata = {"causalab": {"unit": name, **({"token": parsed.token} if parsed else {})}}
    return featurizer


def _identity(n_features: Any, where: str) -> Featurizer[Any]:
    if n_features is not None and (type(n_features) is not int or not 0 < n_features <= 2**24):
        raise ManifestError(where, f"n_features is null or a number from 1 to {2**24}, not {shown(n_features)}")
    return IdentityFeaturizer(IdentityConfig(d_in=n_features))


def _payload(payload: Any, where: str) -> Payload:
    if not isinstance(payload, dict) or payload.keys() != {
        "model_info",
        "featurizer_state_dict",
        "inverse_state_dict",
    }:
        keys = sorted(map(str, payload)) if isinstance(payload, dict) else type(payload).__name__
        raise ManifestError(
            where,
            f"a featurizer is model_info and two state dicts, not {keys!r}; compositions are not read: save each stage "
            "by itself and compose them with >>",
        )
    return Payload(payload["model_info"], payload["featurizer_state_dict"], payload["inverse_state_dict"])


def _payloads(source: ExternalFiles, folder: str) -> dict[str, Any]:
    """Return the content of the skeleton with its tensors; empty if there is no skeleton, as for trivial units."""
    if f"{folder}{SKELETON}" not in source.names and f"{folder}{TENSORS}" not in source.names:
        return {}
    meta = source.json(f"{folder}{SKELETON}")
    if meta.get("_format_version") != SKELETON_VERSION:
        raise ManifestError(
            source.where, f"{SKELETON} is of version {shown(meta.get('_format_version'))}; only 1 is read"
        )
    payloads = _filled(meta.get("skeleton"), source.safetensors(f"{folder}{TENSORS}"), source.where)
    if not isinstance(payloads, dict):
        raise ManifestError(source.where, f"{SKELETON} holds no featurizers; its skeleton must be a dict of units")
    return payloads


def _filled(node: Any, tensors: TensorFile, where: str) -> Any:
    """Return the value of a node of the skeleton. The JSON reader bounds the recursion depth."""
    if isinstance(node, dict):
        if node.keys() == {"__tref__"} and isinstance(node["__tref__"], str):
            return tensors.read(node["__tref__"])
        kind = node.get("__kind__")
        if kind == "scalar" and not isinstance(node.get("value"), dict | list):
            return node.get("value")
        items = node.get("items")
        if kind == "dict" and isinstance(items, dict):
            return {key.replace("%2F", "/"): _filled(item, tensors, where) for key, item in items.items()}
        if kind in ("list", "tuple") and isinstance(items, list):
            return [_filled(item, tensors, where) for item in items]
    raise WeightsError(where, f"{SKELETON} holds {shown(node)}, which is no dict, list, number, text or tensor")
