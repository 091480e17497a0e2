"""Our sites and the hook points of a TransformerBridge, in both directions.

Hooks on a hook point act before those that TransformerLens adds there later, so that `run_with_cache` sees the edit.
"""

from __future__ import annotations

import re
from typing import Any, Final

from featurizers import Site
from featurizers.errors import SiteError, did_you_mean, shown
from featurizers.models import Place
from torch import nn

POINTS: Final = {
    "embed": "embed.hook_out",
    "norm.out": "ln_final.hook_out",
    "resid.pre": "hook_in",
    "resid.mid": "ln2.hook_in",
    "resid.post": "hook_out",
    "attn.out": "attn.hook_out",
    "attn.q": "attn.q.hook_out",
    "attn.k": "attn.k.hook_out",
    "attn.v": "attn.v.hook_out",
    "attn.z": "attn.o.hook_in",
    "mlp.in": "mlp.hook_in",
    "mlp.out": "mlp.hook_out",
    "mlp.act": "mlp.out.hook_in",
}
"""Hook point of each site, within its block if it has a layer."""

ALIASES: Final = {
    "hook_embed": "embed.hook_out",
    "hook_resid_pre": "hook_in",
    "hook_resid_mid": "ln2.hook_in",
    "hook_resid_post": "hook_out",
    "hook_attn_out": "attn.hook_out",
    "attn.hook_q": "attn.q.hook_out",
    "attn.hook_k": "attn.k.hook_out",
    "attn.hook_v": "attn.v.hook_out",
    "attn.hook_z": "attn.o.hook_in",
    "hook_mlp_out": "mlp.hook_out",
    "mlp.hook_post": "mlp.out.hook_in",
}
"""TransformerLens' older names of hook points."""

SANDWICH: Final = {"hook_attn_out": "ln1_post.hook_out", "hook_mlp_out": "ln2_post.hook_out"}
"""What these names mean in blocks with norms after attention and MLP (Gemma 2 and 3): the outputs of these norms."""

_NAME = re.compile(r"(?:blocks\.(\d+)\.)?((?:\w+\.)*hook_\w+)")


def site_named(bridge: nn.Module, text: str) -> Site | None:
    """Return the site that TransformerLens calls by a name; None for a text that cannot be such a name.

    A hook point that is none of our sites becomes a site of the kind ``module``.

    Raises:
        SiteError: the bridge has no such hook point.
    """
    match = _NAME.fullmatch(text)
    if match is None:
        return None
    layer, name = match[1], match[2]
    prefix = "" if layer is None else f"blocks.{layer}."
    sandwich = layer is not None and name in SANDWICH and has_sandwich_norms(bridge, int(layer))
    point = SANDWICH[name] if sandwich else ALIASES.get(name, name)
    for kind, own in POINTS.items():
        if own == point and (layer is None) == (kind in ("embed", "norm.out")):
            return Site(kind, None if layer is None else int(layer))
    if _hook_point(bridge, prefix + point) is None:
        names = [prefix + each for each in (*ALIASES, *POINTS.values())]
        raise SiteError(
            f"{shown(text)}: this {type(bridge).__name__} has no such hook point. "
            f"{did_you_mean(text, names, 'Its hook_dict lists all.')}"
        )
    return Site("module", module=prefix + point, side="output")


def place_of(bridge: nn.Module, site: Site) -> Place | None:
    """Return the hook point of a site; None for a site of the kind ``module``, which names its module itself.

    Raises:
        SiteError: the bridge has no such block, or its block has no such hook point.
    """
    if site.kind == "module":
        return None
    name = POINTS.get(site.kind)
    if name is None:
        raise SiteError(
            f"{site}: TransformerLens has no hook point for {site.kind}; use the model of transformers without a bridge"
        )
    if site.layer is None:
        return _at(bridge, site, name)
    blocks: Any = component(bridge, "blocks")
    if not isinstance(blocks, nn.ModuleList):
        raise SiteError(f"{site}: this {type(bridge).__name__} has no list of blocks; name the module itself")
    if site.layer >= len(blocks):
        raise SiteError(f"{site}: {type(bridge).__name__} has {len(blocks)} layers, 0 to {len(blocks) - 1}")
    prefix = f"blocks.{site.layer}."
    place = _at(bridge, site, prefix + name)
    if site.kind == "resid.mid":
        added = "ln1_post.hook_out" if has_sandwich_norms(bridge, site.layer) else "attn.hook_out"
        return _middle(bridge, site, prefix, added, place)
    return place if site.head is None else _head(bridge, site, place)


def has_sandwich_norms(bridge: nn.Module, layer: int) -> bool:
    """Return whether a block has norms after attention and MLP."""
    return component(bridge, f"blocks.{layer}.ln1_post") is not None


def component(bridge: nn.Module, path: str) -> nn.Module | None:
    """Return a module of a bridge by TransformerLens' name for it; None if there is none."""
    try:
        return bridge.get_submodule(path)
    except AttributeError:
        return None


def _hook_point(bridge: nn.Module, path: str) -> nn.Module | None:
    module = component(bridge, path)
    return module if type(module).__name__ == "HookPoint" else None


def _at(bridge: nn.Module, site: Site, path: str) -> Place:
    """Return a hook point as a place."""
    module = _hook_point(bridge, path)
    if module is None:
        raise SiteError(
            f"{site}: this {type(bridge).__name__} has no hook point {path!r}; name a module that it has, as in "
            "'module:blocks.0.attn.hook_out:output'"
        )
    return Place(path, module, "output")


def _middle(bridge: nn.Module, site: Site, prefix: str, added: str, reader: Place) -> Place:
    """Return the place of the stream between attention and MLP: what attention adds, and what it is added to."""
    return Place(
        prefix + added,
        _at(bridge, site, prefix + added).module,
        "output",
        stream=_at(bridge, site, f"{prefix}hook_in"),
        sum_reader=reader,
    )


def _head(bridge: nn.Module, site: Site, place: Place) -> Place:
    """Return the columns of a head at a hook point whose activations are ``(batch, sequence, heads * width)``."""
    config: Any = getattr(bridge, "cfg", None)
    heads, width = getattr(config, "n_heads", None), getattr(config, "d_head", None)
    if site.kind in ("attn.k", "attn.v"):
        heads = getattr(config, "n_key_value_heads", None) or heads
    if not isinstance(heads, int) or not isinstance(width, int):
        raise SiteError(f"{site}: the heads of this {type(bridge).__name__} cannot be told apart; take all of them")
    if site.head is None or site.head >= heads:
        raise SiteError(f"{site}: {type(bridge).__name__} has {heads} such heads, 0 to {heads - 1}")
    return Place(place.path, place.module, "output", slice(site.head * width, (site.head + 1) * width))
