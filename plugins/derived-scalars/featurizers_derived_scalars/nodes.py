"""`Node`: one node of the circuit, at one token or pair of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from featurizers.errors import UsageError, shown

from featurizers_derived_scalars.bases import Basis
from featurizers_derived_scalars.places import Place


@final
@dataclass(frozen=True, eq=False)
class Node:
    """One node: a basis, a layer, and an index on each axis of the basis.

    As the target of an attribution every index is a number. In a result a None stands for an axis that was summed.

    Attributes:
        basis: what it is a node of.
        layer: of its place; None for one that the model has once.
        index: on each axis of the basis: ``(token, neuron)``, ``(token, key, head)``, ``(token, feature)``.
        pre_activation: whether what goes into the non-linearity is meant: ``mlp.pre`` for a neuron, ``attn.logits``
            for a probability, the encoder's sum for a latent of a `featurizers.DictionaryFeaturizer`.

    Raises:
        UsageError: the indices do not fit the axes.

    Example:
        >>> print(Node(Basis("mlp.neurons"), 3, (4, 17)))
        mlp.neurons:3[token 4, neuron 17]
    """

    basis: Basis
    layer: int | None
    index: tuple[int | None, ...]
    pre_activation: bool = False

    def __post_init__(self) -> None:
        """Refuse indices that are not one an axis."""
        object.__setattr__(self, "index", tuple(self.index))
        Place(self.basis.kind, self.layer)
        numbers = all(i is None or (isinstance(i, int) and not isinstance(i, bool)) for i in self.index)
        if len(self.index) != len(self.basis.axes) or not numbers:
            raise UsageError(
                f"a node of {self.basis} has an index on each of the axes {', '.join(self.basis.axes)}, "
                f"not {shown(self.index)}"
            )

    @property
    def place(self) -> Place:
        """The place whose tensor holds the node."""
        return Place(self.basis.kind, self.layer)

    def numbers(self) -> tuple[int, ...]:
        """The index, all numbers.

        Raises:
            UsageError: an axis has none.
        """
        found = tuple(i for i in self.index if i is not None)
        if len(found) != len(self.index):
            raise UsageError(f"{self} is a sum of nodes; a target has a number on every axis")
        return found

    def __str__(self) -> str:
        """Basis, layer and indices."""
        parts = [f"{axis} {i}" for axis, i in zip(self.basis.axes, self.index, strict=True) if i is not None]
        pre = " before the non-linearity" if self.pre_activation else ""
        return f"{self.basis.at(self.layer)}[{', '.join(parts)}]{pre}"
