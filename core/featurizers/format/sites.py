"""Sites: places in a model where activations are read or written, with the same names for every architecture."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Final, Literal, TypeAlias

from featurizers.errors import SiteError, did_you_mean
from featurizers.format.html import html_table

Side: TypeAlias = Literal["input", "output"]

BLOCK_KINDS: Final = {
    "resid.pre": "residual stream entering a block",
    "resid.post": "residual stream leaving a block",
    "attn.out": "output of the attention module",
    "attn.q": "queries of all heads, as their projection returns them: before rotary positions and norms",
    "attn.k": "keys of all heads, likewise",
    "attn.v": "values of all heads, as their projection returns them",
    "attn.z": "attention-weighted values of all heads, the input of the output projection",
    "resid.mid": "residual stream between attention and MLP",
    "mlp.in": "input of the MLP module",
    "mlp.out": "output of the MLP module",
    "mlp.act": "activations of the neurons, the input of the MLP's down projection",
    "mlp.router": "logits by which a mixture of experts chooses the experts of each token",
}
"""Kinds of site that each block has."""

HEAD_KINDS: Final = ("attn.q", "attn.k", "attn.v", "attn.z")
"""Kinds of site that each attention head has. Under grouped queries, heads of keys and values are fewer."""

MODEL_KINDS: Final = {"embed": "output of the token embedding", "norm.out": "output of the final norm"}
"""Kinds of site that a model has only once."""


@dataclass(frozen=True)
class Site:
    """A place in a model, and the model and positions where a featurizer was found there.

    A site is written ``resid.post:8``. ``attn.z:8:3`` is head 3 of layer 8, ``embed`` and ``norm.out`` have no layer,
    and ``module:model.layers.8.mlp:output`` is the output of any module. Layers and heads count from 0.

    The first five fields identify the place. The others record where a featurizer was found; comparisons ignore them.

    Attributes:
        kind: a key of `BLOCK_KINDS` or `MODEL_KINDS`, or ``module``.
        layer: number of the block, for kinds of `BLOCK_KINDS`.
        head: attention head, for kinds of `HEAD_KINDS`.
        module: path of the module, for ``module`` sites.
        side: ``input`` or ``output``, for ``module`` sites.
        position: token positions at which the featurizer was found; -1 is the last token of the prompt.
        model: Hub id of the model.
        model_revision: commit of the model.

    Examples:
        >>> Site.parse("resid.post:8") == Site("resid.post", 8)
        True
        >>> str(Site("attn.z", 8, head=3))
        'attn.z:8:3'
        >>> Site("attn.z", 8, head=3, position=(-1,))
        Site('attn.z:8:3', position=(-1,))
    """

    kind: str
    layer: int | None = None
    head: int | None = None
    module: str | None = None
    side: Side | None = None
    position: tuple[int, ...] | None = None
    model: str | None = None
    model_revision: str | None = None

    def __post_init__(self) -> None:
        """Read a kind that is a whole site, and raise a `SiteError` unless the fields identify one place."""
        if not isinstance(self.kind, str):
            raise SiteError(f"the kind of a site is a string such as 'resid.post', not {self.kind!r}")
        if ":" in self.kind and (self.layer, self.head, self.module, self.side) == (None,) * 4:
            for name, value in zip(
                ("kind", "layer", "head", "module", "side"), Site.parse(self.kind)._place, strict=True
            ):
                object.__setattr__(self, name, value)
        if self.kind != "module" and (self.module is not None or self.side is not None):
            raise SiteError(f"{self.kind!r} takes no module and no side; only the kind 'module' does")
        if self.kind in BLOCK_KINDS:
            wrong = not _is_count(self.layer) or (self.head is not None and self.kind not in HEAD_KINDS)
            if wrong or (self.head is not None and not _is_count(self.head)):
                raise SiteError(
                    f"{self.kind!r} needs a layer from 0; heads, as in 'attn.z:8:3', are of {', '.join(HEAD_KINDS)}"
                )
        elif self.kind in MODEL_KINDS:
            if self.layer is not None or self.head is not None:
                raise SiteError(f"{self.kind!r} has no layer and no head")
        elif self.kind == "module":
            if self.module and not self.module.isprintable():
                raise SiteError(f"the path of a module must be printable, not {self.module!r}")
            numbered = self.layer is not None or self.head is not None
            if numbered or not self.module or self.side not in ("input", "output"):
                raise SiteError("a module site is written 'module:PATH:input' or 'module:PATH:output'")
        else:
            known = [*BLOCK_KINDS, *MODEL_KINDS, "module"]
            near = did_you_mean(self.kind, known, f"The kinds are {', '.join(known)}.")
            raise SiteError(f"unknown kind of site {self.kind!r}. {near}")

    def __eq__(self, other: object) -> bool:
        """Return True for the same place, whatever model and positions are recorded."""
        return isinstance(other, Site) and self._place == other._place

    def __hash__(self) -> int:
        """Return a hash that is consistent with equality."""
        return hash(self._place)

    @property
    def _place(self) -> tuple[object, ...]:
        return self.kind, self.layer, self.head, self.module, self.side

    def __repr__(self) -> str:
        """Return an expression that makes the site, without the fields that are None."""
        recorded = {name: getattr(self, name) for name in ("position", "model", "model_revision")}
        more = [f"{name}={value!r}" for name, value in recorded.items() if value is not None]
        return f"Site({', '.join([repr(str(self)), *more])})"

    def _repr_html_(self) -> str:
        """Return a small table, which notebooks show."""
        meaning = {**BLOCK_KINDS, **MODEL_KINDS}.get(self.kind)
        tokens = None if self.position is None else ", ".join(map(str, self.position))
        model = self.model and " at ".join(filter(None, (self.model, self.model_revision)))
        return html_table(f"Site {self}", {"what it is": meaning, "tokens": tokens, "model": model})

    def __str__(self) -> str:
        """Return the form that `parse` reads."""
        if self.kind == "module":
            return f"module:{self.module}:{self.side}"
        return ":".join(str(part) for part in (self.kind, self.layer, self.head) if part is not None)

    @classmethod
    def parse(cls, text: str | Site | None) -> Site:
        """Return the site that a string such as ``resid.post:8`` names; a `Site` is returned unchanged.

        Raises:
            SiteError: the string does not name a site, or there is None, as of a featurizer without a site.
        """
        if isinstance(text, Site):
            return text
        if text is None:
            raise SiteError(
                "the site is None: a featurizer that was made or fitted does not say where it belongs until it is "
                "told; set f.site = 'resid.post:8', or name the site itself"
            )
        if not isinstance(text, str):
            raise SiteError(f"a site is a Site or a string such as 'resid.post:8', not {text!r}")
        return _parsed(text) if len(text) < _LONG else _parsed.__wrapped__(text)

    def at(
        self,
        *,
        position: tuple[int, ...] | None = None,
        model: str | None = None,
        model_revision: str | None = None,
    ) -> Site:
        """Return a copy that records where a featurizer was found; omitted fields keep their values."""
        return replace(
            self,
            position=self.position if position is None else position,
            model=self.model if model is None else model,
            model_revision=self.model_revision if model_revision is None else model_revision,
        )


@dataclass(frozen=True)
class Blocks:
    """Paths of a model's blocks and their parts, which a plugin's ``featurizers_anatomy`` returns.

    Attributes:
        decoder: path of the module that owns the blocks and is called with the attention mask.
        layers: path of the `nn.ModuleList` of blocks.
        attention: path of the attention module within a block, None if blocks have no attention.
        mlp: path of the MLP module within a block, None if blocks have no MLP.
        out_projection: path of the attention's output projection within a block.
        down_projection: path of the MLP's down projection within a block.
        stream_reader: path within a block of the module whose input is the stream as it enters the block: the norm
            before attention, or attention without one; None if it is not known.
        attention_added: path within a block of the module whose output is what attention adds to the stream.
        middle_reader: path within a block of the module whose input is the stream after attention: the norm before the
            MLP, or the MLP without one; None if it is not known, or there is no such place.
        router: path within a block of the module that chooses between experts: it returns logits, weights of the chosen
            experts, and their indices; None if there are no experts.
        experts: path within a block of the module that takes these weights and indices.
    """

    decoder: str
    layers: str
    attention: str | None = None
    mlp: str | None = None
    out_projection: str | None = None
    down_projection: str | None = None
    stream_reader: str | None = None
    attention_added: str | None = None
    middle_reader: str | None = None
    router: str | None = None
    experts: str | None = None


_LONG: Final = 100
"""Characters of a text that is not kept after it was read."""


@functools.lru_cache(maxsize=1024)
def _parsed(text: str) -> Site:
    """Return the site of a text; see `Site.parse`."""
    kind, colon, rest = text.partition(":")
    if kind == "module":
        module, _, side = rest.rpartition(":")
        return Site("module", module=module, side=side)  # type: ignore[arg-type]  # __post_init__ checks it
    numbers = rest.split(":") if colon else []
    if len(numbers) > 2 or not all(number.isascii() and number.isdecimal() for number in numbers):
        raise SiteError(f"cannot read the site {text!r}; write 'resid.post:8', 'attn.z:8:3' or 'embed'")
    layer, head = [*map(int, numbers), None, None][:2]
    return Site(kind, layer, head)


def _is_count(number: object) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number >= 0
