"""Translates TransformerLens' names of hooks and models into sites and Hub ids, and back."""

from __future__ import annotations

import re
from typing import Any

from featurizers import Site

HOOK = re.compile(
    r"blocks\.(\d{1,5})\.(hook_resid_pre|hook_resid_post|hook_mlp_out|hook_attn_out|attn\.hook_z|mlp\.hook_post)"
)
KINDS = {
    "hook_resid_pre": "resid.pre",
    "hook_resid_post": "resid.post",
    "hook_mlp_out": "mlp.out",
    "hook_attn_out": "attn.out",
    "attn.hook_z": "attn.z",
    "mlp.hook_post": "mlp.act",
}
NORMS = {"hook_attn_out": "post_attention_layernorm", "hook_mlp_out": "post_feedforward_layernorm"}
"""Norm after each hook in Gemma 2 and 3. They normalise the outputs of attention and MLP before they add them to the
residual stream, and TransformerLens hooks them after the norm; so the hook is the norm's output, not the module's."""
NORMED = re.compile(r"google/gemma-[23]-.+")
TEXT_ONLY = re.compile(r"google/gemma-(?:2-.+|3-(?:270m|1b).*)")
"""Models whose blocks are ``model.layers``; multimodal models keep them in ``model.language_model.layers``."""
NORM_MODULE = re.compile(rf"model\.(?:language_model\.)?layers\.(\d{{1,5}})\.({'|'.join(NORMS.values())})")
OWNERS = {"gemma-": "google/", "pythia-": "EleutherAI/", "gpt2": "openai-community/"}
"""Hub owners of the models whose names TransformerLens shortens, by the start of the name."""


def site_of(hook_name: object, model_name: object, head: object = None) -> Site | None:
    """Return the site of a hook, with the model's Hub id if that is known; None for hooks that are not a site.

    Args:
        hook_name: TransformerLens' name of the hook.
        model_name: TransformerLens' name of the model, or its Hub id.
        head: number of the attention head, None for all heads.
    """
    if not isinstance(hook_name, str):
        return None
    model = _hub_id(model_name)
    if hook_name == "hook_embed":
        return Site("embed").at(model=model)
    match = HOOK.fullmatch(hook_name)
    if match is None:
        return None
    layer, hook = int(match[1]), match[2]
    if type(head) is int:
        return Site("attn.z", layer, head).at(model=model) if hook == "attn.hook_z" and head >= 0 else None
    if hook in NORMS and model is not None and NORMED.fullmatch(model):
        blocks = "model.layers" if TEXT_ONLY.fullmatch(model) else "model.language_model.layers"
        return Site("module", module=f"{blocks}.{layer}.{NORMS[hook]}", side="output").at(model=model)
    return Site(KINDS[hook], layer).at(model=model)


def hook_of(site: Site) -> str | None:
    """Return TransformerLens' name of the hook at a site, None if it has no hook there."""
    normed = site.model is not None and NORMED.fullmatch(site.model) is not None
    if site.kind == "module":
        match = NORM_MODULE.fullmatch(str(site.module)) if normed and site.side == "output" else None
        return match and f"blocks.{match[1]}.{next(hook for hook, norm in NORMS.items() if norm == match[2])}"
    if site.kind == "embed":
        return "hook_embed"
    hook = next((hook for hook, kind in KINDS.items() if kind == site.kind), None)
    return None if hook is None or (hook in NORMS and normed) else f"blocks.{site.layer}.{hook}"


def _hub_id(name: Any) -> str | None:
    if not isinstance(name, str) or not name:
        return None
    if "/" in name:
        return name if name.isprintable() and len(name) <= 256 else None
    name = "gpt2" if name == "gpt2-small" else name
    return next((owner + name for start, owner in OWNERS.items() if name.startswith(start)), None)
