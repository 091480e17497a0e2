"""`Place`: a tensor in a decoder, named the same in every architecture."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple, TypeAlias

from featurizers import Site
from featurizers.errors import SiteError, UsageError, shown

PlaceAxis: TypeAlias = Literal["token", "key", "head", "d_head", "d_model", "neuron", "vocab", "one"]
"""Axis of a place's tensor. ``token`` is the query's position, ``key`` the position attended to."""

Pass: TypeAlias = Literal["forward", "backward"]
"""Activations, or the gradient of the metric in them."""


class Kind(NamedTuple):
    """Properties of a kind of place.

    Attributes:
        axes: axes of its tensor, for one sequence.
        layered: True if every block has one.
        stage: position in the order of computation within a block.
        text: what the tensor holds.
        site: the kind of `featurizers.Site` that is the same tensor; None if no site is.
    """

    axes: tuple[PlaceAxis, ...]
    layered: bool
    stage: int
    text: str
    site: str | None = None


_STREAM: Final = ("token", "d_model")
_HEADS: Final = ("token", "head", "d_head")
_PAIRS: Final = ("token", "key", "head")
_NEURONS: Final = ("token", "neuron")
_SCALE: Final = ("token", "one")

KINDS: Final[dict[str, Kind]] = {
    "resid.embed": Kind(_STREAM, False, 0, "residual stream entering the first block"),
    "resid.pre": Kind(_STREAM, True, 0, "residual stream entering a block", "resid.pre"),
    "norm.attn.scale": Kind(_SCALE, True, 1, "what the norm before attention divides by"),
    "attn.q": Kind(_HEADS, True, 1, "queries, after rotary positions and query norms, not scaled"),
    "attn.k": Kind(("key", "head", "d_head"), True, 1, "keys, likewise, repeated for each query head"),
    "attn.v": Kind(("key", "head", "d_head"), True, 1, "values, repeated for each query head"),
    "attn.logits": Kind(_PAIRS, True, 1, "scores that softmax takes, -inf where masked"),
    "attn.probs": Kind(_PAIRS, True, 1, "attention probabilities"),
    "attn.z": Kind(_HEADS, True, 1, "attention-weighted values, the input of the output projection", "attn.z"),
    "attn.out": Kind(_STREAM, True, 1, "output of the attention module", "attn.out"),
    "norm.attn.post.scale": Kind(_SCALE, True, 1, "what the norm after attention divides by"),
    "attn.bias": Kind(_STREAM, True, 1, "the part of attn.delta that no head writes"),
    "attn.delta": Kind(_STREAM, True, 1, "what attention adds to the residual stream"),
    "resid.mid": Kind(_STREAM, True, 2, "residual stream between attention and MLP; not in parallel blocks"),
    "norm.mlp.scale": Kind(_SCALE, True, 3, "what the norm before the MLP divides by"),
    "mlp.pre": Kind(_NEURONS, True, 3, "what the activation function takes"),
    "mlp.neurons": Kind(_NEURONS, True, 3, "activations of the neurons, the input of the down projection", "mlp.act"),
    "mlp.out": Kind(_STREAM, True, 3, "output of the MLP module", "mlp.out"),
    "norm.mlp.post.scale": Kind(_SCALE, True, 3, "what the norm after the MLP divides by"),
    "mlp.bias": Kind(_STREAM, True, 3, "the part of mlp.delta that no neuron writes"),
    "mlp.delta": Kind(_STREAM, True, 3, "what the MLP adds to the residual stream"),
    "resid.post": Kind(_STREAM, True, 4, "residual stream leaving a block", "resid.post"),
    "resid.final": Kind(_STREAM, False, 4, "residual stream leaving the last block"),
    "norm.final.scale": Kind(_SCALE, False, 5, "what the final norm divides by"),
    "logits": Kind(("token", "vocab"), False, 6, "logits of the next token"),
}
"""Every kind of place. A tensor is of one sequence and has no batch axis."""


def norm_name(kind: str) -> str:
    """Return the name of the norm whose scale a kind of place is: ``attn.post`` for ``norm.attn.post.scale``."""
    return kind.removeprefix("norm.").removesuffix(".scale")


NORMS: Final = frozenset(norm_name(kind) for kind in KINDS if kind.startswith("norm."))
"""Names of the norms: ``final``, ``attn``, ``mlp``, ``attn.post`` and ``mlp.post``."""

_ORDER: Final = {kind: number for number, kind in enumerate(KINDS)}
_OF_SITES: Final = {known.site: kind for kind, known in KINDS.items() if known.site is not None}


@functools.total_ordering
@dataclass(frozen=True)
class Place:
    """A tensor in a decoder: a kind and, where every block has one, a layer.

    Wider than `featurizers.Site`, which names what an intervention can write: a place may also be a probability, a
    norm's scale or a bias. Sorted by layer, then in the order of `KINDS`.

    Attributes:
        kind: a key of `KINDS`.
        layer: block, from 0; None for a kind that the model has once.

    Raises:
        SiteError: the kind is unknown, or the layer is missing or not allowed.

    Examples:
        >>> Place.parse("mlp.neurons:3")
        Place(kind='mlp.neurons', layer=3)
        >>> str(Place("logits"))
        'logits'
    """

    kind: str
    layer: int | None = None

    def __post_init__(self) -> None:
        """Check the kind and the layer."""
        check_kind(self.kind)
        number = isinstance(self.layer, int) and not isinstance(self.layer, bool) and self.layer >= 0
        if KINDS[self.kind].layered and not number:
            raise SiteError(f"{self.kind} needs a layer from 0, as in '{self.kind}:3', not {shown(self.layer)}")
        if not KINDS[self.kind].layered and self.layer is not None:
            raise SiteError(f"{self.kind} has no layer: the model has it once")

    @property
    def axes(self) -> tuple[PlaceAxis, ...]:
        """Axes of its tensor."""
        return KINDS[self.kind].axes

    @property
    def site(self) -> Site | None:
        """Site of the core that is the same tensor; None if no site is."""
        kind = KINDS[self.kind].site
        return None if kind is None else Site(kind, self.layer)

    def __str__(self) -> str:
        """Return the string that `parse` reads."""
        return self.kind if self.layer is None else f"{self.kind}:{self.layer}"

    def __lt__(self, other: object) -> bool:
        """Compare by layer, then by kind; kinds without a layer come before or after all layers, as computed."""
        if not isinstance(other, Place):
            return NotImplemented
        return self._key < other._key

    @property
    def _key(self) -> tuple[float, int]:
        once = -1.0 if self.kind == "resid.embed" else float("inf")
        return (once if self.layer is None else float(self.layer)), _ORDER[self.kind]

    @classmethod
    def parse(cls, text: str | Place | Site) -> Place:
        """Return the place of a string such as ``mlp.neurons:3``, or of a core site that is a whole tensor.

        Raises:
            SiteError: the string names no place, or the site is a head, a module path or an embedding's output.
        """
        if isinstance(text, Place):
            return text
        if isinstance(text, Site):
            if text.kind not in _OF_SITES or text.head is not None:
                raise SiteError(f"the site {text} is no place of the circuit; such sites are {', '.join(_OF_SITES)}")
            return cls(_OF_SITES[text.kind], text.layer)
        if not isinstance(text, str):
            raise SiteError(f"a place is a Place or a string such as 'mlp.neurons:3', not {shown(text)}")
        kind, colon, layer = text.partition(":")
        if colon and not (layer.isascii() and layer.isdecimal() and len(layer) < 7):
            raise SiteError(f"cannot read the place {shown(text)}; write 'mlp.neurons:3' or 'logits'")
        return cls(kind, int(layer) if colon else None)


def check_kind(kind: str) -> None:
    """Raise `SiteError` unless this is a kind of place."""
    if kind not in KINDS:
        raise SiteError(f"there is no place {shown(kind)}; kinds are {', '.join(KINDS)}")


@dataclass(frozen=True)
class Need:
    """A request to capture one kind of place at some layers.

    Attributes:
        kind: a key of `KINDS`.
        pass_: activations, or their gradient.
        layers: blocks; None for every block that has the kind, and for a kind that the model has once.

    Raises:
        SiteError: the kind is unknown, or layers are given for a kind that has none.
        UsageError: the pass is unknown.
    """

    kind: str
    pass_: Pass = "forward"
    layers: frozenset[int] | None = None

    def __post_init__(self) -> None:
        """Check the kind, the pass and the layers."""
        if self.pass_ not in ("forward", "backward"):
            raise UsageError(f"a pass is 'forward' or 'backward', not {shown(self.pass_)}")
        check_kind(self.kind)
        for layer in self.layers or ():
            Place(self.kind, layer)

    @classmethod
    def of(cls, places: Iterable[Place | str], pass_: Pass = "forward") -> frozenset[Need]:
        """Return the needs of some places.

        Examples:
            >>> Need.of(["logits"])
            frozenset({Need(kind='logits', pass_='forward', layers=None)})
        """
        return frozenset(Need.at(Place.parse(place), pass_) for place in places)

    @classmethod
    def at(cls, place: Place, pass_: Pass = "forward") -> Need:
        """Return the need of one place."""
        return cls(place.kind, pass_, None if place.layer is None else frozenset({place.layer}))
