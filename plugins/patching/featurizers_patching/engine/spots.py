"""Where in a decoder a site is: in which block, and whether tokens still meet after it in that block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

from featurizers import Anatomy, Site
from featurizers.models import Place

from featurizers_patching.engine.scope import NotPackableError

BEFORE_BLOCKS: Final = -1
"""Block of a `Spot` at the token embedding."""

Part: TypeAlias = Literal["attn.out", "mlp.out"]
_AFTER_ATTENTION: Final[dict[str, Part | None]] = {
    "resid.mid": None,
    "resid.post": None,
    "attn.z": "attn.out",
    "attn.out": "attn.out",
    "mlp.in": "mlp.out",
    "mlp.act": "mlp.out",
    "mlp.out": "mlp.out",
}


@dataclass(frozen=True)
class Spot:
    """A site in a decoder.

    Attributes:
        site: its name.
        place: its module.
        block: number of the block that it is in; `BEFORE_BLOCKS`, or the number of blocks for the final norm.
        mixes: whether the block's attention comes after it, so that an edit of one token reaches later tokens within
            the block.
        part: output of the module that it is inside of, or that it is; None for the residual stream.
    """

    site: Site
    place: Place
    block: int
    mixes: bool
    part: Part | None = None


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
        mixes = site.kind not in _AFTER_ATTENTION
        return Spot(site, place, site.layer, mixes, _AFTER_ATTENTION.get(site.kind))
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
