"""CausalAbstraction's builders: each makes a pyvene intervention class from a pair of modules."""

from __future__ import annotations

from typing import Any

import featurizers
from featurizers import Featurizer
from torch import nn

from featurizers_causalab.pairs import featurizer_of_modules


def build_feature_interchange_intervention(
    featurizer: nn.Module, inverse_featurizer: nn.Module, featurizer_id: str
) -> type:
    """Build a pyvene class that takes features from the source."""
    return bound("FeatureInterchangeIntervention", _of(featurizer, inverse_featurizer, featurizer_id))


def build_feature_collect_intervention(featurizer: nn.Module, featurizer_id: str) -> type:
    """Build a pyvene class that collects features."""
    return bound("FeatureCollectIntervention", _of(featurizer, None, featurizer_id))


def build_feature_mask_intervention(
    featurizer: nn.Module,
    inverse_featurizer: nn.Module,
    n_features: int,
    featurizer_id: str,
    tie_masks: bool = False,
) -> type:
    """Build a pyvene class with a trainable gate for each feature, or one gate for all if ``tie_masks``."""
    return mask_class(_of(featurizer, inverse_featurizer, featurizer_id, n_features), tie_masks)


def build_feature_steering_intervention(
    featurizer: nn.Module, inverse_featurizer: nn.Module, featurizer_id: str
) -> type:
    """Build a pyvene class that adds a vector of the feature space."""
    return bound("FeatureSteeringIntervention", _of(featurizer, inverse_featurizer, featurizer_id))


def build_feature_replace_intervention(
    featurizer: nn.Module, inverse_featurizer: nn.Module, featurizer_id: str
) -> type:
    """Build a pyvene class that replaces the features by a vector of the feature space."""
    return bound("FeatureReplaceIntervention", _of(featurizer, inverse_featurizer, featurizer_id))


def build_feature_interpolation_intervention(
    featurizer: nn.Module, inverse_featurizer: nn.Module, featurizer_id: str
) -> type:
    """Build a pyvene class that replaces the features by a function of those of base and source."""
    return bound("FeatureInterpolateIntervention", _of(featurizer, inverse_featurizer, featurizer_id))


def build_feature_noise_intervention(
    featurizer: nn.Module, inverse_featurizer: nn.Module, featurizer_id: str, seed: int = 0
) -> type:
    """Build a pyvene class that adds noise to the features."""
    return bound("FeatureNoiseIntervention", _of(featurizer, inverse_featurizer, featurizer_id), seed=seed)


def bound(name: str, core: Featurizer[Any], **fixed: int) -> type:
    """Return the intervention class of a name, bound to a featurizer. This imports pyvene.

    Args:
        name: name of a class of `featurizers_causalab.interventions`.
        core: the featurizer.
        fixed: class attributes to set.

    Raises:
        MissingDependencyError: pyvene is not installed.
    """
    bind = featurizers.pyvene.bind  # its error says what to install
    from featurizers_causalab import interventions

    return bind(getattr(interventions, name), core, **fixed)


def mask_class(core: Featurizer[Any], tied: bool) -> type:
    """Return the mask intervention class, tied or not, bound to a featurizer."""
    return bound("TiedFeatureMaskIntervention" if tied else "FeatureMaskIntervention", core)


def _of(
    featurizer: nn.Module, inverse: nn.Module | None, featurizer_id: str, n_features: int | None = None
) -> Featurizer[Any]:
    return featurizer_of_modules(featurizer, inverse, n_features, featurizer_id)
