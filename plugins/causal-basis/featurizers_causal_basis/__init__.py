"""Causal bases: the orthonormal directions of a layer whose ablation moves a model's output most.

Rooms, lowest first: `lens` (readouts), `solve` (the search), then `command` and `compat` (the names of tuned-lens).
The files `record`, `inputs`, `featurizer`, `ablation`, `fidelity` and `pictures` hold the featurizer and its tools.

``__init__.pyi`` lists the public names. A name is imported when it is first used. This module has no ``__dir__``,
because pluggy would get each name that it lists.
"""

from typing import Any

import lazy_loader
from featurizers import hookimpl

__getattr__, _, __all__ = lazy_loader.attach_stub(__name__, __file__)


@hookimpl
def featurizers_register(register: Any) -> None:
    """Register the kind ``causal-basis``."""
    from featurizers_causal_basis.featurizer import CausalBasisFeaturizer

    register(CausalBasisFeaturizer)
