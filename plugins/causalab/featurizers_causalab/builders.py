"""CausalAbstraction's builders: from a pair of modules to a pyvene class that acts through them."""

from __future__ import annotations

from typing import Any

import featurizers
from featurizers import Featurizer
from torch import nn

from featurizers_causalab.pairs import featurizer_of_modules


def build_feature_interchange_intervention(
    featurizer: nn.Module, inverse_featurizer: nn.Module, featurizer_id: str
) -> type:
    """A pyvene class that takes features from the source."""
    return bound("FeatureInterchangeIntervention", _of(featurizer, inverse_featurizer, featurizer_id))


def build_feature_collect_intervention(featurizer: nn.Module, featurizer_id: str) -> type:
    """A pyvene class that collects features."""
    return bound("FeatureCollectIntervention", _of(featurizer, None, featurizer_id))


def build_feature_mask_intervention(
    featurizer: nn.Module,
    inverse_featurizer: nn.Module,
    n_features: int,
    featurizer_id: str,
    tie_masks: bool = False,
) -> type:
    """A pyvene class with a trainable gate on each feature, or one on all."""
    return mask_class(_of(featurizer, inverse_featurizer, featurizer_id, n_features), tie_masks)


def build_feature_steering_intervention(
    featurizer: nn.Module, inverse_featurizer: nn.Module, featurizer_id: str
) -> type:
    """A pyvene class that adds a vector of the feature space."""
    return bound("FeatureSteeringIntervention", _of(featurizer, inverse_featurizer, featurizer_id))


def build_feature_replace_intervention(
    featurizer: nn.Module, inverse_featurizer: nn.Module, featurizer_id: str
) -> type:
    """A pyvene class that puts a vector of the feature space in place of the features."""
    return bound("FeatureReplaceIntervention", _of(featurizer, inverse_featurizer, featurizer_id))


def build_feature_interpolation_intervention(
    featurizer: nn.Module, inverse_featurizer: nn.Module, featurizer_id: str
) -> type:
    """A pyvene class that puts what a function makes of both in place of the features."""
    return bound("FeatureInterpolateIntervention", _of(featurizer, inverse_featurizer, featurizer_id))


def build_feature_noise_intervention(
    featurizer: nn.Module, inverse_featurizer: nn.Module, featurizer_id: str, seed: int = 0
) -> type:
    """A pyvene class that adds noise to the features."""
    return bound("FeatureNoiseIntervention", _of(featurizer, inverse_featurizer, featurizer_id), seed=seed)


def bound(name: str, core: Featurizer[Any], **fixed: int) -> type:
    """The pyvene class of a name, bound to a featurizer; pyvene is imported when one is asked for.

    Raises:
        MissingDependencyError: pyvene is not installed.
    """
    bind = featurizers.pyvene.bind  # says what to install if pyvene is missing
    from featurizers_causalab import interventions

    return bind(getattr(interventions, name), core, **fixed)


def mask_class(core: Featurizer[Any], tied: bool) -> type:
    """The pyvene class of a mask."""
    return bound("TiedFeatureMaskIntervention" if tied else "FeatureMaskIntervention", core)


def _of(
    featurizer: nn.Module, inverse: nn.Module | None, featurizer_id: str, n_features: int | None = None
) -> Featurizer[Any]:
    return featurizer_of_modules(featurizer, inverse, n_features, featurizer_id)
