"""Causal bases: the orthonormal directions of a layer whose ablation moves a model's output most."""

from typing import Any

from featurizers import hookimpl

from featurizers_causal_basis.ablation import ablate_subspace, remove_subspace
from featurizers_causal_basis.derangement import derange
from featurizers_causal_basis.featurizer import CausalBasisConfig, CausalBasisFeaturizer
from featurizers_causal_basis.fidelity import Fidelity, causal_fidelity
from featurizers_causal_basis.massive import MassiveTokenWarning
from featurizers_causal_basis.record import BasisRecord, Mode

__all__ = [
    "BasisRecord",
    "CausalBasisConfig",
    "CausalBasisFeaturizer",
    "Fidelity",
    "MassiveTokenWarning",
    "Mode",
    "ablate_subspace",
    "causal_fidelity",
    "derange",
    "remove_subspace",
]


@hookimpl
def featurizers_register(register: Any) -> None:
    """Register the kind ``causal-basis``."""
    register(CausalBasisFeaturizer)
