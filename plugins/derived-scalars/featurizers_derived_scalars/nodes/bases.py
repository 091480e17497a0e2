"""`Basis`: the nodes that a quantity is measured of, as units of a place or as features of a featurizer there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Final, Literal, Self, TypeAlias, final, get_args

from featurizers import Featurizer, Site
from featurizers.errors import SiteError, UsageError, shown

from featurizers_derived_scalars.circuit import KINDS, Place
from featurizers_derived_scalars.circuit.places import check_kind
from featurizers_derived_scalars.nodes.axes import NodeAxis

Part: TypeAlias = Literal["features", "error", "bias"]
"""Part of an activation: what its features decode to, the error term, or the rest, which is the decoder's bias (and,
of a decoder that is not linear, the remainder beside its linear part)."""

Via: TypeAlias = Literal["q", "k", "v"]

HEADS: Final = "attn.probs"
"""Kind of place whose nodes are heads at pairs of tokens."""

WRITERS: Final = ("resid.embed", "resid.pre", "resid.mid", "resid.post", "resid.final", HEADS, "attn.z", "attn.out",
                  "attn.delta", "attn.bias", "mlp.neurons", "mlp.out", "mlp.delta", "mlp.bias")  # fmt: skip
"""Kinds whose activations write to the residual stream, or are it."""

VECTORS: Final = tuple(kind for kind, known in KINDS.items() if known.axes[-1] in ("d_model", "neuron", "d_head"))
"""Kinds that a featurizer can be the basis of."""


@final
@dataclass(frozen=True, eq=False)
class Basis:
    """Nodes of a quantity.

    Without a featurizer the nodes are the units of the place: neurons, residual channels, channels of heads, and for
    ``attn.probs`` the heads at each pair of tokens. With a featurizer they are its features, its error term or its
    decoder's bias. In a kind with heads a featurizer takes all heads side by side.

    Attributes:
        kind: kind of place, a key of `KINDS`.
        featurizer: a featurizer for every layer, or a mapping from some layers to featurizers; None for units.
        part: which part of the activations, if there is a featurizer.
        via: which input of attention an edge into or out of heads goes through.
        whole: take the last axis as one node, with quantities of the whole vector: a head's output, a layer's output,
            the residual stream, or all that the features write together.

    Raises:
        SiteError: the kind is unknown, or cannot have a featurizer.
        UsageError: the other attributes do not fit the kind.

    Examples:
        >>> Basis("attn.probs").axes
        ('token', 'key', 'head')
        >>> Basis("attn.z", whole=True).axes
        ('token', 'head')
        >>> import featurizers
        >>> sae = featurizers.create("subspace", d_in=8, n_features=2)
        >>> Basis("mlp.delta", {0: sae}).axes, Basis("mlp.delta", sae, part="error").axes
        (('token', 'feature'), ('token', 'd_model'))
    """

    kind: str
    featurizer: Featurizer[Any] | Mapping[int, Featurizer[Any]] | None = None
    part: Part = "features"
    via: Via | None = None
    whole: bool = False

    def __post_init__(self) -> None:
        """Check that the attributes fit the kind."""
        check_kind(self.kind)
        if isinstance(self.featurizer, Mapping):
            object.__setattr__(self, "featurizer", MappingProxyType(dict(self.featurizer)))
        if self.featurizer is not None and self.kind not in VECTORS:
            raise SiteError(f"{self.kind} holds no vectors for a featurizer; kinds that do are {', '.join(VECTORS)}")
        if not all(isinstance(each, Featurizer) for each in self.featurizers):
            raise UsageError(
                f"the featurizer of a basis is a Featurizer, or a mapping from layers to featurizers, not "
                f"{shown(self.featurizer)}"
            )
        if self.part not in get_args(Part):
            raise UsageError(f"a part is 'features', 'error' or 'bias', not {shown(self.part)}")
        if self.part != "features" and self.featurizer is None:
            raise UsageError(f"the part {self.part!r} is that of a featurizer, and {self.kind} was given none")
        if self.via not in (None, "q", "k", "v"):
            raise UsageError(f"via is 'q', 'k' or 'v', not {shown(self.via)}")
        if self.via is not None and self.kind not in (HEADS, "attn.logits"):
            raise UsageError(f"via belongs to attn.probs and attn.logits, not to {self.kind}")
        if self.whole and self.kind not in VECTORS:
            raise UsageError(f"{self.kind} holds no vectors that could be one node; leave whole out")

    @classmethod
    def of(cls, featurizer: Featurizer[Any], *, part: Part = "features", whole: bool = False) -> Self:
        """Return the basis of a featurizer at its own site, which says the kind and the layer.

        Raises:
            UsageError: it has no site.
            SiteError: its site is no place of the circuit.
        """
        if not isinstance(featurizer.site, Site):
            raise UsageError(
                f"{featurizer.id!r} does not say where it belongs; give Basis(kind, {{layer: featurizer}})"
            )
        place = Place.parse(featurizer.site)
        return cls(place.kind, featurizer if place.layer is None else {place.layer: featurizer}, part, whole=whole)

    @property
    def featurizers(self) -> tuple[Featurizer[Any], ...]:
        """Featurizers of all layers; empty without a featurizer."""
        if isinstance(self.featurizer, Mapping):
            return tuple(self.featurizer.values())
        return () if self.featurizer is None else (self.featurizer,)

    @property
    def is_features(self) -> bool:
        """True if the nodes are features of a featurizer."""
        return self.featurizer is not None and self.part == "features"

    @property
    def axes(self) -> tuple[NodeAxis, ...]:
        """Axes of a scalar of these nodes."""
        axes: tuple[NodeAxis, ...] = KINDS[self.kind].axes
        if self.whole:
            with_heads = len(axes) == 3 and not self.is_features
            return axes[:-1] if with_heads else (axes[0], "one")
        return self.entries

    @property
    def entries(self) -> tuple[NodeAxis, ...]:
        """Axes of the entries of these nodes: the axes of the basis that is not taken whole."""
        axes = KINDS[self.kind].axes
        return (axes[0], "feature") if self.is_features else axes

    @property
    def parts(self) -> tuple[Basis, ...]:
        """Bases that together are the activations: features, error and bias; only itself without a featurizer."""
        if self.featurizer is None:
            return (self,)
        return tuple(replace(self, part=part) for part in get_args(Part))

    def featurizer_at(self, layer: int | None) -> Featurizer[Any] | None:
        """Return the featurizer of a layer; None for the units of the place.

        Raises:
            UsageError: other layers have a featurizer, and this layer has none.
        """
        if not isinstance(self.featurizer, Mapping):
            return self.featurizer
        if layer is None or layer not in self.featurizer:
            there = ", ".join(map(str, sorted(self.featurizer))) or "none"
            raise UsageError(f"{self} has no featurizer at layer {layer}; layers that have one are {there}")
        return self.featurizer[layer]

    def has(self, layer: int | None) -> bool:
        """Return True if there are nodes at a layer, in a model that has the layer."""
        return not isinstance(self.featurizer, Mapping) or layer in self.featurizer

    def at(self, layer: int | None) -> str:
        """Return the place at a layer and the part, for people."""
        return str(Place(self.kind, layer)) + self._suffix

    def __str__(self) -> str:
        """Return kind and part, for people."""
        return self.kind + self._suffix

    @property
    def _suffix(self) -> str:
        part = "" if self.featurizer is None else f" {self.part}"
        return part + (" whole" if self.whole else "") + ("" if self.via is None else f" via {self.via}")
