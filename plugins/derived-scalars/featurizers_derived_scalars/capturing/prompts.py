"""Token ids of single sequences, from a tokenizer's output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from featurizers.errors import UsageError, shown
from jaxtyping import Int
from torch import Tensor

Inputs: TypeAlias = "Tensor | Sequence[int] | Sequence[Sequence[int]] | Mapping[str, Any]"


def sequences(inputs: Inputs) -> list[Int[Tensor, " token"]]:
    """Return the sequences, each without its padding.

    Args:
        inputs: ids of one sequence or of several, or a mapping with ``input_ids`` and perhaps ``attention_mask``.

    Raises:
        UsageError: these are no token ids, the mask has another shape or a gap, or a sequence is empty.

    Examples:
        >>> sequences({"input_ids": [[7, 7, 4], [1, 2, 7]], "attention_mask": [[0, 0, 1], [1, 1, 0]]})
        [tensor([4]), tensor([1, 2])]
    """
    mask = None
    if isinstance(inputs, Mapping):
        if "input_ids" not in inputs:
            raise UsageError(f"a mapping of inputs needs input_ids; it has {', '.join(map(str, inputs)) or 'nothing'}")
        mask = inputs.get("attention_mask")
        inputs = inputs["input_ids"]
    rows = _rows(inputs)
    if mask is None:
        return rows
    masks = _rows(mask)
    if [len(row) for row in masks] != [len(row) for row in rows]:
        raise UsageError("the attention mask does not have the shape of the token ids")
    return [_unpadded(row, each) for row, each in zip(rows, masks, strict=True)]


def _rows(inputs: Any) -> list[Tensor]:
    if not isinstance(inputs, Tensor | Sequence) or isinstance(inputs, str) or len(inputs) == 0:
        raise UsageError(f"inputs are token ids of one sequence or of several, not {shown(inputs)}")
    several = inputs.dim() != 1 if isinstance(inputs, Tensor) else isinstance(inputs[0], Tensor | Sequence)
    rows = []
    for row in inputs if several else [inputs]:
        try:
            ids = row if isinstance(row, Tensor) else torch.tensor(row)
        except (TypeError, ValueError) as error:
            raise UsageError(f"inputs are token ids of one sequence or of several, not {shown(inputs)}") from error
        if ids.dim() != 1 or ids.is_floating_point() or ids.is_complex() or len(ids) == 0:
            raise UsageError(f"a sequence is a row of one or more token ids, not {shown(row)}")
        rows.append(ids.long())
    return rows


def _unpadded(ids: Tensor, mask: Tensor) -> Tensor:
    columns = mask.bool().nonzero().flatten()
    if not len(columns):
        raise UsageError("a sequence is all padding")
    first, last = int(columns[0]), int(columns[-1])
    if len(columns) != last - first + 1:
        raise UsageError("an attention mask has a gap within a sequence; padding is before or after it")
    return ids[first : last + 1]
