"""`save_reference`: an artefact that refers to a featurizer of the Hub, and adds a name, sites, labels and edits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from featurizers.errors import UsageError
from featurizers.features.feature_space import FeatureSpace
from featurizers.store.artefact import save_referring
from featurizers.store.loading import load


def save_reference(featurizer: FeatureSpace[Any], folder: str | Path) -> Path:
    """Write an artefact that holds all of a featurizer but its weights, and names the commit that these are at.

    `featurizers.load` of the artefact loads the featurizer from that commit and gives it this artefact's id, sites,
    feature sets, metadata, labels and edits. The repository is loaded once here, to compare the weights.

    Args:
        featurizer: loaded whole from a repository of the Hub, with weights that were not changed.
        folder: to write to, as in `featurizers.save`; `featurizers.push` uploads it.

    Raises:
        UsageError: it was not loaded from the Hub, or its weights are others.
        ArtefactError, ManifestError: as `featurizers.save`.
    """
    if (origin := featurizer.origin) is None:
        raise UsageError(
            f"{featurizer.id!r} was not loaded whole from a repository of the Hub, so that there is nothing to refer "
            "to; load it by its id, or save it with its weights: save_pretrained"
        )
    there = load(f"hub:{origin.repository}", revision=origin.revision, subfolder=origin.subfolder)
    own, stored = featurizer.state_dict(), there.state_dict()
    same = there.kind == featurizer.kind and there.config == featurizer.config and own.keys() == stored.keys()
    if not same or not all(_equal(own[name], stored[name]) for name in own):
        raise UsageError(
            f"{featurizer.id!r} is not what {origin} holds: it was changed, converted or loaded in part; save it with "
            "its weights: save_pretrained"
        )
    return save_referring(featurizer, folder, origin)


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.cpu(), b.cpu())
