"""`Scalar`: the description of a derived scalar."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from featurizers_derived_scalars.nodes import Basis, NodeAxis

Key: TypeAlias = "tuple[str, int | None]"
"""Name of a scalar, and layer of one of its tensors."""


@dataclass(frozen=True)
class Scalar:
    """Description of a derived scalar, without its tensors.

    Attributes:
        axes: axes of its tensors.
        basis: basis of the nodes; None if it is not of nodes, or was loaded from a file and had a featurizer.
        params: parameters that it was made with, as text.
    """

    axes: tuple[NodeAxis, ...]
    basis: Basis | None = None
    params: Mapping[str, str] = field(default_factory=dict)
