"""Where in a decoder a site is: in which block, and whether tokens still meet after it in that block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

import torch
from featurizers import Anatomy, Site
from featurizers.models import Place
from torch import Tensor

from featurizers_patching.engine.scope import NotPackableError

BEFORE_BLOCKS: Final = -1
"""Block of a `Spot` at the token embedding."""

Part: TypeAlias = Literal["attn.out", "mlp.out"]
_AFTER_KEYS: Final[dict[str, Part | None]] = {
    "attn.q": "attn.out",
    "resid.mid": None,
    "resid.post": None,
    "attn.z": "attn.out",
    "attn.out": "attn.out",
    "mlp.in": "mlp.out",
    "mlp.router": "mlp.out",
    "mlp.act": "mlp.out",
    "mlp.out": "mlp.out",
}
"""Sites whose edits reach no other token in their block, and the part of it that they are inside of."""
_KEYS: Final = ("attn.k", "attn.v")


@dataclass(frozen=True)
class Spot:
    """A site in a decoder.

    Attributes:
        site: its name.
        place: its module.
        block: number of the block that it is in; `BEFORE_BLOCKS`, or the number of blocks for the final norm.
        mixes: whether later tokens attend to it in the block, so that an edit of one token reaches them there.
        part: output of the module that it is inside of, or that it is; None for the residual stream.
        reads: whether its edits change nothing and only read: no module is computed for their sake that is frozen.
    """

    site: Site
    place: Place
    block: int
    mixes: bool
    part: Part | None = None
    reads: bool = False


def spot_of(anatomy: Anatomy, site: Site | str) -> Spot:
    """Return where a site is.

    Raises:
        SiteError: the model does not have the site.
        NotPackableError: it is a module whose inputs cannot be computed for some tokens alone.
    """
    site = Site.parse(site)
    place = anatomy.place(site)
    if site.kind == "embed":
        return Spot(site, place, BEFORE_BLOCKS, mixes=True)
    if site.kind == "norm.out":
        return Spot(site, place, anatomy.n_layers, mixes=False)
    if site.layer is not None:
        part = "attn.out" if site.kind in _KEYS else _AFTER_KEYS.get(site.kind)
        return Spot(site, place, site.layer, site.kind not in _AFTER_KEYS, part)
    return _of_module(anatomy, site, place)


def _of_module(anatomy: Anatomy, site: Site, place: Place) -> Spot:
    prefix = f"{anatomy.blocks.layers}."
    number, _, path = place.path.removeprefix(prefix).partition(".")
    if not place.path.startswith(prefix) or not number.isdecimal():
        raise NotPackableError(f"{site} is a module outside the blocks")
    block = int(number)
    parts = anatomy.parts(block)
    if not path:
        return Spot(site, place, block, mixes=site.side == "input")
    if _inside(path, parts.mlp):
        return Spot(site, place, block, mixes=False, part="mlp.out")
    in_attention = _inside(path, parts.attention)
    after = path == parts.out_projection or (path == parts.attention and site.side == "output")
    # any other module is taken to be before attention: later tokens are then computed too, which is right everywhere
    return Spot(site, place, block, mixes=not after, part="attn.out" if in_attention else None)


def _inside(path: str, part: str | None) -> bool:
    return part is not None and (path == part or path.startswith(f"{part}."))


def own_columns(place: Place, whole: Tensor) -> Tensor:
    """Return the columns of a place, given the activations ``(rows, d)`` of its module."""
    if place.columns is None:
        return whole
    grouped: Tensor = whole.reshape(len(whole), place.groups, -1)[..., place.columns]
    return grouped.flatten(-2)


def with_columns(place: Place, whole: Tensor, new: Tensor) -> Tensor:
    """Return activations ``(rows, d)`` of a place's module with ``new`` in the columns of the place."""
    if place.columns is None:
        return new
    whole, new = (x.reshape(len(whole), place.groups, -1) for x in (whole, new))
    start, stop = place.columns.start, place.columns.stop
    return torch.cat([whole[..., :start], new, whole[..., stop:]], dim=-1).flatten(-2)
