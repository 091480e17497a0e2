"""Normalisation of the activations at a read, before they are encoded."""

from __future__ import annotations

from featurizers.builtin import normalize
from jaxtyping import Float
from torch import Tensor

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
