"""`Deriver`: a derived scalar as a function of captured activations, one layer at a time."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, final

import torch
from featurizers import Featurizer
from featurizers.errors import SiteError, UsageError
from torch import Tensor

from featurizers_derived_scalars.capturing import RawActivations
from featurizers_derived_scalars.circuit import Circuit, Need
from featurizers_derived_scalars.featurize import Reverse
from featurizers_derived_scalars.featurize.reverse import refuse
from featurizers_derived_scalars.nodes import Basis, NodeAxis
from featurizers_derived_scalars.nodes.dependencies import Within
from featurizers_derived_scalars.quantities.layer_maps import SAME, LayerMap, Layers
from featurizers_derived_scalars.quantities.sources import ScalarSource
from featurizers_derived_scalars.results import Scalar, Scalars
from featurizers_derived_scalars.results.scalar import Key


@dataclass(frozen=True)
class Context:
    """First argument of a deriver's function.

    Attributes:
        raw: captured tensors of the sequence.
        layer: layer of the result; None for a scalar that the model has once.
    """

    raw: RawActivations
    layer: int | None

    @property
    def circuit(self) -> Circuit:
        """Circuit of the model."""
        return self.raw.circuit


@final
@dataclass(frozen=True, eq=False)
class Deriver:
    """A derived scalar: some sources, and the function that makes one tensor of their tensors, layer by layer.

    It describes a computation and holds no activations. `derive` computes nothing yet: its `Scalars` compute a layer
    when it is looked up. Captured tensors are never changed.

    The result has the layers at which every source has a tensor and ``within`` is true: direct effects are absent, not
    zero, for layers that are computed at or after the place that they are effects on.

    Attributes:
        name: name of the scalar, such as ``write_to``.
        sources: sources of the arguments of ``fn``, in order.
        axes: axes of the result.
        fn: from a context and the sources' tensors to the tensor of one layer.
        params: parameters that it was made with, for people and for saved results.
        basis: basis of the nodes that the scalars are of; None if they are not of nodes.
        within: from a circuit and a layer to True if there is a result; None for every layer.
        reverse: makes the featurizer that this scalar is; None if it is no featurizer.

    Examples:
        >>> from featurizers_derived_scalars.quantities import RawSource
        >>> double = Deriver("double", (RawSource("mlp.neurons"),), ("token", "neuron"), lambda context, x: 2 * x)
        >>> double.map(lambda context, x: x.abs(), name="size").name
        'size'
    """

    name: str
    sources: tuple[ScalarSource, ...]
    axes: tuple[NodeAxis, ...]
    fn: Callable[..., Tensor]
    params: Mapping[str, Any] = field(default_factory=dict)
    basis: Basis | None = None
    within: Within | None = None
    reverse: Reverse | None = None

    def __post_init__(self) -> None:
        """Check that there are sources."""
        if not self.sources:
            raise UsageError(f"the scalar {self.name!r} has no sources")

    def needs(self, circuit: Circuit, layers: Iterable[int | None] | None = None) -> frozenset[Need]:
        """Return what must be captured.

        Args:
            circuit: circuit of the model.
            layers: layers of the result; None for all.

        Raises:
            SiteError: the model lacks a place; the message says which and why.
        """
        chosen = None if layers is None else frozenset(layers)
        if chosen is None and self.within is not None:
            chosen = frozenset(layer for layer in (None, *range(circuit.n_layers)) if self.within(circuit, layer))
        # Without a layer nothing is needed; the sources are still asked, for their error if the model lacks a place.
        needs = frozenset[Need]().union(*(source.needs(circuit, chosen or None) for source in self.sources))
        return frozenset() if chosen == frozenset() else needs

    def available(self, raw: RawActivations) -> Layers | None:
        """Return the layers of the result; None if no source has layers of its own."""
        of_sources = [layers for source in self.sources if (layers := source.layers(raw)) is not None]
        if not of_sources:
            return None
        common = frozenset.intersection(*of_sources)
        return common if self.within is None else frozenset(at for at in common if self.within(raw.circuit, at))

    def tensor(self, raw: RawActivations, layer: int | None = None) -> Tensor:
        """Return the result at one layer, without a graph."""
        return self.bound(raw)(layer)

    def bound(self, raw: RawActivations) -> Callable[[int | None], Tensor]:
        """Return a function from a layer to its tensor, without a graph; constant sources are computed once."""
        sources = [_bind(source, raw) for source in self.sources]

        def at(layer: int | None) -> Tensor:
            with torch.no_grad():
                return self.fn(Context(raw, layer), *(source(layer) for source in sources))

        return at

    def derive(self, raw: RawActivations, layers: Iterable[int | None] | None = None) -> Scalars:
        """Return the scalars of a sequence, each layer computed when it is looked up.

        Args:
            raw: captured tensors of the sequence.
            layers: layers of the result; None for all that there are.

        Raises:
            SiteError: what it needs was not captured, or a layer has no result.
        """
        chosen, bound = self._chosen(raw, layers), self.bound(raw)
        entries: dict[Key, Callable[[], Tensor]] = {
            (self.name, layer): functools.partial(bound, layer) for layer in chosen
        }
        params = {name: str(value) for name, value in self.params.items()}
        return Scalars(entries, {self.name: Scalar(self.axes, self.basis, params)})

    def _chosen(self, raw: RawActivations, layers: Iterable[int | None] | None) -> list[int | None]:
        available = self.available(raw)
        available = frozenset({None}) if available is None else available
        chosen = available if layers is None else frozenset(layers)
        if missing := chosen - available:
            for layer in missing:  # if the model lacks the place, that error says more than that it was not captured
                self.needs(raw.circuit, [layer])
            there = ", ".join(str(layer) for layer in _sorted(available)) or "none"
            gone = ", ".join(str(layer) for layer in _sorted(missing))
            raise SiteError(
                f"{self.name} has no result at layer {gone}: what it needs was not captured there, or it is not "
                f"upstream. Layers there are: {there}"
            )
        if not chosen:
            needs = sorted(f"{need.kind} ({need.pass_})" for need in self.needs(raw.circuit))
            raise SiteError(f"{self.name} has no result at any layer: capture {', '.join(needs)} for it")
        return _sorted(chosen)

    def map(
        self,
        fn: Callable[[Context, Tensor], Tensor],
        *,
        name: str,
        axes: tuple[NodeAxis, ...] | None = None,
        **params: Any,
    ) -> Deriver:
        """Return this scalar with a function applied to its result.

        Args:
            fn: from a context and the result to another tensor.
            name: name of the new scalar.
            axes: axes of the new result; None if they are the same.
            params: further parameters.
        """
        return self._with((DerivedSource(self),), fn, name, axes, params)

    def combine(
        self,
        other: ScalarSource | Deriver,
        fn: Callable[[Context, Tensor, Tensor], Tensor],
        *,
        name: str,
        axes: tuple[NodeAxis, ...] | None = None,
        **params: Any,
    ) -> Deriver:
        """Return this scalar with a function applied to its result and to another's; arguments as in `map`."""
        second = DerivedSource(other) if isinstance(other, Deriver) else other
        return self._with((DerivedSource(self), second), fn, name, axes, params)

    def _with(
        self,
        sources: tuple[ScalarSource, ...],
        fn: Callable[..., Tensor],
        name: str,
        axes: tuple[NodeAxis, ...] | None,
        params: Mapping[str, Any],
    ) -> Deriver:
        axes, params = self.axes if axes is None else axes, {**self.params, **params}
        return dataclasses.replace(self, name=name, sources=sources, axes=axes, fn=fn, params=params, reverse=None)

    def renamed(self, name: str) -> Deriver:
        """Return the same scalar under another name."""
        return dataclasses.replace(self, name=name)

    def only(self, layers: Iterable[int | None]) -> Deriver:
        """Return the same scalar at some layers alone; what other layers need is not captured for it."""
        kept = frozenset(layers)
        return self._where(lambda layer: layer in kept)

    def without(self, layers: Iterable[int | None]) -> Deriver:
        """Return the same scalar at all layers but some."""
        gone = frozenset(layers)
        return self._where(lambda layer: layer not in gone) if gone else self

    def _where(self, chosen: Callable[[int | None], bool]) -> Deriver:
        within = self.within
        return dataclasses.replace(
            self, within=lambda circuit, at: chosen(at) and (within is None or within(circuit, at))
        )

    def as_featurizer(
        self, raw: RawActivations, layer: int | None = None, *, token: int | None = None
    ) -> Featurizer[Any]:
        """Return the featurizer that this scalar is, whose features are the scalar.

        ``value`` is the basis's own featurizer; ``write_norm`` with its sign and ``write_to`` multiply each node by a
        number (`DiagonalFeaturizer`, behind the basis's own featurizer if it has one); ``direction`` is a line
        (`SubspaceFeaturizer`). It has the site of the place, if `featurizers.Site` has one.

        Args:
            raw: captured tensors of any sequence of the model, with what this scalar needs.
            layer: layer of the place.
            token: token at which the numbers are taken, where they differ from token to token.

        Raises:
            UsageError: this scalar is no invertible map of one place at one token, or it needs a token.
        """
        if self.reverse is None:
            raise refuse(self.name)
        return self.reverse(raw, layer, token)


@final
@dataclass(frozen=True)
class DerivedSource(ScalarSource):
    """Result of another deriver.

    Attributes:
        deriver: the other deriver.
        at: from the layer of the result to the layer of the other deriver's result.
    """

    deriver: Deriver
    at: LayerMap = SAME

    @property
    def axes(self) -> tuple[NodeAxis, ...]:
        """Axes of the deriver."""
        return self.deriver.axes

    @property
    def constant(self) -> bool:
        """True if the layer map always gives the same layer."""
        return self.at.constant

    def needs(self, circuit: Circuit, layers: Layers | None = None) -> frozenset[Need]:
        """Return what the deriver needs."""
        return self.deriver.needs(circuit, self.at.sources(layers))

    def layers(self, raw: RawActivations) -> Layers | None:
        """Return the layers of the result for which the deriver has a tensor."""
        available = self.deriver.available(raw)
        return available if available is None else self.at.results(available)

    def derive(self, raw: RawActivations, layer: int | None) -> Tensor:
        """Return the deriver's tensor."""
        return self.deriver.tensor(raw, self.at.source(layer))


def _bind(source: ScalarSource, raw: RawActivations) -> Callable[[int | None], Tensor]:
    """Return a function from a layer to a source's tensor; a constant one is computed once."""
    if source.constant:
        once = functools.cache(functools.partial(source.derive, raw, None))
        return lambda _: once()
    if isinstance(source, DerivedSource):
        at, inner = source.at, source.deriver.bound(raw)
        return lambda layer: inner(at.source(layer))
    return functools.partial(source.derive, raw)


def _sorted(layers: Iterable[int | None]) -> list[int | None]:
    return sorted(layers, key=lambda layer: -1 if layer is None else layer)
