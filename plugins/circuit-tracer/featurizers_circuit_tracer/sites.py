"""Translates the hooks in a ``config.yaml`` into sites, and back.

circuit-tracer names hooks as TransformerLens does, on a model whose norms are not folded into other weights, so that
the activations are those of `transformers`. Source: ``circuit_tracer.utils.tl_nnsight_mapping`` of version 0.5.0.
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

from featurizers import Site

NORMALIZED = "ln2.hook_normalized"
"""Hook after the norm before the MLP has divided by the scale, and before it multiplies by its gain."""
GEMMA_EPS = 1e-6
READS = {"hook_resid_mid": "resid.mid", "mlp.hook_in": "mlp.in", NORMALIZED: "resid.mid"}
WRITES = ("mlp.hook_out", "hook_mlp_out")
NORM = "post_feedforward_layernorm"
GEMMA = re.compile(r"(?:[^/]+/)?gemma-[23]-.+", re.IGNORECASE)
TEXT_ONLY = re.compile(r"(?:[^/]+/)?gemma-(?:2-.+|3-(?:270m|1b).*)", re.IGNORECASE)
"""Models whose blocks are ``model.layers``; multimodal models keep them in ``model.language_model.layers``."""
NOT_KNOWN = re.compile(r"gemma-?[3-9]|gemma-2-|olmo", re.IGNORECASE)
"""Parts of names of other models that may have a norm after the MLP, where ``hook_mlp_out`` is."""


class ReadHook(NamedTuple):
    """Site and normalisation that features are encoded from.

    Attributes:
        site: of the read; None if it is not known.
        normalize: ``rms`` if the read is normalised before it is encoded.
    """

    site: Site | None
    normalize: Literal["none", "rms"]


def is_gemma(model: str | None) -> bool:
    """Return whether a name is of Gemma 2 or 3, which normalise the MLP's output before they add it to the stream."""
    return model is not None and GEMMA.fullmatch(model) is not None


def read_hook(hook: str, model: str | None, layer: int) -> ReadHook:
    """Return the site and the normalisation of ``feature_input_hook`` in a layer."""
    kind = READS.get(hook)
    site = None if kind is None else Site(kind, layer).at(model=_hub_id(model))
    return ReadHook(site, "rms" if hook == NORMALIZED else "none")


def write_site(hook: str, model: str | None, layer: int) -> Site | None:
    """Return the site of ``feature_output_hook`` in a layer; None if it depends on a model that is not known."""
    if hook not in WRITES:
        return None
    if hook == "hook_mlp_out":
        if model is None or (not is_gemma(model) and NOT_KNOWN.search(model)):
            return None
        if is_gemma(model):
            blocks = "model.layers" if TEXT_ONLY.fullmatch(model) else "model.language_model.layers"
            return Site("module", module=f"{blocks}.{layer}.{NORM}", side="output").at(model=_hub_id(model))
    return Site("mlp.out", layer).at(model=_hub_id(model))


def _hub_id(model: str | None) -> str | None:
    return model if model is not None and "/" in model else None
