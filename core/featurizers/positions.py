"""Where the tokens that an operation names are in the batch that a model is computing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from featurizers.errors import PositionError
from featurizers.operations import Positions


@dataclass(frozen=True)
class Pass:
    """One forward pass: what it computes of which sequences.

    Attributes:
        start: how many tokens are cached already: 0 for a prompt, more while generating.
        seen_prompt: whether this pass, or one before it in the same context, began at the first token.
        attention_mask: ``(batch, total)``, 1 for a token and 0 for padding; None where nothing is padded.
        opaque_mask: whether the model was given a mask in a form that does not show the padding.
    """

    start: int
    seen_prompt: bool
    attention_mask: Tensor | None
    opaque_mask: bool = False


def columns(positions: Positions, hidden: Tensor, current: Pass) -> Tensor | None:
    """Columns ``(batch, n)`` of ``hidden`` ``(batch, sequence, d)`` that hold these positions of the prompt.

    None means that all of ``hidden`` is meant. Call it for the pass over the prompt only.

    Raises:
        PositionError: a prompt is too short for a position, or the padding is unknown.
    """
    if positions is None:
        return None
    batch, length = hidden.shape[:2]
    wanted = torch.as_tensor(positions, device=hidden.device)
    if wanted.is_floating_point() or wanted.dtype == torch.bool or wanted.dim() not in (1, 2):
        raise PositionError(f"positions must be a list of integers or one such list an example, not {positions!r}")
    if wanted.dim() == 2 and wanted.shape[0] != batch:
        raise PositionError(f"positions are given for {wanted.shape[0]} examples, but the batch has {batch}")
    wanted = wanted.expand(batch, -1)
    if current.opaque_mask:
        raise PositionError(
            "the attention mask is not of shape (batch, sequence), so padding cannot be told from tokens; "
            "pass a two-dimensional mask or use positions=None"
        )
    mask = current.attention_mask
    if mask is None:
        mask = torch.ones(batch, length, dtype=torch.long, device=hidden.device)
    mask = mask.to(hidden.device)[:, :length] != 0
    lengths = mask.sum(-1, keepdim=True)
    from_start = torch.where(wanted < 0, wanted + lengths, wanted)
    bad = (from_start < 0) | (from_start >= lengths)
    if bad.any():
        row, column = bad.nonzero()[0].tolist()
        raise PositionError(
            f"position {int(wanted[row, column])} is not in prompt {row}, which has {int(lengths[row])} tokens"
        )
    # tokens keep their order and come before the padding's columns in a stable sort
    order = torch.argsort((~mask).int(), dim=-1, stable=True)
    return order.gather(-1, from_start)
