"""Payloads, the form in which causalab stores a featurizer: a description and two state dicts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch
from featurizers import Featurizer
from featurizers.errors import BasisError, ConversionError, ManifestError, UsageError, WeightsError, printable, shown
from featurizers.features import select
from featurizers.format import ExternalFiles
from featurizers.models import SELECTED
from featurizers_identity import IdentityConfig, IdentityFeaturizer
from featurizers_subspace import SubspaceFeaturizer
from torch import Tensor

from featurizers_causalab.rotations import rotation_of, state_of, subspace_of

SUBSPACE: Final = ("SubspaceFeaturizerModule", "SubspaceInverseFeaturizerModule")
IDENTITY: Final = ("IdentityFeaturizerModule", "IdentityInverseFeaturizerModule")
KEYS: Final = {"featurizer_class", "inverse_featurizer_class", "n_features"}
OPTIONAL: Final = {"additional_config", "featurizer_id", "tie_masks"}
TOLERANCE: Final = 1e-4
"""Largest difference of an element between two copies of a rotation, which different machines may have computed."""
MOST_FEATURES: Final = 2**24


@dataclass(frozen=True)
class Payload:
    """A featurizer as causalab stores it.

    Attributes:
        info: the description, ``model_info``.
        state: state dict of the featurizer's module.
        inverse: state dict of the inverse's module.
    """

    info: Any
    state: Any
    inverse: Any


def featurizer_of(payload: Payload, where: str) -> Featurizer[Any]:
    """Build the featurizer of a payload, and check that the three copies of its rotation agree.

    Raises:
        ManifestError: the description is malformed or names an unknown class.
        WeightsError: the tensors are malformed, contradict each other or are no rotation.
    """
    info = _checked_info(payload.info, where)
    classes = info["featurizer_class"], info["inverse_featurizer_class"]
    if classes == IDENTITY:
        return _identity(info, payload, where)
    if classes == SUBSPACE:
        return _subspace(info, payload, where)
    raise ManifestError(
        where,
        f"it is of the classes {shown(classes[0])} and {shown(classes[1])}; only those of an identity or a subspace "
        "are known. What a submission's own featurizer.py defines is never run, and the benchmark's loader refuses it "
        "too. Make the class a featurizer of a plugin (docs/plugins.md), or write its map as a rotation",
    )


def payload_of(featurizer: Featurizer[Any], where: str, *, tie_masks: bool = False) -> Payload:
    """Convert a featurizer to a payload.

    Args:
        featurizer: an identity or a subspace.
        where: names the target in an error.
        tie_masks: record that masks of this featurizer have one logit for all features.

    Raises:
        ConversionError: causalab has no class for the featurizer.
    """
    named = {"featurizer_id": featurizer.id, "tie_masks": tie_masks}
    if isinstance(featurizer, IdentityFeaturizer):
        return Payload(_info(IDENTITY, featurizer.n_features, {}, named), {}, {})
    if not isinstance(featurizer, SubspaceFeaturizer):
        raise ConversionError(
            where,
            f"CausalAbstraction's loader reads identities and subspaces, not the kind {featurizer.kind!r}; "
            "save it as an artefact with save_pretrained",
        )
    with torch.no_grad():
        rotation = featurizer.orthonormal_basis().detach().to("cpu", torch.float32).clone()
    options = {"rotation_matrix": rotation, "requires_grad": featurizer.basis.requires_grad}
    state = state_of(rotation)
    return Payload(_info(SUBSPACE, featurizer.n_features, options, named), state, state)


def selected_of(featurizer: Featurizer[Any]) -> list[int] | None:
    """Return the features in the feature set ``selected``, None for all."""
    chosen = featurizer.feature_sets.get(SELECTED)
    if chosen is None:
        return None
    columns = select(chosen, featurizer.n_features or MOST_FEATURES).as_columns()
    return None if columns is None else [int(column) for column in columns]


def selection(indices: Any, n_features: int | None, where: str, name: str) -> Tensor | None:
    """Convert the list of features of a file to a tensor; None if the file holds null.

    Args:
        indices: the JSON value.
        n_features: number of features, None if not known.
        where: names the source in an error.
        name: names the list in an error.

    Raises:
        ManifestError: the value is not a list, or a feature in it is out of range or repeated.
    """
    if indices is None:
        return None
    most = MOST_FEATURES if n_features is None else n_features
    if not isinstance(indices, list):
        raise ManifestError(where, f"{name} holds {shown(indices)}, not a list of features or null")
    for index in indices:
        if type(index) is not int or not 0 <= index < most:
            raise ManifestError(where, f"{name} names the feature {shown(index)}; there are {most}, counted from 0")
    if len(set(indices)) < len(indices):
        raise ManifestError(where, f"{name} names a feature twice")
    return torch.tensor(indices, dtype=torch.long)


def refuse_indices(source: ExternalFiles, where: str) -> None:
    """Raise `UsageError` if only some features are requested: a rotation is loaded whole."""
    if source.indices is not None:
        raise UsageError(f"{where}: it is loaded whole; give the indices to the operation instead")


def same(one: Any, other: Any) -> bool:
    """Return True if two descriptions are equal, with tensors compared bit for bit."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def _info(classes: tuple[str, str], n_features: int | None, options: Any, named: dict[str, Any]) -> dict[str, Any]:
    forward, inverse = classes
    return {
        "featurizer_class": forward,
        "inverse_featurizer_class": inverse,
        "n_features": n_features,
        "additional_config": options,
        **named,
    }


def _checked_info(info: Any, where: str) -> dict[str, Any]:
    """Check a description and fill in its optional keys."""
    if not isinstance(info, dict) or not KEYS <= info.keys() <= KEYS | OPTIONAL:
        keys = sorted(map(str, info)) if isinstance(info, dict) else type(info).__name__
        raise ManifestError(where, f"model_info holds {sorted(KEYS)} and may hold {sorted(OPTIONAL)}, not {keys!r}")
    info = {"additional_config": {}, "featurizer_id": None, "tie_masks": False, **info}
    n_features = info["n_features"]
    wrong = {
        "featurizer_class": not isinstance(info["featurizer_class"], str),
        "inverse_featurizer_class": not isinstance(info["inverse_featurizer_class"], str),
        "n_features": n_features is not None and not (type(n_features) is int and 0 < n_features <= MOST_FEATURES),
        "additional_config": not isinstance(info["additional_config"], dict),
        "featurizer_id": not isinstance(info["featurizer_id"], str | None),
        "tie_masks": type(info["tie_masks"]) is not bool,
    }
    for name, is_wrong in wrong.items():
        if is_wrong:
            raise ManifestError(where, f"model_info has an invalid {name}: {shown(info[name])}")
    return info  # type: ignore[no-any-return]


def _named(featurizer: Featurizer[Any], info: dict[str, Any]) -> Featurizer[Any]:
    featurizer.id = printable(info["featurizer_id"] or "", 256) or featurizer.kind
    return featurizer


def _identity(info: dict[str, Any], payload: Payload, where: str) -> Featurizer[Any]:
    if info["additional_config"] or payload.state != {} or payload.inverse != {}:
        raise WeightsError(where, "it is an identity, which has neither options nor tensors, but it holds some")
    return _named(IdentityFeaturizer(IdentityConfig(d_in=info["n_features"])), info)


def _subspace(info: dict[str, Any], payload: Payload, where: str) -> Featurizer[Any]:
    options = info["additional_config"]
    if options.keys() != {"rotation_matrix", "requires_grad"} or type(options["requires_grad"]) is not bool:
        raise ManifestError(
            where, f"additional_config of a subspace must hold rotation_matrix and requires_grad, not {shown(options)}"
        )
    rotation = rotation_of(payload.state, where)
    if info["n_features"] != rotation.shape[1]:
        raise WeightsError(
            where, f"model_info says {info['n_features']} features, but the rotation has {rotation.shape[1]} columns"
        )
    inverse = rotation if same(payload.inverse, payload.state) else rotation_of(payload.inverse, where)
    others = {"inverse": inverse, "rotation_matrix": options["rotation_matrix"]}
    for name, other in others.items():
        if not isinstance(other, Tensor) or other.shape != rotation.shape or not other.is_floating_point():
            raise WeightsError(where, f"the {name} is no matrix of the shape of the rotation, {tuple(rotation.shape)}")
        if not (difference := float((other.to(rotation.dtype) - rotation).abs().amax())) <= TOLERANCE:
            raise WeightsError(
                where,
                f"the rotation of the {name} differs from the featurizer's by {difference:.2g}: the files are from "
                "different runs, or one was changed. Save the unit again",
            )
    try:
        featurizer = subspace_of(rotation)
    except BasisError as error:
        raise WeightsError(where, str(error)) from error
    return _named(featurizer.requires_grad_(options["requires_grad"]), info)
