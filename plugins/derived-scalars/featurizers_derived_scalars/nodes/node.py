"""`Node`: a node of the circuit, at one token or pair of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from featurizers.errors import UsageError, shown

from featurizers_derived_scalars.circuit import Place
from featurizers_derived_scalars.nodes.bases import Basis


@final
@dataclass(frozen=True, eq=False)
class Node:
    """A node: a basis, a layer, and an index on each axis of the basis.

    In the target of an attribution every index is a number. In a result None stands for an axis that was summed.

    Attributes:
        basis: basis that it is a node of.
        layer: layer of its place; None for a place that the model has once.
        index: index on each axis of the basis: ``(token, neuron)``, ``(token, key, head)``, ``(token, feature)``.
        pre_activation: take the input of the non-linearity instead: ``mlp.pre`` for a neuron, ``attn.logits`` for a
            probability, the encoder's sum for a latent of a `featurizers.DictionaryFeaturizer`.

    Raises:
        UsageError: the indices do not fit the axes.

    Examples:
        >>> print(Node(Basis("mlp.neurons"), 3, (4, 17)))
        mlp.neurons:3[token 4, neuron 17]
    """

    basis: Basis
    layer: int | None
    index: tuple[int | None, ...]
    pre_activation: bool = False

    def __post_init__(self) -> None:
        """Check the indices."""
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
        """Place whose tensor holds the node."""
        return Place(self.basis.kind, self.layer)

    def numbers(self) -> tuple[int, ...]:
        """Return the index, all of it numbers.

        Raises:
            UsageError: an axis has no number.
        """
        numbers = tuple(i for i in self.index if i is not None)
        if len(numbers) != len(self.index):
            raise UsageError(f"{self} is a sum of nodes; a target has a number on every axis")
        return numbers

    def __str__(self) -> str:
        """Return basis, layer and indices, for people."""
        parts = [f"{axis} {i}" for axis, i in zip(self.basis.axes, self.index, strict=True) if i is not None]
        pre = " before the non-linearity" if self.pre_activation else ""
        return f"{self.basis.at(self.layer)}[{', '.join(parts)}]{pre}"
