"""`Scalars`: derived scalars of one sequence, by name and layer, computed when they are looked up."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Literal, TypeAlias, final

import torch
from featurizers.errors import ShapeError, SiteError, UsageError, shown
from torch import Tensor

from featurizers_derived_scalars.errors import IncompleteError
from featurizers_derived_scalars.nodes import NodeAxis
from featurizers_derived_scalars.results.files import read_scalars, write_scalars
from featurizers_derived_scalars.results.ranking import Ranked, beside, ranked
from featurizers_derived_scalars.results.scalar import Key, Scalar

Kept: TypeAlias = "NodeAxis | Literal['name', 'layer']"


@final
class Scalars(Mapping["tuple[str, int | None]", Tensor]):
    """Derived scalars of one sequence: ``scalars["write_to:mlp.neurons", 3]`` is the tensor of layer 3.

    A tensor is computed each time it is looked up and is not kept, so that `topk`, `sum` and `check_complete` hold
    one layer at a time; `computed` keeps them all. It cannot be changed.

    Args:
        entries: for each name and layer, a function that computes the tensor.
        about: description of each name.

    Raises:
        UsageError: a name has no description.
    """

    def __init__(self, entries: Mapping[Key, Callable[[], Tensor]], about: Mapping[str, Scalar]) -> None:
        if unknown := {name for name, _ in entries} - set(about):
            raise UsageError(f"nothing is known of the scalars {', '.join(sorted(unknown))}: about has no such names")
        self._entries: Mapping[Key, Callable[[], Tensor]] = MappingProxyType(dict(entries))
        self._about: Mapping[str, Scalar] = MappingProxyType(dict(about))

    @classmethod
    def of_tensors(cls, tensors: Mapping[Key, Tensor], about: Mapping[str, Scalar]) -> Scalars:
        """Return scalars whose tensors are computed already."""
        return cls({key: functools.partial(_identity, tensor) for key, tensor in tensors.items()}, about)

    @classmethod
    def union(cls, many: Iterable[Scalars]) -> Scalars:
        """Return all scalars of several collections, in order.

        Raises:
            UsageError: two share a name.
        """
        entries: dict[Key, Callable[[], Tensor]] = {}
        about: dict[str, Scalar] = {}
        for scalars in many:
            if shared := about.keys() & scalars.about.keys():
                raise UsageError(f"two scalars are named {sorted(shared)[0]}; rename one: deriver.renamed('...')")
            entries.update(scalars._entries)
            about.update(scalars.about)
        return cls(entries, about)

    @property
    def about(self) -> Mapping[str, Scalar]:
        """Description of each name."""
        return self._about

    def __getitem__(self, key: Key) -> Tensor:
        """Compute the tensor of a name and a layer.

        Raises:
            SiteError: there is no such scalar.
        """
        if key in self._entries:
            return self._entries[key]()
        known = ", ".join(f"({name!r}, {layer})" for name, layer in self._entries)
        raise SiteError(f"there is no scalar {shown(key)}; there are {known or 'none'}")

    def __iter__(self) -> Iterator[Key]:
        """Iterate over names and layers, in order."""
        return iter(self._entries)

    def __len__(self) -> int:
        """Return the number of tensors."""
        return len(self._entries)

    def __contains__(self, key: object) -> bool:
        """Return True if there is a tensor of a name and a layer; compute nothing."""
        return key in self._entries

    def __repr__(self) -> str:
        """Return the names, and the number of layers of each."""
        counts = {name: sum(other == name for other, _ in self._entries) for name in self._about}
        return f"Scalars({', '.join(f'{name} at {count} layers' for name, count in counts.items())})"

    def only(self, names: Collection[str]) -> Scalars:
        """Return the scalars of some names.

        Raises:
            SiteError: a name is not there.
        """
        if missing := set(names) - set(self._about):
            raise SiteError(f"there is no scalar {', '.join(sorted(missing))}; there are {', '.join(self._about)}")
        entries = {key: entry for key, entry in self._entries.items() if key[0] in names}
        return Scalars(entries, {name: about for name, about in self._about.items() if name in names})

    def computed(self) -> Scalars:
        """Return the same scalars with every tensor computed once and kept."""
        return Scalars.of_tensors(self, self._about)

    def topk(
        self, k: int, *, both_ends: bool = False, group: Collection[str] | None = None, absolute: bool = False
    ) -> list[Ranked]:
        """Return the largest values, largest first, and their nodes; one layer is held at a time.

        Equal values are ordered by name, layer and index.

        Args:
            k: how many.
            both_ends: add the k smallest, smallest first.
            group: names to rank together, of the same units; all if None.
            absolute: rank by magnitude; the values keep their signs.

        Raises:
            UsageError: k is no number from 1, or both ``absolute`` and ``both_ends`` are given.
            SiteError: a name is not there.
        """
        if not isinstance(k, int) or isinstance(k, bool) or k < 1:
            raise UsageError(f"topk takes a number from 1, not {shown(k)}")
        if absolute and both_ends:
            raise UsageError("the smallest magnitudes are zeros; leave absolute or both_ends out")
        chosen = self if group is None else self.only(group)
        orders = (torch.abs,) if absolute else (torch.positive, torch.neg) if both_ends else (torch.positive,)
        return ranked(chosen, chosen.about, k, *orders)

    def beside(self, entries: Sequence[Ranked]) -> list[dict[str, float]]:
        """Return for each entry of a ranking the values of all scalars of its node, by name.

        A scalar is of the same node if it has the same basis and the same axes. For a table of the largest by one
        quantity that shows others too, such as attribution beside direct effect.
        """
        return beside(self, self._about, entries)

    def sum(self, keep: Collection[Kept] = ()) -> Tensor:
        """Sum over all names, layers and axes but those to keep; accumulate in float64.

        Args:
            keep: axes that every tensor has; they come in the order of the tensor. ``name`` and ``layer`` come first.

        Raises:
            UsageError: a tensor lacks an axis, or there is nothing to sum.
            ShapeError: a kept axis differs from layer to layer.
        """
        totals: dict[tuple[str | None, int | None], Tensor] = {}
        for (name, layer), tensor in self.items():
            axes = self._about[name].axes
            if missing := set(keep) - {*axes, "name", "layer"}:
                raise UsageError(f"{name} has no axis {', '.join(sorted(missing))}; its axes are {', '.join(axes)}")
            summed = [i for i, axis in enumerate(axes) if axis not in keep]
            part = tensor.double().sum(summed) if summed else tensor.double()
            key = (name if "name" in keep else None, layer if "layer" in keep else None)
            if key in totals and totals[key].shape != part.shape:
                raise ShapeError(f"{name} at layer {layer} is {tuple(part.shape)} on the axes to keep, others are not")
            totals[key] = totals[key] + part if key in totals else part
        if not totals:
            raise UsageError("there is nothing to sum")
        if not {"name", "layer"} & set(keep):
            return next(iter(totals.values()))
        return _stacked(totals, keep)

    def check_complete(self, total: float | Tensor, *, rtol: float = 1e-4, atol: float = 0.0) -> None:
        """Check that the scalars sum to a total: that no node is missing, such as a bias, and none is counted twice.

        Args:
            total: the expected sum.
            rtol: tolerance relative to the larger of the total and the root of the sum of squares.
            atol: absolute tolerance, added to it.

        Raises:
            IncompleteError: they do not; it says by how much.
        """
        expected = float(total)
        actual = squares = 0.0
        for tensor in self.values():
            actual += float(tensor.double().sum())
            squares += float(tensor.double().square().sum())
        residual = expected - actual
        if not abs(residual) <= atol + rtol * max(abs(expected), squares**0.5):
            raise IncompleteError(expected, residual, ", ".join(self._about) or "none")

    def __add__(self, other: Scalars) -> Scalars:
        """Add tensors of the same names and layers."""
        return self._with(other, torch.add)

    def __sub__(self, other: Scalars) -> Scalars:
        """Subtract tensors of the same names and layers."""
        return self._with(other, torch.sub)

    def _with(self, other: Scalars, operation: Callable[[Tensor, Tensor], Tensor]) -> Scalars:
        if not isinstance(other, Scalars):
            return NotImplemented
        if set(self) != set(other):
            odd = ", ".join(f"({name!r}, {layer})" for name, layer in sorted(set(self) ^ set(other), key=str))
            raise ShapeError(f"scalars of different names or layers; only one side has {odd}")
        return Scalars({key: functools.partial(_both, operation, self, other, key) for key in self}, self._about)

    def save(self, path: Path | str) -> None:
        """Write one safetensors file: every tensor, and the description of each name without its featurizer."""
        write_scalars(path, self, self._about)

    @classmethod
    def load(cls, path: Path | str) -> Scalars:
        """Read what `save` wrote. Scalars of features have no basis, since featurizers are saved by themselves.

        Raises:
            ArtefactError: the file holds no scalars, or is damaged.
        """
        return cls.of_tensors(*read_scalars(path))


def _identity(tensor: Tensor) -> Tensor:
    return tensor


def _both(operation: Callable[[Tensor, Tensor], Tensor], one: Scalars, other: Scalars, key: Key) -> Tensor:
    first, second = one[key], other[key]
    if first.shape != second.shape:
        raise ShapeError(f"{key[0]} at layer {key[1]} is {tuple(first.shape)} and {tuple(second.shape)}")
    return operation(first, second)


def _stacked(totals: Mapping[tuple[str | None, int | None], Tensor], keep: Collection[Kept]) -> Tensor:
    """Stack the sums of names and layers, whichever are kept."""
    names, layers = list(dict.fromkeys(n for n, _ in totals)), list(dict.fromkeys(at for _, at in totals))
    if len(totals) != len(names) * len(layers):
        raise ShapeError("the scalars do not all have the same layers; sum the names one by one")
    try:
        stacked = torch.stack([torch.stack([totals[name, layer] for layer in layers]) for name in names])
    except RuntimeError as error:
        raise ShapeError(f"the axes to keep differ from layer to layer or from name to name: {error}") from error
    return stacked.squeeze(1) if "layer" not in keep else stacked if "name" in keep else stacked.squeeze(0)
