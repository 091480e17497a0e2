"""Which sites are added to the residual stream, and so to what the final norm reads."""

from __future__ import annotations

from typing import Any, Final

import featurizers
import torch
from featurizers import Anatomy, Site
from featurizers.errors import FeaturizerError, SiteError
from torch import Tensor

from featurizers_evaluate.runs import Put

TOKENS: Final = 4
TOLERANCE: Final = 0.02
"""Largest part of a change of the stream that is not along the change at the site; half precision rounds."""
STREAM: Final = ("resid.pre", "resid.mid", "resid.post")


def why_not_in_stream(model: object, site: Site, anatomy: Anatomy) -> str:
    """Return why what is added at a site is not added to the residual stream; empty if it is.

    Places of the stream itself are known. Another site is tried: activations of a short prompt are changed by chance
    there, and the stream after the first block that changes must change by the same, times one positive number.
    """
    if site.kind in STREAM:
        return ""
    try:
        return _tried(model, site, anatomy)
    except FeaturizerError as error:
        return f"it could not be tried whether {site} is added to the stream: {error}"


@torch.no_grad()
def _tried(model: object, site: Site, anatomy: Anatomy) -> str:
    wrong = f"{site} is not added to the residual stream"
    ids = torch.arange(1, TOKENS + 1, device=next(anatomy.model.parameters()).device)[None]
    blocks = [Site("resid.post", layer) for layer in range(anatomy.n_layers)]
    clean = featurizers.collect(model, {"input_ids": ids}, [site, *blocks])
    x = clean[site]
    if x.shape != clean[blocks[0]].shape:
        return f"{wrong}: its activations have another width"
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x.device, x.dtype)
    change = noise / noise.norm(dim=-1, keepdim=True) * clean[blocks[0]].norm(dim=-1, keepdim=True).clamp(min=1e-3)
    after = _with(model, ids, site, x + change, blocks)
    layer = next((n for n, block in enumerate(blocks) if not torch.equal(after[block], clean[block])), None)
    if layer is None:
        return f"{wrong}: no block changes with it"
    change = (x + change) - x  # as it was rounded
    if _is_along(after[blocks[layer]] - clean[blocks[layer]], change):
        return ""
    for place in (Site("resid.mid", layer), Site("resid.pre", layer)):
        try:
            anatomy.place(place)
            before = featurizers.collect(model, {"input_ids": ids}, [place])[place]
            edited = _with(model, ids, site, x + change, [place])[place]
        except SiteError:
            continue
        if _is_along(edited - before, change):
            return ""
    return wrong


def _with(model: object, ids: Tensor, site: Site, x: Tensor, read: list[Site]) -> dict[Site, Tensor]:
    """Return activations at some sites of a run with others at one site."""
    identity: Any = featurizers.create("identity")
    operations: dict[Any, Any] = {site: [Put(identity, source=x)]}
    for place in read:
        operations.setdefault(place, []).append(featurizers.Collect(identity))
    backend = Anatomy(model)
    with featurizers.intervene(model, operations) as collected:
        backend.model(**backend.arguments({"input_ids": ids}))
    return {place: collected[place] for place in read}


def _is_along(found: Tensor, change: Tensor) -> bool:
    """Return whether a change is a positive multiple of another, the same one for all tokens."""
    found, change = found.double(), change.double()
    factor = (found * change).sum() / change.square().sum()
    return bool(factor > 0) and bool((found - factor * change).norm() <= TOLERANCE * found.norm())
