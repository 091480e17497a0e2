"""`Deriver`: a derived scalar as a function of what was captured, one layer at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, final

import torch
from featurizers.errors import SiteError, UsageError
from torch import Tensor

from featurizers_derived_scalars.activations import RawActivations
from featurizers_derived_scalars.axes import Axis
from featurizers_derived_scalars.places import Need
from featurizers_derived_scalars.sources import DerivedSource, ScalarSource, bind

if TYPE_CHECKING:
    from featurizers import Featurizer

    from featurizers_derived_scalars.bases import Basis
    from featurizers_derived_scalars.circuit import Circuit
    from featurizers_derived_scalars.results import Scalars
    from featurizers_derived_scalars.reverse import Reverse


@dataclass(frozen=True)
class Context:
    """Where a deriver's function is called.

    Attributes:
        raw: what was captured of the sequence.
        layer: of the result; None for what the model has once.
    """

    raw: RawActivations
    layer: int | None

    @property
    def circuit(self) -> Circuit:
        """The circuit of the model."""
        return self.raw.circuit


@final
@dataclass(frozen=True, eq=False)
class Deriver:
    """A derived scalar: some sources, and the function that makes one tensor of theirs, layer by layer.

    It describes a computation and holds no activations. `derive` computes nothing yet: its `Scalars` compute a layer
    when it is looked up, and what was captured is never changed.

    The layers of the result are those for which every source is there, and which ``within`` lets through: direct
    effects are absent, not zero, for what is computed at or after the place that they are effects on.

    Attributes:
        name: of the scalar, such as ``write_to``.
        sources: what ``fn`` takes, in order.
        axes: what the axes of the result count.
        fn: from a context and the sources' tensors to the tensor of one layer, of the axes ``axes``.
        params: what it was made with, for people and for saved results.
        basis: of the nodes whose scalars these are; None if they are of no nodes.
        within: whether there is a result at a layer of a model; None for at all.
        reverse: what makes the featurizer that this scalar is; None if it is none.

    Example:
        >>> from featurizers_derived_scalars.sources import RawSource
        >>> double = Deriver("double", (RawSource("mlp.neurons"),), ("token", "neuron"), lambda context, x: 2 * x)
        >>> double.map(lambda context, x: x.abs(), name="size").name
        'size'
    """

    name: str
    sources: tuple[ScalarSource, ...]
    axes: tuple[Axis, ...]
    fn: Callable[..., Tensor]
    params: Mapping[str, Any] = field(default_factory=dict)
    basis: Basis | None = None
    within: Callable[[Circuit, int | None], bool] | None = None
    reverse: Reverse | None = None

    def __post_init__(self) -> None:
        """Refuse a deriver of nothing."""
        if not self.sources:
            raise UsageError(f"the scalar {self.name!r} has no sources")

    def needs(self, circuit: Circuit, layers: Iterable[int | None] | None = None) -> frozenset[Need]:
        """What must be captured.

        Args:
            circuit: of the model.
            layers: of the result; None for all.

        Raises:
            SiteError: the model lacks a place; the message says which and why.
        """
        wanted = None if layers is None else frozenset(layers)
        if wanted is None and self.within is not None:
            wanted = frozenset(layer for layer in (None, *range(circuit.n_layers)) if self.within(circuit, layer))
        needs = frozenset[Need]().union(*(source.needs(circuit, wanted or None) for source in self.sources))
        # with no layer to derive, asking has said what the model lacks, if it lacks anything; else nothing is needed
        return frozenset() if wanted == frozenset() else needs

    def available(self, raw: RawActivations) -> frozenset[int | None] | None:
        """The layers of the result; None if the sources do not say, since none of them has a layer of its own."""
        said = [layers for source in self.sources if (layers := source.layers(raw)) is not None]
        if not said:
            return None
        found = frozenset.intersection(*said)
        return found if self.within is None else frozenset(at for at in found if self.within(raw.circuit, at))

    def tensor(self, raw: RawActivations, layer: int | None = None) -> Tensor:
        """The result at one layer, without a graph."""
        return self.bound(raw)(layer)

    def bound(self, raw: RawActivations) -> Callable[[int | None], Tensor]:
        """From a layer to its tensor, without a graph; what serves every layer is computed once."""
        sources = [bind(source, raw) for source in self.sources]

        def at(layer: int | None) -> Tensor:
            with torch.no_grad():
                return self.fn(Context(raw, layer), *(source(layer) for source in sources))

        return at

    def derive(self, raw: RawActivations, layers: Iterable[int | None] | None = None) -> Scalars:
        """The scalars of a sequence, each layer computed when it is looked up.

        Args:
            raw: what was captured of it.
            layers: which; all that there are if None.

        Raises:
            SiteError: what it needs was not captured, or a layer has no result.
        """
        from featurizers_derived_scalars.results import Scalars

        return Scalars.of(self, raw, self._chosen(raw, layers))

    def _chosen(self, raw: RawActivations, layers: Iterable[int | None] | None) -> list[int | None]:
        found = self.available(raw)
        found = frozenset({None}) if found is None else found
        wanted = found if layers is None else frozenset(layers)
        if missing := wanted - found:
            for layer in missing:  # the model may lack the place, which says more than that it was not captured
                self.needs(raw.circuit, [layer])
            there = ", ".join(str(layer) for layer in _sorted(found)) or "none"
            gone = ", ".join(str(layer) for layer in _sorted(missing))
            raise SiteError(
                f"{self.name} has no result at layer {gone}: what it needs was not captured there, or it is not "
                f"upstream. Layers there are: {there}"
            )
        if not wanted:
            needs = sorted(f"{need.kind} ({need.pass_})" for need in self.needs(raw.circuit))
            raise SiteError(f"{self.name} has no result at any layer: capture {', '.join(needs)} for it")
        return _sorted(wanted)

    def map(
        self, fn: Callable[[Context, Tensor], Tensor], *, name: str, axes: tuple[Axis, ...] | None = None, **params: Any
    ) -> Deriver:
        """This scalar, with a function applied to its result.

        Args:
            fn: from a context and the result to another tensor.
            name: of the new scalar.
            axes: of the new result; the same as before if None.
            params: that it has beside.
        """
        return dataclasses.replace(
            self,
            name=name,
            sources=(DerivedSource(self),),
            axes=self.axes if axes is None else axes,
            fn=fn,
            params={**self.params, **params},
            reverse=None,
        )

    def combine(
        self,
        other: ScalarSource | Deriver,
        fn: Callable[[Context, Tensor, Tensor], Tensor],
        *,
        name: str,
        axes: tuple[Axis, ...] | None = None,
        **params: Any,
    ) -> Deriver:
        """This scalar, with a function applied to its result and to another's; as `map`."""
        second = DerivedSource(other) if isinstance(other, Deriver) else other
        return dataclasses.replace(
            self,
            name=name,
            sources=(DerivedSource(self), second),
            axes=self.axes if axes is None else axes,
            fn=fn,
            params={**self.params, **params},
            reverse=None,
        )

    def renamed(self, name: str) -> Deriver:
        """The same scalar under another name."""
        return dataclasses.replace(self, name=name)

    def only(self, layers: Iterable[int | None]) -> Deriver:
        """The same scalar at some layers alone; what the others need is not captured for it."""
        kept, within = frozenset(layers), self.within
        return dataclasses.replace(
            self, within=lambda circuit, at: at in kept and (within is None or within(circuit, at))
        )

    def without(self, layers: Iterable[int | None]) -> Deriver:
        """The same scalar at all layers but some."""
        gone, within = frozenset(layers), self.within
        if not gone:
            return self
        return dataclasses.replace(
            self, within=lambda circuit, at: at not in gone and (within is None or within(circuit, at))
        )

    def as_featurizer(
        self, raw: RawActivations, layer: int | None = None, *, token: int | None = None
    ) -> Featurizer[Any]:
        """The featurizer that this scalar is, whose features are the scalar; see `featurizers_derived_scalars.reverse`.

        ``value`` is the basis's own; ``write_norm`` with its sign and ``write_to`` weigh each node by a number
        (`DiagonalFeaturizer`, behind the basis's own featurizer if it has one); ``direction`` is a line
        (`SubspaceFeaturizer`). It has the site of the place, if `featurizers.Site` has one.

        Args:
            raw: of any sequence of the model, with what this scalar needs.
            layer: of the place.
            token: at which the weights are taken, where they are others at each.

        Raises:
            UsageError: this scalar is no map of one place at one token that could be inverted, or it needs a token.
        """
        from featurizers_derived_scalars.reverse import refuse

        if self.reverse is None:
            raise refuse(self.name)
        return self.reverse(raw, layer, token)


def _sorted(layers: Iterable[int | None]) -> list[int | None]:
    return sorted(layers, key=lambda layer: -1 if layer is None else layer)
