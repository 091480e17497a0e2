"""Points of interp-engine and our sites: each stands for the same tensor."""

from __future__ import annotations

from typing import Final

from featurizers import Site
from featurizers.errors import SiteError, shown
from interp_engine.address import Address, AddressError, parse_address
from interp_engine.points import point_spec

POINTS: Final = {
    "embed": "embeddings",
    "resid.pre": "resid_pre",
    "resid.post": "resid_post",
    "attn.out": "attn_out",
    "attn.z": "z",
    "mlp.act": "mlp_act",
    "mlp.out": "mlp_out",
    "norm.out": "final_norm",
}
"""Point of each kind of site that has one."""
_KINDS: Final = {point: kind for kind, point in POINTS.items()}


def site_of(text: str) -> Site | None:
    """Return the site of a point, such as ``resid_post.8`` or ``path.model.layers.8.mlp``; None for other texts.

    Raises:
        SiteError: interp-engine has the point, and no site of ours is the same tensor; or no library has it.
    """
    try:
        address: Address = parse_address(text)
    except AddressError:
        return None
    if address.is_module_path:
        return Site.parse(f"module:{address.name}:output")
    kind, known = _KINDS.get(address.name), point_spec(address.name, n_streams=2) is not None
    if kind is None and not known and address.layer is None:
        return None  # such as "embed"
    if kind is None or address.stream is not None:
        what = "a point of interp-engine for which there is no site" if known else "no point of interp-engine"
        raise SiteError(
            f"{shown(text)} is {what}; there are {', '.join(sorted(_KINDS))}, and 'path.MODULE' for the output of any "
            "module, without streams"
        )
    if (address.layer is None) != (kind in ("embed", "norm.out")):
        form = f"{address.name} alone" if address.layer is not None else f"{address.name}.LAYER"
        raise SiteError(f"{shown(text)} is not the form of this point: write {form}")
    return Site(kind, address.layer)


def point_of(site: Site | str) -> str:
    """Return the point of a site: ``resid_post.8`` for ``resid.post:8``.

    Raises:
        SiteError: interp-engine has no such point, as for a head or a module's input.
    """
    site = Site.parse(site)
    if site.kind == "module" and site.side == "output":
        return str(Address(site.module or ""))
    if site.kind not in POINTS or site.head is not None:
        raise SiteError(
            f"{site} is no point of interp-engine, which has {', '.join(POINTS)} without heads, and outputs of modules"
        )
    return str(Address(POINTS[site.kind], site.layer))
