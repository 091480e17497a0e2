"""What causalab writes of one featurizer: a description and two state dicts, and the featurizer that they mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch
from featurizers import Featurizer
from featurizers.errors import BasisError, ConversionError, ManifestError, WeightsError, printable, shown
from featurizers.features import select
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
"""How far two copies of one rotation may differ, element by element: they were computed on different machines."""
MOST_FEATURES: Final = 2**24


@dataclass(frozen=True)
class Payload:
    """What was written of one featurizer.

    Attributes:
        info: the description, ``model_info``.
        state: of the featurizer's module.
        inverse: of the inverse's module.
    """

    info: Any
    state: Any
    inverse: Any


def featurizer_of(payload: Payload, where: str) -> Featurizer[Any]:
    """The featurizer that a payload means, once its three statements of the same map are known to agree.

    Raises:
        ManifestError: the description is of another form, or of a class that is not known.
        WeightsError: the tensors are of another form, contradict each other, or are no rotation.
    """
    info = _checked_info(payload.info, where)
    classes = info["featurizer_class"], info["inverse_featurizer_class"]
    if classes == IDENTITY:
        return _identity(info, payload, where)
    if classes == SUBSPACE:
        return _subspace(info, payload, where)
    raise ManifestError(
        where,
        f"it is of the classes {shown(classes[0])} and {shown(classes[1])}; known are those of an identity and of a "
        "subspace. What a submission's own featurizer.py defines is never run, and the benchmark's loader refuses it "
        "too: make the class a featurizer of a plugin (docs/plugins.md), or write its map as a rotation",
    )


def payload_of(featurizer: Featurizer[Any], where: str, *, tie_masks: bool = False) -> Payload:
    """What causalab writes of a featurizer.

    Args:
        featurizer: an identity or a subspace.
        where: what to call the target in an error.
        tie_masks: whether its masks have one logit for all features.

    Raises:
        ConversionError: causalab has no class for its map.
    """
    named = {"featurizer_id": featurizer.id, "tie_masks": tie_masks}
    if isinstance(featurizer, IdentityFeaturizer):
        return Payload(_info(IDENTITY, featurizer.n_features, {}, named), {}, {})
    if not isinstance(featurizer, SubspaceFeaturizer):
        raise ConversionError(
            where,
            f"CausalAbstraction's loader knows identities and subspaces, and not the kind {featurizer.kind!r}; "
            "share it as an artefact of featurizers, with save_pretrained",
        )
    with torch.no_grad():
        rotation = featurizer.orthonormal_basis().detach().to("cpu", torch.float32).clone()
    options = {"rotation_matrix": rotation, "requires_grad": featurizer.basis.requires_grad}
    state = state_of(rotation)
    return Payload(_info(SUBSPACE, featurizer.n_features, options, named), state, state)


def selected_of(featurizer: Featurizer[Any]) -> list[int] | None:
    """The features that a featurizer's unit acts on, None for all."""
    chosen = featurizer.feature_sets.get(SELECTED)
    if chosen is None:
        return None
    columns = select(chosen, featurizer.n_features or MOST_FEATURES).as_columns()
    return None if columns is None else [int(column) for column in columns]


def selection(indices: Any, n_features: int | None, where: str, name: str) -> Tensor | None:
    """The features that a list in a file names, None if it says null.

    Raises:
        ManifestError: it is no list of different features that there are.
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


def same(one: Any, other: Any) -> bool:
    """Whether two descriptions are equal, tensors in them bit for bit."""
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


def _checked_info(given: Any, where: str) -> dict[str, Any]:
    """The description, with what it may leave out."""
    if not isinstance(given, dict) or not KEYS <= given.keys() <= KEYS | OPTIONAL:
        given = sorted(map(str, given)) if isinstance(given, dict) else type(given).__name__
        raise ManifestError(where, f"model_info holds {sorted(KEYS)} and may hold {sorted(OPTIONAL)}, not {given!r}")
    info: dict[str, Any] = {"additional_config": {}, "featurizer_id": None, "tie_masks": False, **given}
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
            raise ManifestError(where, f"model_info has the {name} {shown(info[name])}, which it cannot be")
    return info


def _named(featurizer: Featurizer[Any], info: dict[str, Any]) -> Featurizer[Any]:
    featurizer.id = printable(info["featurizer_id"] or "", 256) or featurizer.kind
    return featurizer


def _identity(info: dict[str, Any], payload: Payload, where: str) -> Featurizer[Any]:
    if info["additional_config"] or payload.state != {} or payload.inverse != {}:
        raise WeightsError(where, "it is an identity, and yet has options or tensors")
    return _named(IdentityFeaturizer(IdentityConfig(d_in=info["n_features"])), info)


def _subspace(info: dict[str, Any], payload: Payload, where: str) -> Featurizer[Any]:
    options = info["additional_config"]
    if options.keys() != {"rotation_matrix", "requires_grad"} or type(options["requires_grad"]) is not bool:
        raise ManifestError(
            where, f"additional_config of a subspace holds rotation_matrix and requires_grad, not {shown(options)}"
        )
    rotation = rotation_of(payload.state, where)
    if info["n_features"] != rotation.shape[1]:
        raise WeightsError(
            where, f"model_info says {info['n_features']} features, but its rotation has {rotation.shape[1]} columns"
        )
    inverse = rotation if same(payload.inverse, payload.state) else rotation_of(payload.inverse, where)
    others = {"inverse": inverse, "rotation_matrix": options["rotation_matrix"]}
    for name, other in others.items():
        if not isinstance(other, Tensor) or other.shape != rotation.shape or not other.is_floating_point():
            raise WeightsError(where, f"the {name} is no matrix of shape {tuple(rotation.shape)} as the featurizer's")
        if not (apart := float((other.to(rotation.dtype) - rotation).abs().amax())) <= TOLERANCE:
            raise WeightsError(
                where,
                f"the rotation of the {name} is another one than the featurizer's, by {apart:.2g}: the files are of "
                "different runs, or one of them was changed",
            )
    try:
        featurizer = subspace_of(rotation)
    except BasisError as error:
        raise WeightsError(where, str(error)) from error
    return _named(featurizer.requires_grad_(options["requires_grad"]), info)
