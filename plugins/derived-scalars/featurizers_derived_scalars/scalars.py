"""`Scalars`: derived scalars of one sequence, by name and layer, computed when they are looked up."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, NamedTuple, Self, TypeAlias, final

import torch
from torch import Tensor

from featurizers.errors import ShapeError, SiteError, UsageError, shown

from featurizers_derived_scalars.axes import Axis, exact, pair_of
from featurizers_derived_scalars.bases import Basis
from featurizers_derived_scalars.errors import IncompleteError
from featurizers_derived_scalars.nodes import Node

if TYPE_CHECKING:
    from featurizers_derived_scalars.activations import RawActivations
    from featurizers_derived_scalars.derivers import Deriver

Key: TypeAlias = "tuple[str, int | None]"


@dataclass(frozen=True)
class Scalar:
    """What is known of one scalar beside its tensors.

    Attributes:
        axes: what the axes of its tensors count.
        basis: of the nodes; None if it is of no nodes.
        params: what it was made with, as text.
    """

    axes: tuple[Axis, ...]
    basis: Basis | None = None
    params: Mapping[str, str] = MappingProxyType({})


class Ranked(NamedTuple):
    """One entry of `Scalars.topk`.

    Attributes:
        value: of the scalar.
        node: which node; None if the scalar is of no nodes.
        name: of the scalar.
        layer: of the tensor.
        index: into the tensor.
    """

    value: float
    node: Node | None
    name: str
    layer: int | None
    index: tuple[int, ...]


@final
class Scalars(Mapping["tuple[str, int | None]", Tensor]):
    """Derived scalars of one sequence: ``scalars["write_to", 3]`` is the tensor of layer 3.

    A tensor is computed each time it is looked up and is not kept, so that sums and rankings hold one layer at a
    time; `computed` keeps them all. It cannot be changed.

    Args:
        entries: what computes each tensor.
        about: what is known of each name.
    """

    def __init__(self, entries: Mapping[Key, Callable[[], Tensor]], about: Mapping[str, Scalar]) -> None:
        self._entries: Mapping[Key, Callable[[], Tensor]] = MappingProxyType(dict(entries))
        self._about: Mapping[str, Scalar] = MappingProxyType(dict(about))

    @classmethod
    def of(cls, deriver: Deriver, raw: RawActivations, layers: Sequence[int | None]) -> Self:
        """The scalars of a deriver at layers that it has; what `Deriver.derive` calls."""
        raise NotImplementedError

    @classmethod
    def union(cls, many: Iterable[Scalars]) -> Self:
        """All of several, which have different names.

        Raises:
            UsageError: two share a name.
        """
        raise NotImplementedError

    @property
    def about(self) -> Mapping[str, Scalar]:
        """What is known of each name."""
        return self._about

    def computed(self) -> Self:
        """The same with every tensor computed once and kept."""
        raise NotImplementedError

    def topk(
        self, k: int, *, both_ends: bool = False, group: Collection[str] | None = None, absolute: bool = False
    ) -> list[Ranked]:
        """The largest values, largest first, and their nodes; one layer at a time.

        Args:
            k: how many.
            both_ends: whether the k smallest follow, smallest first.
            group: names to rank together; all if None.
            absolute: rank by magnitude; the values keep their signs.
        """
        raise NotImplementedError

    def sum(self, keep: Collection[Axis | Literal["name", "layer"]] = ()) -> Tensor:
        """The sum over all names, layers and axes but those to keep, which every tensor has, in its order."""
        raise NotImplementedError

    def check_complete(self, total: float | Tensor, *, rtol: float = 1e-4, atol: float = 0.0) -> None:
        """Refuse scalars that do not add up.

        Args:
            total: what all of them sum to.
            rtol: how far off, relative to the sum of the magnitudes.
            atol: how far off beside.

        Raises:
            IncompleteError: they do not; the message says by how much.
        """
        raise NotImplementedError
