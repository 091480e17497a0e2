"""From TransformerLens' names of hooks and models to sites and Hub ids."""

from __future__ import annotations

import re
from typing import Any

from featurizers import Site

HOOK = re.compile(
    r"blocks\.(\d+)\.(hook_resid_pre|hook_resid_post|hook_mlp_out|hook_attn_out|attn\.hook_z|mlp\.hook_post)"
)
KINDS = {
    "hook_resid_pre": "resid.pre",
    "hook_resid_post": "resid.post",
    "hook_mlp_out": "mlp.out",
    "hook_attn_out": "attn.out",
    "attn.hook_z": "attn.z",
    "mlp.hook_post": "mlp.act",
}
OWNERS = {"gemma-": "google/", "pythia-": "EleutherAI/", "gpt2": "openai-community/"}
"""Who publishes the models whose names TransformerLens shortens."""


def site_of(hook_name: object, model_name: object) -> Site | None:
    """The site of a hook, with the model's Hub id where that is known; None for hooks that are no site here."""
    if not isinstance(hook_name, str):
        return None
    if hook_name == "hook_embed":
        site = Site("embed")
    elif match := HOOK.fullmatch(hook_name):
        site = Site(KINDS[match[2]], int(match[1]))
    else:
        return None
    return site.at(model=_hub_id(model_name))


def hook_of(site: Site | None) -> str | None:
    """The hook of a site; None where TransformerLens has none of that place."""
    if site is None:
        return None
    if site.kind == "embed":
        return "hook_embed"
    names = {kind: hook for hook, kind in KINDS.items()}
    return f"blocks.{site.layer}.{names[site.kind]}" if site.kind in names and site.head is None else None


def _hub_id(name: Any) -> str | None:
    if not isinstance(name, str) or not name:
        return None
    if "/" in name:
        return name
    name = "gpt2" if name == "gpt2-small" else name
    return next((owner + name for start, owner in OWNERS.items() if name.startswith(start)), None)
