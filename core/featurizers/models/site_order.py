"""Order in which a model computes sites, to tell whether a map reads before it writes."""

from __future__ import annotations

import math
from typing import Any

from featurizers.errors import UsageError
from featurizers.features.site_map import SiteMap
from featurizers.format.sites import Site

_WITHIN_BLOCK = {
    "resid.pre": 0,
    "attn.q": 1,
    "attn.k": 1,
    "attn.v": 1,
    "attn.z": 2,
    "attn.out": 3,
    "resid.mid": 4,
    "mlp.in": 5,
    "mlp.router": 6,
    "mlp.act": 7,
    "mlp.out": 8,
    "resid.post": 9,
}


def order(site: Site) -> tuple[float, int] | None:
    """Return a key that sorts sites in the order in which a model computes them; None for a module's path."""
    if site.kind == "module":
        return None
    if site.layer is None:
        return (-1, 0) if site.kind == "embed" else (math.inf, 0)
    return site.layer, _WITHIN_BLOCK[site.kind]


def late_groups(site_map: SiteMap[Any]) -> dict[str, list[str]]:
    """Return the groups that are read after a site that they write, each with these writes; empty if none is.

    Sites given by the path of a module are passed over: only a run of the model tells their order.
    """
    late: dict[str, list[str]] = {}
    for group, write in sorted(site_map.decoders):
        written = order(site_map.writes[write])
        reads = [order(site_map.reads[read]) for read in site_map.groups[group].reads]
        if written is not None and any(read is not None and read > written for read in reads):
            late.setdefault(group, []).append(write)
    return late


def check_order(site_map: SiteMap[Any]) -> None:
    """Raise UsageError if a group is read after a site that it writes, so that one pass cannot edit it."""
    if late := late_groups(site_map):
        group, (write, *_) = next(iter(late.items()))
        read = site_map.groups[group].reads[-1]
        raise UsageError(
            f"{site_map.id!r}: the features of {group!r} are written at {site_map.writes[write]} and read up to "
            f"{site_map.reads[read]}, which comes later; take them from a pass before: later='frozen'"
        )
