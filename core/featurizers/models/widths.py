"""Width of the activations at a site, as far as a model's modules and config tell it."""

from __future__ import annotations

from featurizers.format.sites import Site
from featurizers.models.anatomy import Anatomy
from featurizers.models.attention_parts import PARTS
from featurizers.models.projections import input_width, output_width

_STREAM = ("resid.pre", "resid.mid", "resid.post", "attn.out", "mlp.in", "mlp.out", "embed", "norm.out")


def width_of(anatomy: Anatomy, site: Site) -> int | None:
    """Return the width of the activations at a site; None if it is not known without a run of the model.

    Raises:
        SiteError: the model does not have the site.
    """
    place = anatomy.place(site)
    if place.columns is not None:
        return int(place.columns.stop - place.columns.start) * place.groups
    if site.kind in _STREAM:
        return anatomy.width
    if site.kind in (*PARTS, "mlp.router"):
        return output_width(place.module)
    return input_width(place.module) if place.side == "input" else None
