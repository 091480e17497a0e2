"""Coordinates in an orthonormal subspace, and standardized coordinates, as featurizers."""

from featurizers_subspace.standardize import StandardizeConfig, StandardizeFeaturizer
from featurizers_subspace.subspace import SubspaceConfig, SubspaceFeaturizer

__all__ = ["StandardizeConfig", "StandardizeFeaturizer", "SubspaceConfig", "SubspaceFeaturizer"]
