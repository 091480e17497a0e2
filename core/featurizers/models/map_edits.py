"""Edits of a map's features at some tokens, and how a later edit sees an earlier one."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from featurizers.features.site_map import Edit


class MapEdit(NamedTuple):
    """Edit of features of one group at some tokens.

    Attributes:
        edit: the features, ``(batch, n, k)`` before and after.
        tokens: columns of the sequence, ``(batch, n)``; None for all.
    """

    edit: Edit
    tokens: Tensor | None


def overlaid(features: Tensor, tokens: Tensor | None, numbers: Tensor | None, earlier: MapEdit) -> Tensor:
    """Return features with the values that an earlier edit of their group has set.

    Args:
        features: ``(batch, n, k)``.
        tokens: their columns of the sequence, ``(batch, n)``; None for all.
        numbers: their numbers within the group, ``(k,)``; None for all.
        earlier: edit before.
    """
    edited = earlier.edit.edited
    slots = _positions_in(numbers, earlier.edit.columns, features.shape[-1])
    if not bool((slots >= 0).any()):
        return features
    batch, n = features.shape[:2]
    rows = _token_rows(tokens, earlier.tokens, batch, n, edited)
    values = edited.gather(1, rows.clamp(min=0).unsqueeze(-1).expand(-1, -1, edited.shape[-1]))[..., slots.clamp(min=0)]
    return torch.where((rows >= 0).unsqueeze(-1) & (slots >= 0), values, features)


def _positions_in(numbers: Tensor | None, others: Tensor | None, count: int) -> Tensor:
    """Return where each number stands among others, -1 where it does not; None means all numbers in order."""
    if others is None:
        return torch.arange(count) if numbers is None else numbers
    if numbers is None:
        return torch.full((count,), -1, device=others.device).index_put(
            (others,), torch.arange(len(others), device=others.device)
        )
    match = numbers.unsqueeze(-1) == others
    return torch.where(match.any(-1), match.int().argmax(-1), -1)


def _token_rows(tokens: Tensor | None, others: Tensor | None, batch: int, n: int, edited: Tensor) -> Tensor:
    """Return in which row of an earlier edit each token stands, ``(batch, n)``; -1 where it does not."""
    if others is None:
        return torch.arange(n, device=edited.device).expand(batch, -1) if tokens is None else tokens
    if tokens is None:
        rows = torch.arange(others.shape[1], device=others.device).expand(batch, -1)
        return torch.full((batch, n), -1, device=others.device).scatter(1, others, rows)
    match = tokens.unsqueeze(-1) == others.unsqueeze(1)
    return torch.where(match.any(-1), match.int().argmax(-1), -1)
