"""What a model is called with, a part of the prompts at a time, and which tokens take part."""

from __future__ import annotations

from typing import Any

import torch
from featurizers.errors import ShapeError, UsageError
from featurizers.models import Inputs
from torch import Tensor


def mask_of(mask: Tensor | None, shape: torch.Size) -> Tensor:
    """Which tokens take part, as booleans of the tokens' shape.

    Raises:
        ShapeError: the mask has another shape.
        UsageError: it leaves out every token.
    """
    if mask is None:
        return torch.ones(shape, dtype=torch.bool)
    if mask.shape != shape or mask.is_floating_point():
        raise ShapeError(
            f"the mask says of each token whether it takes part, as booleans or 0 and 1 {tuple(shape)}, got "
            f"{mask.dtype} {tuple(mask.shape)}"
        )
    if not mask.any():
        raise UsageError("the mask leaves out every token")
    return mask.bool()


def inputs_of(inputs: Inputs, mask: Tensor | None) -> tuple[dict[str, Any], Tensor, str]:
    """What a model is called with, which tokens take part, the attended ones if no mask is given, and that in words.

    Raises:
        ShapeError: the prompts are no token ids, or the mask has another shape.
        UsageError: the mask leaves out every token.
    """
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point() or ids.numel() == 0:
        raise ShapeError("the prompts are token ids (batch, sequence), alone or as the input_ids of a mapping")
    rule = "every token" if mask is None else "as the mask says"
    if mask is None and isinstance(attended := inputs.get("attention_mask"), Tensor):
        mask, rule = attended, "the attention mask"
    return dict(inputs), mask_of(mask, ids.shape), rule


def rows_of(inputs: Inputs, rows: slice, n: int) -> dict[str, Any]:
    """The inputs of some prompts: of each tensor with a row a prompt, those rows."""
    each = {name: isinstance(value, Tensor) and value.dim() > 0 and len(value) == n for name, value in inputs.items()}
    return {name: value[rows] if each[name] else value for name, value in inputs.items()}
