"""Where TransformerLens' compatibility mode leaves activations as they are.

`enable_compatibility_mode` folds the weights of norms into the next layer, centres what is written to the residual
stream and moves the biases of values into the output projection. Logits stay the same up to a constant for each token;
activations at some sites do not. Which sites keep theirs was measured for each flag, and is tested. In models with
RMSNorm, which TransformerLens does not centre: all but the outputs of norms and what has a bias of values in it. In
models with LayerNorm: what lies between a norm and a weight that writes to the residual stream.
"""

from __future__ import annotations

from typing import Any

from featurizers import Site
from torch import Tensor, nn

from featurizers_transformer_lens.points import component

BEHIND_NORM = ("norm.out", "mlp.in")
"""Sites that hold the output of a norm, whose weights may be folded away."""
WITH_VALUE_BIAS = ("attn.v", "attn.z")
"""Sites that hold the bias of the values, which may be moved away."""
BETWEEN = ("attn.q", "attn.k", "mlp.act")
"""Sites between a norm and a weight that writes to the residual stream."""


def what_differs(bridge: nn.Module, site: Site) -> str | None:
    """Return what TransformerLens did to the activations at a site of a bridge, and the way out; None if nothing.

    Args:
        bridge: a TransformerBridge. One that does not say whether its weights were processed counts as processed.
        site: any but those of the kind ``module``.
    """
    if getattr(bridge, "_weights_processed", True) is False:
        return None
    config: Any = getattr(bridge, "cfg", None)
    norm = str(getattr(config, "normalization_type", None))
    problem = _problem(bridge, site, norm)
    if problem is None:
        return None
    return (
        f"the weights of this {type(bridge).__name__} were processed by its compatibility mode, which {problem}, so "
        "that its activations are in other coordinates than those of the original model; load the bridge again and "
        "leave that mode out, or enable it with no_processing=True"
    )


def _problem(bridge: nn.Module, site: Site, norm: str) -> str | None:
    """Return what compatibility mode may have done at a site, None if nothing."""
    if site.kind in BEHIND_NORM:
        return "folds the weights of norms into the next layer"
    if site.kind in WITH_VALUE_BIAS and _may_have_value_bias(bridge, site.layer or 0):
        return "moves the biases of values into the output projection"
    if norm.startswith("RMS") or (norm.startswith("LN") and site.kind in (*BETWEEN, *WITH_VALUE_BIAS)):
        return None
    return "folds norms and centres weights"


def _may_have_value_bias(bridge: nn.Module, layer: int) -> bool:
    """Return False only if the projection of values is known to have no bias."""
    values = component(bridge, f"blocks.{layer}.attn.v")
    inside: Any = values
    while isinstance(found := getattr(inside, "_original_component", None), nn.Module):
        inside = found
    weight: Any = getattr(inside, "weight", None)
    return not isinstance(weight, Tensor) or getattr(inside, "bias", None) is not None
