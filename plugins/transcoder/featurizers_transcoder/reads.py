"""What is encoded: the activations at the reads, normalised, and the sum that goes into an activation rule."""

from __future__ import annotations

from collections.abc import Sequence

from featurizers.builtin import normalize
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from featurizers_transcoder.config import ReadConfig


def normalized_read(read: ReadConfig, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
    """Return activations normalised as `ReadConfig.normalize` says; its centre is not subtracted here."""
    match read.normalize:
        case "rms":
            return x * (x.pow(2).mean(dim=-1, keepdim=True) + read.eps).rsqrt()
        case "standard":
            centred = x - x.mean(dim=-1, keepdim=True)
            return centred * (centred.pow(2).mean(dim=-1, keepdim=True) + read.eps).rsqrt()
        case _:
            return normalize(x, read.normalize, read.input_scale)[0]


def pre_activations(
    inputs: Sequence[Float[Tensor, "*batch _"]], weights: Sequence[Float[Tensor, "n _"]], bias: Tensor | None
) -> Float[Tensor, "*batch n"]:
    """Return ``b + Σ_r W_r n_r(x_r)``.

    Args:
        inputs: normalised activations at each read.
        weights: encoder of each read.
        bias: of the features, ``(n,)``; None for none.
    """
    pre = functional.linear(inputs[0], weights[0], bias)
    for x, weight in zip(inputs[1:], weights[1:], strict=True):
        pre = pre + functional.linear(x, weight)
    return pre
