"""The activation rule of llamascopium that the core does not have."""

from __future__ import annotations

import torch
from featurizers.features import activation_rule
from torch import Tensor


@activation_rule("llamascopium.topk", tensors=("norm",), options=("k",), elementwise=False, sparse=True)
def topk(pre: Tensor, norm: Tensor, k: int) -> Tensor:
    """Return f = max(h, 0) for the k largest h · norm of a token, else 0: the norms choose and do not scale."""
    chosen = (pre.detach() * norm).topk(k, dim=-1, sorted=False).indices
    return torch.zeros_like(pre).scatter(-1, chosen, pre.gather(-1, chosen).relu())
