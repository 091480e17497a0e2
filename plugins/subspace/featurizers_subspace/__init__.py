"""Orthonormal subspaces, and the standardization that makes PCA coordinates honest."""

from featurizers_subspace.standardize import StandardizeConfig, StandardizeFeaturizer
from featurizers_subspace.subspace import SubspaceConfig, SubspaceFeaturizer

__all__ = ["StandardizeConfig", "StandardizeFeaturizer", "SubspaceConfig", "SubspaceFeaturizer"]
