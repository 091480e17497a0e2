"""Translates TransformerLens' names of hooks and models into sites and Hub ids, and back; for plugins of formats."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from featurizers import Site
from featurizers.errors import shown

from featurizers_transcoder.config import Normalization

HOOK = re.compile(r"blocks\.(\d{1,5})\.([a-z0-9_.]{1,40})")
KINDS = {
    "hook_resid_pre": "resid.pre",
    "hook_resid_mid": "resid.mid",
    "hook_resid_post": "resid.post",
    "hook_mlp_out": "mlp.out",
    "hook_attn_out": "attn.out",
    "attn.hook_z": "attn.z",
    "mlp.hook_in": "mlp.in",
    "mlp.hook_post": "mlp.act",
    "mlp.hook_out": "mlp.out",
}
NORMS = {"hook_attn_out": "post_attention_layernorm", "hook_mlp_out": "post_feedforward_layernorm"}
"""Norm after each hook in Gemma 2 and 3. They normalise the outputs of attention and MLP before they add them to the
residual stream, and TransformerLens hooks them after the norm; so the hook is the norm's output, not the module's."""
NORMED = re.compile(r"google/gemma-[23]-.+")
TEXT_ONLY = re.compile(r"google/gemma-(?:2-.+|3-(?:270m|1b).*)")
"""Models whose blocks are ``model.layers``; multimodal models keep them in ``model.language_model.layers``."""
NORM_MODULE = re.compile(rf"model\.(?:language_model\.)?layers\.(\d{{1,5}})\.({'|'.join(NORMS.values())})")
MODEL_NORMS: tuple[tuple[re.Pattern[str], Normalization, float], ...] = (
    (NORMED, "rms", 1e-6),
    (re.compile(r"Qwen/Qwen3-[0-9].*"), "rms", 1e-6),
    (re.compile(r"meta-llama/(?:Meta-)?Llama-3.+"), "rms", 1e-5),
    (re.compile(r"openai-community/gpt2(?:-.+)?"), "standard", 1e-5),
)
"""Norms of models without gain and bias, and their epsilon."""
BEFORE_NORMS = {"ln1.hook_normalized": "resid.pre", "ln2.hook_normalized": "resid.mid"}
"""Kind of the site before the norm whose output, without gain and bias, a hook is."""
POINT = re.compile(r"model\.(?:language_model\.)?layers\.(\d{1,5})\.([a-z0-9_.]{1,60})")
POINTS = {
    "output": "resid.post",
    "self_attn.o_proj.input": "attn.z",
    "mlp.input": "mlp.in",
    "mlp.output": "mlp.out",
    "pre_feedforward_layernorm.output": "mlp.in",
}
"""Kinds of site by what Gemma Scope calls a side of a module of a block."""
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
    if match is None or match[2] not in KINDS:
        return None
    layer, hook = int(match[1]), match[2]
    if type(head) is int:
        return Site("attn.z", layer, head).at(model=model) if hook == "attn.hook_z" and head >= 0 else None
    if hook in NORMS and model is not None and NORMED.fullmatch(model):
        return _norm_site(layer, NORMS[hook], model)
    return Site(KINDS[hook], layer).at(model=model)


@dataclass(frozen=True)
class Read:
    """Activations that a transcoder reads: those at a site, normalised.

    Attributes:
        site: None if the activations of the hook are not those of a site that is known.
        normalize: what leads from the site to the hook; of a `featurizers_transcoder.ReadConfig`, as is ``eps``.
        eps: see there.
    """

    site: Site | None
    normalize: Normalization = "none"
    eps: float = 1e-6


def read_of(hook_name: object, model_name: object, head: object = None) -> Read:
    """Return what a map from a hook reads.

    ``hook_mlp_in`` is a copy of the stream between attention and MLP. ``ln2.hook_normalized`` is that stream after the
    norm and before its gain, which is no module's side, so that its norm becomes part of the encoder; so is
    ``ln1.hook_normalized`` of the stream before attention.

    Args:
        hook_name: see `site_of`, as for the others.
        model_name: see there.
        head: see there.
    """
    match = HOOK.fullmatch(hook_name) if isinstance(hook_name, str) else None
    if match is None or match[2] not in ("hook_mlp_in", *BEFORE_NORMS):
        return Read(site_of(hook_name, model_name, head))
    model = _hub_id(model_name)
    site = Site(BEFORE_NORMS.get(match[2], "resid.mid"), int(match[1])).at(model=model)
    if match[2] == "hook_mlp_in":
        return Read(site)
    norm = next((norm for norm in MODEL_NORMS if model is not None and norm[0].fullmatch(model)), None)
    return Read(None) if norm is None else Read(site, norm[1], norm[2])


def hook_of_read(read: Read) -> str | None:
    """Return TransformerLens' name of the hook whose activations are what a map reads, None if there is none."""
    if read.site is None:
        return None
    if read.normalize == "none":
        return hook_of(read.site)
    name = next((name for name, kind in BEFORE_NORMS.items() if kind == read.site.kind), None)
    hook = f"blocks.{read.site.layer}.{name}"
    known = read_of(hook, read.site.model)
    return hook if (known.site, known.normalize, known.eps) == (read.site, read.normalize, read.eps) else None


def site_of_point(point: object, model_name: object) -> Site | None:
    """Return the site of a module's side, such as ``model.layers.17.pre_feedforward_layernorm.output``."""
    match = POINT.fullmatch(point) if isinstance(point, str) else None
    if match is None:
        return None
    model, layer, side = _hub_id(model_name), int(match[1]), match[2]
    norm = side.removesuffix(".output")
    if side.endswith(".output") and norm in NORMS.values():
        return _norm_site(layer, norm, model)
    return Site(POINTS[side], layer).at(model=model) if side in POINTS else None


def _norm_site(layer: int, norm: str, model: str | None) -> Site:
    multimodal = model is not None and NORMED.fullmatch(model) and not TEXT_ONLY.fullmatch(model)
    blocks = "model.language_model.layers" if multimodal else "model.layers"
    return Site("module", module=f"{blocks}.{layer}.{norm}", side="output").at(model=model)


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


def hookless(hook_in: object, hook_out: object) -> str:
    """Return a note for a map whose hooks are not both sites."""
    return (
        f"It maps the activations of the hook {shown(hook_in)} to those of {shown(hook_out)}, which are not both sites "
        "of a model that is known here; so it has no sites."
    )
