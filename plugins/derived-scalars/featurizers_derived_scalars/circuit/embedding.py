"""Embedding as it enters the residual stream: its weight, times a number in some models."""

from __future__ import annotations

from typing import Any

import torch
from featurizers.errors import SiteError
from featurizers.models import evaluating
from jaxtyping import Float
from torch import Tensor, nn

from featurizers_derived_scalars.circuit.layout import Layout
from featurizers_derived_scalars.circuit.running import run


def token_embeddings(model: nn.Module, layout: Layout) -> Float[Tensor, "vocab d_model"]:
    """Return the embedding's weight times the number that the model multiplies it by, in float32 or better.

    The number is measured on two prompts of one token.

    Raises:
        SiteError: the residual stream does not begin with a multiple of the embedding's weight.
    """
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    weight: Tensor = embeddings.weight.detach()
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    streams: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        streams.append(tensor.detach().clone())
        return tensor

    first_block = layout.blocks[0].block
    tokens = weight.norm(dim=-1).topk(2).indices  # padding's embedding may be zero
    with torch.no_grad(), evaluating(model):
        for token in tokens:
            run(model, token[None], {(first_block, "input"): keep}, stop_after=first_block)
    # the embeddings of positions are the same in both, and cancel
    measured = (streams[0] - streams[1]).flatten().to(weight.dtype)
    expected = weight[tokens[0]] - weight[tokens[1]]
    if measured.shape != expected.shape:
        raise SiteError(f"{type(model).__name__}: its residual stream is not as wide as its embedding")
    multiplier = float((measured * expected).sum() / expected.square().sum())
    tolerance = 1e-3 if streams[0].dtype in (torch.float32, torch.float64) else 5e-2
    if float((measured - multiplier * expected).norm()) > tolerance * float(measured.norm()):
        raise SiteError(f"{type(model).__name__}: its residual stream does not begin with a multiple of its embedding")
    return weight if abs(multiplier - 1) < 1e-3 else weight * multiplier
